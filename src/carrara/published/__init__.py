"""Weights that others have published in the layout of `diffusers`, to and from our own parts."""
