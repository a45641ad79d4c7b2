"""Auto-encoders: images <-> normalised latents."""
