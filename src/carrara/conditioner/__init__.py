"""Conditioners: captions -> Conditioning."""
