"""Small pictures of captions, made larger by a second diffusion model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.model.super_resolution import SuperResolutionModel
from carrara.pipeline.base import OnStep
from carrara.pipeline.denoising import Sampling
from carrara.pipeline.super_resolution import SuperResolution
from carrara.pipeline.text_to_image import TextToImage


@dataclass(frozen=True)
class Cascade:
    """Caption → small picture → picture (Saharia et al. 2022, "Imagen").

    Attributes:
        model: of the second stage.
        small_pictures: whose latents are the small pictures, as of `autoencoder=shrunken`.
        resolution, sampling, augmentation: of the second stage, see `SuperResolution`.
    """

    model: SuperResolutionModel
    small_pictures: TextToImage
    resolution: int
    sampling: Sampling
    augmentation: float

    def __post_init__(self) -> None:
        first = self.small_pictures.model.autoencoder if isinstance(self.small_pictures, TextToImage) else None
        if first is None or not (first.is_bounded and first.latent_channels == 3):
            raise ValueError("part.small_pictures makes no small pictures: name a run of model=small_pictures")
        theirs = self.small_pictures.resolution, first.downsampling
        ours = self.resolution, self.model.factor
        if theirs != ours:
            raise ValueError(
                "part.small_pictures makes pictures of {} / {} pixels, and this run enlarges those of {} / {}: take a "
                "run of the same data.resolution, and of its autoencoder.downsampling for model.factor "
                "(size.shrunken.downsampling is both)".format(*theirs, *ours)
            )
        _ = self.second_stage  # refuses an impossible augmentation

    @property
    def second_stage(self) -> SuperResolution:
        return SuperResolution(self.model, self.resolution, self.sampling, self.augmentation)

    @property
    def num_steps(self) -> int:
        return self.small_pictures.num_steps + self.sampling.num_steps

    @torch.no_grad()
    def __call__(self, captions: list[str], indices: Sequence[int], seed: int, on_step: OnStep | None = None) -> Tensor:
        """One picture a caption; see `Pipeline`. The first stage's steps come first."""
        small = self.small_pictures.latents(captions, indices, seed, on_step).clamp(-1, 1)
        first = self.small_pictures.num_steps

        def later(step: int, t: Tensor, x: Tensor, x0_hat: Tensor) -> None:
            if on_step is not None:
                on_step(first + step, t, x, x0_hat)

        return self.second_stage(small, captions, indices, seed, later)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pictures of a step of either stage, the first one's enlarged."""
        if z.shape[-1] != self.resolution:
            return self.small_pictures.decode(z)
        return z.float().clamp(-1, 1)
