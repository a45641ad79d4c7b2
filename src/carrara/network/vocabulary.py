"""What is learned from all captions before the first step."""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn


class Vocabulary(nn.Module):
    """Learned once from the training captions; it has no parameters.

    It is a module so that it travels inside the state dict of whatever reads it: one file holds the weights and the
    vocabulary they belong to.

    Attributes:
        complete: whether it has to see every caption, and not only so many that more add nothing.
    """

    complete: ClassVar[bool] = False

    @property
    def trained(self) -> bool:
        raise NotImplementedError

    def train_on(self, captions: Iterable[str]) -> None:
        """Learn it; the same captions in the same order give the same vocabulary."""
        raise NotImplementedError

    def to_text(self) -> str:
        """What was learned; it has been trained."""
        raise NotImplementedError

    def from_text(self, text: str) -> None:
        """Take what `to_text` gave."""
        raise NotImplementedError

    def get_extra_state(self) -> Tensor:
        return torch.tensor(list((self.to_text() if self.trained else "").encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        if state.numel():
            self.from_text(bytes(state.tolist()).decode())
