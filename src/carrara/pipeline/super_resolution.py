"""Small pictures made larger by diffusion."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.model.super_resolution import SuperResolutionModel
from carrara.pipeline.base import OnStep
from carrara.pipeline.denoising import Draws, Sampling, denoised, texts


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
class Enlarged:
    """Pictures of one small picture, as many as there are captions: a `Pipeline`.

    Attributes:
        second_stage: enlarges it.
        small: (1, 3, R / factor, R / factor) in [−1, 1].
    """

    second_stage: SuperResolution
    small: Tensor

    @property
    def num_steps(self) -> int:
        return self.second_stage.sampling.num_steps

    @torch.no_grad()
    def __call__(self, captions: list[str], indices: Sequence[int], seed: int, on_step: OnStep | None = None) -> Tensor:
        """One picture a caption; see `Pipeline`."""
        small = self.small.to(self.second_stage.model.device).expand(len(captions), -1, -1, -1)
        return self.second_stage(small, captions, indices, seed, on_step)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, R, R) in [−1, 1] of a step."""
        return z.float().clamp(-1, 1)
