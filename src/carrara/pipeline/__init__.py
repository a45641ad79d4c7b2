"""Trained parts put together for making pictures."""
