"""What the scores of one epoch are computed from, and which part of the work is this rank's."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from carrara.data.validation import ValidationSet
from carrara.model.base import Model


@dataclass(frozen=True)
class Setting:
    """Where and on what a score is computed.

    Attributes:
        validation: the fixed samples.
        rank, world: this process among all.
        device: of the model.
        autocast: a fresh context of the run's precision.
        samples_dir: where rank 0 leaves pictures to look at; None for none.
        epoch: for the pictures' names.
    """

    validation: ValidationSet
    rank: int
    world: int
    device: torch.device
    autocast: Callable[[], AbstractContextManager[object]]
    samples_dir: Path | None
    epoch: int

    def chunks(self, indices: NDArray[np.int64], size: int) -> Iterator[NDArray[np.int64]]:
        """This rank's chunks of `indices`. Chunks are the same on any number of ranks, so are the scores."""
        for k, start in enumerate(range(0, len(indices), size)):
            if k % self.world == self.rank:
                yield indices[start : start + size]


class Score(Protocol):
    """Scores of a model by name. Every rank calls it and gets the same numbers."""

    def __call__(self, model: Model, setting: Setting) -> dict[str, float]: ...


def prefix(split: str) -> str:
    """`val/` for held-out samples, `val_seen/` for those whose combinations were in training."""
    return "val/" if split == "held_out" else f"val_{split}/"
