"""Guidance: how a conditional and an unconditional prediction make one."""

from collections.abc import Callable
from typing import Protocol, Self, TypeVar

import torch
from torch import Tensor


class Joinable(Protocol):
    """Conditioning of a batch that can be joined, along the batch, with another's."""

    def cat(self, other: Self) -> Self: ...


C = TypeVar("C", bound=Joinable)


class ClassifierFree:
    """unconditional + scale (conditional - unconditional) (Ho & Salimans 2022, eq. 6, whose w is scale - 1).

    The outputs are combined; since x0_hat is affine in the output, so are the estimates, whatever the target.
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def guided(
        self, predict: Callable[[Tensor, Tensor, C], Tensor], conditioning: C, unconditional: C
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """predict(x, time, conditioning) as a function of x (B, ...) and time (B,) alone.

        Both halves go through the network in one call of 2B samples; at scale 1 there is no second half.
        """
        if self.scale == 1:
            return lambda x, time: predict(x, time, conditioning)
        both = conditioning.cat(unconditional)

        def guided(x: Tensor, time: Tensor) -> Tensor:
            output = predict(torch.cat([x, x]), torch.cat([time, time]), both)
            # in x's precision: the difference is small, and the scale magnifies its rounding
            with_text, without = output.to(x.dtype).chunk(2)
            return without + self.scale * (with_text - without)

        return guided
