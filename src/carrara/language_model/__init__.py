"""A small language model of the captions, which a conditioner can read."""
