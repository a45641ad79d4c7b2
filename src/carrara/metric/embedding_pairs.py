"""What R-precision and recall share: gathered pairs of picture and caption embeddings."""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from carrara.metric.float64_metric import Float64Metric, sort_by_index


class Pairs(NamedTuple):
    """Pairs in the order of sample index.

    images, texts: (n, D) float64 of length 1. caption: (n,) int64, the number of its caption among the c
    distinct ones. first: (c,) int64, the first pair that has each of those.
    """

    images: Tensor
    texts: Tensor
    caption: Tensor
    first: Tensor


def caption_hash(caption: str) -> int:
    """A signed 64-bit hash of a caption, the same in every process: strings cannot be gathered over ranks."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big", signed=True)


class EmbeddingPairs(Float64Metric):
    """Gathers embeddings of pictures and of their captions. `embedding_dim`: D."""

    higher_is_better: bool | None = True
    image_embeddings: list[Tensor]
    text_embeddings: list[Tensor]
    caption_hashes: list[Tensor]
    index: list[Tensor]

    def __init__(self, embedding_dim: int) -> None:
        super().__init__()
        self.add_samples("image_embeddings", embedding_dim)
        self.add_samples("text_embeddings", embedding_dim)
        self.add_samples("caption_hashes", dtype=torch.int64)
        self.add_samples("index", dtype=torch.int64)

    def update(self, image_embeddings: Tensor, text_embeddings: Tensor, captions: Sequence[str], index: Tensor) -> None:
        """Add pairs: embeddings (B, D), the B captions, and unique sample indices (B,) int64."""
        hashes = [caption_hash(caption) for caption in captions]
        device = image_embeddings.device
        self.image_embeddings.append(F.normalize(image_embeddings.double(), dim=1))
        self.text_embeddings.append(F.normalize(text_embeddings.double(), dim=1))
        self.caption_hashes.append(torch.tensor(hashes, dtype=torch.int64, device=device))
        self.index.append(index.to(device, torch.int64))

    def pairs(self) -> Pairs:
        """All pairs by sample index; distinct captions are numbered in the order of their hashes."""
        images, texts, hashes = sort_by_index(
            self.samples("index"),
            self.samples("image_embeddings"),
            self.samples("text_embeddings"),
            self.samples("caption_hashes"),
        )
        distinct, caption = hashes.unique(return_inverse=True)
        first = torch.full_like(distinct, len(hashes))
        first = first.scatter_reduce(0, caption, torch.arange(len(hashes), device=caption.device), "amin")
        return Pairs(images, texts, caption, first)
