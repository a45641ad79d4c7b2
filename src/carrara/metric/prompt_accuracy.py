"""Prompt accuracy: the share of pictures that show what their caption says, by a parser of pictures."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from carrara.metric.float64_metric import Float64Metric

KEYS = ("all", "count", "shape", "color", "size", "relation", "background")
Check = Callable[[Sequence[str], Tensor], Sequence[Mapping[str, bool | None]]]


class PromptAccuracy(Float64Metric):
    """Shares of pictures that are right in each of `KEYS`, over those whose caption says something about it.

    check(captions, images) -> one mapping per image from `KEYS` to right (True), wrong or unreadable (False)
    or does not apply (None, or absent); images are uint8 (B, 3, H, W).
    """

    higher_is_better: bool | None = True
    right: Tensor
    applies: Tensor

    def __init__(self, check: Check) -> None:
        super().__init__()
        self.check = check
        self._counts: dict[str, int] = {}
        self.add_sum("right", len(KEYS))
        self.add_sum("applies", len(KEYS))

    @property
    def counts(self) -> dict[str, int]:
        """How many pictures each share of the last `compute` is over; empty before."""
        return self._counts

    def update(self, captions: Sequence[str], images: Tensor) -> None:
        """Check images uint8 (B, 3, H, W) against their B captions."""
        if images.dtype != torch.uint8 or len(captions) != len(images):
            raise ValueError(
                f"expected uint8 images, as many captions, got {len(images)} {images.dtype}, {len(captions)}"
            )
        answers = self.check(captions, images.cpu())  # parsers read numpy arrays
        unknown = {key for answer in answers for key in answer} - set(KEYS)
        if len(answers) != len(images) or unknown:
            raise ValueError(f"the check answered for {len(answers)} of {len(images)} images, unknown keys {unknown}")
        table = [[answer.get(key) for key in KEYS] for answer in answers]
        right = [[float(value is not None and bool(value)) for value in row] for row in table]
        applies = [[float(value is not None) for value in row] for row in table]
        shape = (len(table), len(KEYS))
        self.right = self.right + self.right.new_tensor(right).reshape(shape).sum(dim=0)
        self.applies = self.applies + self.applies.new_tensor(applies).reshape(shape).sum(dim=0)

    def compute(self) -> dict[str, Tensor]:
        """Float64 scalars in [0, 1] by key; a key that applied to no picture is left out."""
        self._counts = {key: int(n) for key, n in zip(KEYS, self.applies.tolist(), strict=True) if n > 0}
        shares = dict(zip(KEYS, self.right / self.applies, strict=True))
        return {key: shares[key] for key in self._counts}

    def reset(self) -> None:
        """Forget all pictures."""
        super().reset()
        self._counts = {}
