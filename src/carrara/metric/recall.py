"""Recall@k of an evaluator: caption to picture and picture to caption."""

from collections.abc import Sequence

import torch
from torch import Tensor

from carrara.errors import UserError
from carrara.metric.embedding_pairs import EmbeddingPairs


def recall_at(k: int, image_embeddings: Tensor, text_embeddings: Tensor) -> Tensor:
    """Mean of text-to-image and image-to-text recall@k, a float64 scalar in [0, 1].

    Row i of the embeddings (n, D), both of length 1, is a pair and all n captions differ. A pair is found if
    fewer than k others are at least as similar: ties and nan count against it.
    """
    similarity = image_embeddings.double() @ text_embeddings.double().T
    own = similarity.diagonal()
    nearer = torch.stack([(similarity < own[:, None]).sum(dim=1), (similarity < own).sum(dim=0)])
    return (len(own) - 1 - nearer < k).double().mean()


class Recall(EmbeddingPairs):
    """`recall_at` each of `ks`, among the first `max_captions` distinct captions by sample index.

    Of pictures that share a caption only the first is kept: the others would be hits that count as misses.
    The more captions, the harder: compare only at equal `num_captions`.
    """

    def __init__(self, embedding_dim: int, ks: Sequence[int] = (1, 5), max_captions: int = 1000) -> None:
        super().__init__(embedding_dim)
        self.ks, self.max_captions = tuple(ks), max_captions
        self._num_captions = 0

    @property
    def num_captions(self) -> int:
        """Distinct captions in the last `compute`; 0 before."""
        return self._num_captions

    def compute(self) -> dict[str, Tensor]:
        """{"recall_at_1": share, "recall_at_5": share}. Raises UserError before any pair."""
        images, texts, _, first = self.pairs()
        kept = first.sort().values[: self.max_captions]
        self._num_captions = len(kept)
        if not len(kept):
            raise UserError("recall needs at least 1 pair of picture and caption: the validation set is empty")
        return {f"recall_at_{k}": recall_at(k, images[kept], texts[kept]) for k in self.ks}
