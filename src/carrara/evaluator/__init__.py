"""The evaluator: a CLIP-style pair of towers that judges pictures and captions."""
