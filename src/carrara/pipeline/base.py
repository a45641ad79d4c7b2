"""What every pipeline promises, and how to watch one."""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

OnStep = Callable[[int, Tensor, Tensor, Tensor], None]  # (step, t, latents, estimate of the clean latents)


@runtime_checkable
class Pipeline(Protocol):
    """Captions to pictures: trained parts put together, and how to sample them.

    Attributes:
        num_steps: how often `on_step` is called; 0 if there is nothing on the way to see.
    """

    @property
    def num_steps(self) -> int: ...

    def __call__(self, captions: list[str], indices: Sequence[int], seed: int, on_step: OnStep | None = None) -> Tensor:
        """One picture a caption, (B, 3, R, R) in [−1, 1].

        Args:
            captions: B texts; "" is the unconditional picture, where the model has learnt one (GANs and VAEs have not).
            indices: B numbers; picture k of a seed is the same whatever else is in the batch.
            seed: of the noise.
            on_step: told (step, t, latents, estimate of the clean latents) after every step; t falls from 1 to 0.
        """

    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, R, R) in [−1, 1] of the latents that `on_step` is told."""


class Watch:
    """An `on_step` that keeps decoded pictures on their way out of the noise.

    Args:
        pipeline: that it watches.
        num_frames: how many steps to keep, spread evenly, the last always among them.
        num_samples: how many of the batch, from its first.

    Attributes:
        frames: (num_samples, 3, R, R) of each kept step: the latent as it is then, decoded.
        estimates: the same of x0_hat, what the network thinks it will become.
        times: t of each.
    """

    def __init__(self, pipeline: Pipeline, num_frames: int, num_samples: int):
        self.pipeline = pipeline
        count = min(num_frames, pipeline.num_steps)
        self.kept = {round((k + 1) * pipeline.num_steps / count) - 1 for k in range(count)}
        self.num_samples = num_samples
        self.frames: list[Tensor] = []
        self.estimates: list[Tensor] = []
        self.times: list[float] = []

    def __call__(self, step: int, t: Tensor, x: Tensor, x0_hat: Tensor) -> None:
        if step in self.kept:
            self.frames.append(self.pipeline.decode(x[: self.num_samples]))
            self.estimates.append(self.pipeline.decode(x0_hat[: self.num_samples]))
            self.times.append(float(t))
