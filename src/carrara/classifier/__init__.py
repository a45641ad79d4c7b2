"""A classifier of pictures, trained on any labels: its features are a third way to compare pictures."""
