"""The model without context, which a language model has to beat."""

import json
from collections.abc import Callable, Iterable
from itertools import islice

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.network.vocabulary import Vocabulary

_CAPTIONS_AT_ONCE = 4096


class Unigram(Vocabulary):
    """How often each token is to be predicted in the training captions, and so how probable it is by itself.

    Args:
        vocab_size: number of token ids.
        targets: captions -> the ids (N,) int64 that are to be predicted in them; called when the counts are learned.
    """

    def __init__(self, vocab_size: int, targets: Callable[[list[str]], Tensor]):
        super().__init__()
        self.vocab_size = vocab_size
        self._targets = targets
        self._counts: Tensor | None = None

    @property
    def trained(self) -> bool:
        return self._counts is not None

    def train_on(self, captions: Iterable[str]) -> None:
        """Counts.

        Raises:
            UserError: the captions are all the same token, or empty.
        """
        counts = torch.zeros(self.vocab_size, dtype=torch.int64)
        rest = iter(captions)
        while some := list(islice(rest, _CAPTIONS_AT_ONCE)):
            counts += torch.bincount(self._targets(some), minlength=self.vocab_size)
        if (counts > 0).sum() < 2:
            raise UserError("the captions have no words to learn from: data.caption says where captions are")
        self._counts = counts

    def forward(self, ids: Tensor) -> Tensor:
        """ids (N,) -> their negative log-probabilities (N,), float64 nats, with one added to every count."""
        if self._counts is None:
            raise RuntimeError("nothing has been counted: call train_on(captions) or load a state dict")
        counts = self._counts.double() + 1
        return (counts.sum().log() - counts.log()).to(ids.device)[ids]

    def to_text(self) -> str:
        assert self._counts is not None
        return json.dumps(self._counts.tolist())

    def from_text(self, text: str) -> None:
        self._counts = torch.tensor(json.loads(text))
