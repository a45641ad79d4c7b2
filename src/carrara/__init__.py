"""Carrara: text-to-image diffusion experiments on PyTorch Lightning."""
