"""What every corruption promises."""

from collections.abc import Sequence

import torch
from torch import Tensor

from carrara import keyed_random


class Corruption:
    """Pictures -> noisy versions of them, each a pure function of (seed, the picture's key, the version's number).

    So a picture has the same noisy versions whenever it is seen, in training as in shards that are written of it, as
    pictures have that somebody took twice.

    Args:
        seed: of all versions.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, images: Tensor, keys: Sequence[str], version: int) -> Tensor:
        """One noisy version of each picture.

        Args:
            images: (B, 3, H, W) in [−1, 1].
            keys: of the B samples, `shard/key`.
            version: its number; different ones are independent.

        Returns:
            (B, 3, H, W); noise may lead out of [−1, 1], see `as_stored`.
        """
        positions = keyed_random.positions_of(keys).to(images.device)
        return self.corrupt(images, positions, f"corruption/{version}")

    def corrupt(self, images: Tensor, positions: Tensor, purpose: str) -> Tensor:
        """The same with draws that are keyed by `positions` (B,) and `purpose`, see `keyed_random.uniform`."""
        raise NotImplementedError

    def distance(self, answer: Tensor, target: Tensor) -> Tensor:
        """Of each value: the squared error, which of noisy targets is least for their mean.

        A corruption that does not leave the mean where it is has another (Lehtinen et al. 2018, "Noise2Noise",
        section 2).
        """
        return (answer - target).square()

    def excess(self, answer: Tensor) -> Tensor:
        """Of each value: how the mean distance from noisy versions depends on the answer besides by way of the distance
        from the clean picture; 0 or more."""
        return torch.zeros_like(answer)


def as_stored(images: Tensor) -> Tensor:
    """Pictures in [−1, 1] as a file holds them: cut off there and rounded to 256 levels.

    Cutting noise off moves its mean where a picture is black or white, by up to 0.4 standard deviations.
    """
    return ((images + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Of a setting of a corruption.

    Raises:
        ValueError: it does not lie between the two.
    """
    if not low < value <= high:
        raise ValueError(f"corruption.{name} must be more than {low:g} and at most {high:g}, not {value!r}")
