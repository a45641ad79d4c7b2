"""Small pictures, of captions or given, made larger by a second diffusion model."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.model.super_resolution import SuperResolutionModel
from carrara.pipeline.base import OnStep
from carrara.pipeline.denoising import Draws, Sampling, denoised, texts
from carrara.pipeline.text_to_image import TextToImage


@dataclass(frozen=True)
class SuperResolution:
    """Small picture and caption → picture (Ho et al. 2022, "Cascaded diffusion models").

    Attributes:
        model: of the pictures.
        resolution: of them.
        sampling: how to get from noise to one.
        augmentation: t of the noise that the small picture gets; at most what the model was trained for.
    """

    model: SuperResolutionModel
    resolution: int
    sampling: Sampling
    augmentation: float

    def __post_init__(self) -> None:
        most = self.model.max_augmentation
        if not 0 <= self.augmentation <= most:
            raise ValueError(
                f"pipeline.augmentation={self.augmentation} lies outside of [0, {most}], the model.max_augmentation "
                "that was trained for"
            )

    @torch.no_grad()
    def __call__(
        self, small: Tensor, captions: list[str], indices: Sequence[int], seed: int, on_step: OnStep | None = None
    ) -> Tensor:
        """Pictures (B, 3, R, R) in [−1, 1].

        Args:
            small: (B, 3, R / factor, R / factor) in [−1, 1].
            captions, indices, seed, on_step: as of `Pipeline`.
        """
        positions = torch.as_tensor(list(indices))
        eps = Draws(seed, positions, "augmentation").of_shape(tuple(small.shape[1:]), small.device)()
        s = torch.full((len(small),), self.augmentation, device=small.device)
        positive, negative = (
            self.model.starting_from(some, small, s, eps) for some in texts(self.model, captions, self.sampling)
        )
        shape = (3, self.resolution, self.resolution)
        draws = Draws(seed, positions, "super_resolution")
        return denoised(self.model, positive, negative, shape, draws, self.sampling, on_step).clamp(-1, 1)


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
        if not isinstance(self.small_pictures, TextToImage):
            raise ValueError("part.small_pictures makes no pictures: name a run of model=small_pictures")
        theirs = self.small_pictures.resolution, self.small_pictures.model.autoencoder.downsampling
        ours = self.resolution, self.model.factor
        if theirs != ours:
            raise ValueError(
                "part.small_pictures makes pictures of {} / {} pixels, and this run enlarges those of {} / {}: take a "
                "run of the same data.resolution and autoencoder.downsampling".format(*theirs, *ours)
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
