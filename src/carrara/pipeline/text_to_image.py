"""Captions to pictures: conditioner, noise predictor, sampler, decoder."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.model.diffusion import DiffusionModel
from carrara.pipeline.base import OnStep
from carrara.pipeline.denoising import Draws, Sampling, denoised, texts
from carrara.pipeline.source import Source


@dataclass(frozen=True)
class TextToImage:
    """Latent noise → steps → decode once.

    Attributes:
        model: noise predictor, conditioner and auto-encoder, with the weights they have now.
        resolution: of the pictures.
        sampling: how to get from noise to a latent.
        source: a picture to start from instead of noise alone.
    """

    model: DiffusionModel
    resolution: int
    sampling: Sampling
    source: Source | None = None

    @property
    def num_steps(self) -> int:
        times = self.sampling.times
        return len(times if self.source is None else self.source.rest_of(times)) - 1

    def __call__(self, captions: list[str], indices: Sequence[int], seed: int, on_step: OnStep | None = None) -> Tensor:
        """One picture a caption; see `Pipeline`."""
        pictures = self.decode(self.latents(captions, indices, seed, on_step))
        return pictures if self.source is None else self.source.paste(pictures)

    def latents(self, captions: list[str], indices: Sequence[int], seed: int, on_step: OnStep | None = None) -> Tensor:
        """Of one picture a caption, (B, C, h, w) float32; arguments as of `Pipeline`."""
        positive, negative = texts(self.model, captions, self.sampling)
        shape = self.model.autoencoder.latent_shape(self.resolution, self.resolution)
        draws, source = Draws(seed, torch.as_tensor(list(indices))), None
        if self.source is not None:
            image = self.source.image.to(positive.tokens.device)
            source = self.source, self.model.autoencoder.encode(image[None])[0].float()
        return denoised(self.model, positive, negative, shape, draws, self.sampling, on_step, source)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, R, R) in [−1, 1] from latents; where a mask keeps the source, they may differ from it."""
        return self.model.autoencoder.decode(z).float().clamp(-1, 1)
