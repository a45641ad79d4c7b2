"""R-precision: does a generated picture pick its own caption among others?"""

import torch
from torch import Tensor

from carrara.metric.embedding_pairs import EmbeddingPairs

_CHUNK = 256  # pictures compared at once: bounds memory at 256 × captions


class RPrecision(EmbeddingPairs):
    """Share of pictures whose own caption is nearer than every other of R candidates. Xu et al. 2018.

    Candidates are distinct captions, so another copy of a picture's caption is never counted as wrong. They
    are its own and the R − 1 that follow it on the ring of all distinct captions in the order of their
    hashes: a random draw, yet a function of the captions alone. A tie is a miss. With fewer than R distinct
    captions all are candidates, and the score is not comparable with one at R: see `num_candidates`.

    embedding_dim: D. max_candidates: R.
    """

    def __init__(self, embedding_dim: int, max_candidates: int = 100) -> None:
        super().__init__(embedding_dim)
        self.max_candidates = max_candidates
        self._num_candidates = 0

    @property
    def num_candidates(self) -> int:
        """Candidates per picture in the last `compute`; 0 before."""
        return self._num_candidates

    def compute(self) -> Tensor:
        """The share, a float64 scalar in [0, 1]; nan with fewer than two distinct captions, of which none is chosen."""
        images, texts, caption, first = self.pairs()
        num_captions = len(first)
        self._num_candidates = min(self.max_candidates, num_captions)
        if self._num_candidates < 2:
            return torch.tensor(torch.nan, dtype=torch.float64, device=self.device)
        steps = torch.arange(self._num_candidates, device=caption.device)
        hits = 0
        for chunk, own in zip(images.split(_CHUNK), caption.split(_CHUNK), strict=True):
            candidates = (own[:, None] + steps) % num_captions  # column 0 is the picture's own caption
            similarity = (chunk @ texts[first].T).gather(1, candidates)
            hits += int((similarity[:, 0] > similarity[:, 1:].amax(dim=1)).sum())
        return torch.tensor(hits / len(images), dtype=torch.float64, device=self.device)
