"""The nearest rows of embeddings: all compared, or by an inverted file of product codes (IVF-PQ) and then compared."""

import os
from pathlib import Path
from typing import Any, Protocol, cast

import faiss
import numpy as np
from numpy.typing import NDArray

from carrara.search.embeddings import Embeddings

Found = tuple[NDArray[np.float32], NDArray[np.int64]]  # (Q, k) cosines, falling, and ids; -1 where there are fewer

EXACT_UP_TO = 200_000  # rows: comparing with all takes some hundredths of a second
_PER_LIST = 40  # rows that each list is trained on
_PROBES = 256  # lists that are looked into: a sentence lies apart from all pictures, and near none of their lists
_CANDIDATES = 50  # times k, by their codes, are compared by their rows


class Index(Protocol):
    def search(self, queries: NDArray[np.float32], k: int) -> Found:
        """The k rows with the largest inner products with each of the queries (Q, D)."""


class Exact:
    """Compares with every row."""

    def __init__(self, embeddings: Embeddings) -> None:
        self.embeddings = embeddings

    def search(self, queries: NDArray[np.float32], k: int) -> Found:
        scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
        ids = np.full((len(queries), k), -1, dtype=np.int64)
        for first, rows in self.embeddings.blocks():
            scores, ids = _best(
                np.concatenate([scores, queries @ rows.T], axis=1),
                np.concatenate([ids, np.broadcast_to(first + np.arange(len(rows)), (len(queries), len(rows)))], axis=1),
                k,
            )
        return scores, ids


class Approximate:
    """IVF-PQ (Jégou et al. 2011): the lists nearest to a query, candidates by their codes, the best by their rows.

    A row's code takes a quarter of a byte a feature at least; the file is mapped, not read.
    """

    def __init__(self, path: Path, embeddings: Embeddings) -> None:
        self.embeddings = embeddings
        index = cast(Any, faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY))
        index.nprobe = min(_PROBES, index.nlist)
        self.index = index

    @staticmethod
    def build(embeddings: Embeddings, path: Path, seed: int = 0) -> None:
        """Writes the file, atomically."""
        width, count = embeddings.width, len(embeddings)
        lists = max(1, min(65_536, 2 ** round(np.log2(np.sqrt(count)))))
        pieces = next(
            pieces for pieces in (width // 4, width // 8, width // 2, width) if pieces and width % pieces == 0
        )
        index: Any = faiss.index_factory(width, f"IVF{lists},PQ{pieces}", faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.cp.niter = seed, 10
        index.pq.cp.niter = 10
        chosen = np.sort(
            np.random.default_rng(seed).choice(count, min(count, max(lists * _PER_LIST, 20_000)), replace=False)
        )
        index.train(embeddings.rows(chosen))
        for _, rows in embeddings.blocks():
            index.add(rows)
        temporary = path.with_name(f".{path.name}.partial")
        try:
            faiss.write_index(index, str(temporary))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def search(self, queries: NDArray[np.float32], k: int) -> Found:
        _, candidates = self.index.search(np.ascontiguousarray(queries, dtype=np.float32), _CANDIDATES * k)
        flat = self.embeddings.rows(candidates.reshape(-1)).reshape(*candidates.shape, -1)
        scores = np.einsum("qd,qcd->qc", queries, flat)
        scores[candidates < 0] = -np.inf
        return _best(scores, candidates, k)


def open_index(embeddings: Embeddings, folder: Path, name: str) -> Index:
    """Exact for few rows; else approximate, built once under this name."""
    if len(embeddings) <= EXACT_UP_TO:
        return Exact(embeddings)
    path = folder / f"{name}.faiss"
    if not path.exists():
        Approximate.build(embeddings, path)
    return Approximate(path, embeddings)


def near_duplicates(embeddings: Embeddings, index: Index, least: float, neighbours: int = 10) -> list[list[int]]:
    """Groups of ids that are linked by a cosine of `least` or more, each rising, the largest groups first."""
    parent = np.arange(len(embeddings))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = int(parent[k])
        return k

    for first, rows in embeddings.blocks(4096):
        scores, ids = index.search(rows, neighbours)
        query, place = np.nonzero(scores >= least)
        for one, other in zip((first + query).tolist(), ids[query, place].tolist(), strict=True):
            low, high = sorted((root(one), root(other)))
            parent[high] = low
    groups: dict[int, list[int]] = {}
    for k in range(len(parent)):
        groups.setdefault(root(k), []).append(k)
    return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)


def _best(scores: NDArray[np.float32], ids: NDArray[np.int64], k: int) -> Found:
    """The k best columns of each row; of equals the lower id."""
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
