"""Scores of generated pictures: torchmetrics metrics with float64 states, and feature extractors."""
