"""The mathematics of diffusion on tensors. Imports torch alone; knows no network, text or image."""
