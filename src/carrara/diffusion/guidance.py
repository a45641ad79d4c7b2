"""Guidance: how a prediction and a worse one make a better one."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor

from carrara.diffusion.objective import Network, Objective, Predict

Pair = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # (x_t (B, ...), t ()) -> two outputs (B, ...)


class Joinable(Protocol):
    """Conditioning of a batch that can be joined, along the batch, with another's."""

    def cat(self, other: Self) -> Self: ...


C = TypeVar("C", bound=Joinable)


class Guidance:
    """negative + scale (positive - negative): away from the negative prediction.

    (Ho & Salimans 2022, eq. 6, whose w is scale - 1.) The network's outputs are combined; since x0_hat is affine in
    the output, so are the estimates, whatever the target.

    Args:
        scale: 1 is off.
        rescale: share of the output whose standard deviation is brought back to the positive prediction's, phi of
            Lin et al. 2023, eq. 15 and 16.
        interval: the least and greatest t at which to guide (Kynkäänniemi et al. 2024, there in sigma); at other
            times, as with scale 1, the negative prediction is not computed.
    """

    def __init__(self, scale: float, rescale: float = 0.0, interval: Sequence[float] = (0.0, 1.0)) -> None:
        if not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(f"guidance.scale must be a number, but is {scale}")
        if not isinstance(rescale, int | float) or not 0 <= rescale <= 1:
            raise ValueError(f"guidance.rescale must lie in [0, 1], but is {rescale}")
        two = (
            isinstance(interval, Sequence) and len(interval) == 2 and all(isinstance(t, int | float) for t in interval)
        )
        if not two or not 0 <= interval[0] <= interval[1] <= 1:
            raise ValueError(f"guidance.interval must be two times that rise in [0, 1], but is {interval}")
        self.scale = scale
        self.rescale = rescale
        self.interval = tuple(interval)

    def guided(self, positive: Predict, pair: Pair) -> Predict:
        """The guided prediction.

        Args:
            positive: the prediction alone, for the times without guidance.
            pair: positive and negative prediction.
        """

        def guided(x_t: Tensor, t: Tensor) -> Tensor:
            if self.scale == 1 or not self.interval[0] <= float(t) <= self.interval[1]:
                return positive(x_t, t)
            # in x's precision: the difference is small, and the scale magnifies its rounding
            better, worse = (output.to(x_t.dtype) for output in pair(x_t, t))
            return self._rescaled(worse + self.scale * (better - worse), better)

        return guided

    def _rescaled(self, output: Tensor, positive: Tensor) -> Tensor:
        if self.rescale == 0:
            return output
        dims = tuple(range(1, output.ndim))
        factor = positive.std(dims, keepdim=True) / output.std(dims, keepdim=True).clamp(min=1e-12)
        return (self.rescale * factor + 1 - self.rescale) * output


def classifier_free(objective: Objective, network: Network[C], conditioning: C, unconditional: C) -> Pair:
    """Predictions with and without the condition, from one call of the network with 2B samples."""
    predict = objective.predict(network, conditioning.cat(unconditional))

    def pair(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        positive, negative = predict(torch.cat([x_t, x_t]), t).chunk(2)
        return positive, negative

    return pair


def autoguidance(positive: Predict, weak: Predict) -> Pair:
    """Predictions of a model and of a weaker version of it, both with the condition (Karras et al. 2024, eq. 5)."""

    def pair(x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return positive(x_t, t), weak(x_t, t)

    return pair
