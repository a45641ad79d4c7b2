"""The nearest rows of embeddings: all compared, or by an inverted file of product codes (IVF-PQ) and then compared."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import faiss
import numpy as np
from filelock import FileLock
from numpy.typing import NDArray

from carrara.search.embeddings import Embeddings

Found = tuple[NDArray[np.float32], NDArray[np.int64]]
"""(Q, k) cosines, falling, and ids; −∞ and −1 where there are fewer. A row of zeros is never found."""

EXACT_UP_TO = 200_000  # rows: comparing with all takes some hundredths of a second
_PER_LIST = 40  # rows that each list is trained on
_RECALL = 0.995  # of the ten nearest of the queries an index is tuned by
_TUNED_BY = 64  # of its own rows, besides the queries it is given
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
            new = queries @ rows.T
            new[:, _zero(rows)] = -np.inf
            enough = scores[:, -1:]
            if len(rows) > k:
                enough = np.maximum(enough, np.partition(new, -k, axis=1)[:, -k, None])
            passing = new >= enough
            for crowded in np.flatnonzero(passing.sum(axis=1) > k).tolist():  # of the k-th's equals the first
                better = np.count_nonzero(new[crowded] > enough[crowded])
                passing[crowded, np.flatnonzero(new[crowded] == enough[crowded])[k - better :]] = False
            query, row = np.nonzero(passing)  # what is left to sort
            column = np.arange(len(query)) - np.searchsorted(query, query)
            new_scores = np.full((len(queries), column.max(initial=-1) + 1), -np.inf, dtype=np.float32)
            new_ids = np.full(new_scores.shape, -1, dtype=np.int64)
            new_scores[query, column], new_ids[query, column] = new[query, row], first + row
            scores, ids = _best(np.concatenate([scores, new_scores], axis=1), np.concatenate([ids, new_ids], axis=1), k)
        return scores, ids


class Approximate:
    """IVF-PQ (Jégou et al. 2011): the lists nearest to a query, candidates by their codes, the best by their rows.

    Codes are of four bits for every two features. How many lists are looked into is found out when it is built.
    """

    def __init__(self, path: Path, embeddings: Embeddings) -> None:
        self.embeddings = embeddings
        self.index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)

    @classmethod
    def build(cls, embeddings: Embeddings, path: Path, queries: NDArray[np.float32], seed: int = 0) -> None:
        """Writes the file, atomically.

        It looks into as many lists as find `_RECALL` of the true neighbours both of some rows and of `queries` (Q, D),
        what will be asked: a sentence lies apart from all pictures, and its neighbours in many lists.
        """
        width, count = embeddings.width, len(embeddings)
        lists = max(1, min(65_536, 2 ** round(np.log2(np.sqrt(count)) - 1)))
        index: Any = faiss.index_factory(width, f"IVF{lists},PQ{width // 2}x4fs", faiss.METRIC_INNER_PRODUCT)
        index.cp.seed, index.cp.niter = seed, 10
        rng = np.random.default_rng(seed)
        trained_on = min(count, max(lists * _PER_LIST, 20_000))
        index.train(embeddings.rows(np.sort(rng.choice(count, trained_on, replace=False))))
        for _, rows in embeddings.blocks():
            index.add(rows)
        own = embeddings.rows(np.sort(rng.choice(count, min(count, _TUNED_BY), replace=False)))
        _tune(index, embeddings, [own, queries])
        temporary = path.with_name(f".{path.name}.partial")
        try:
            faiss.write_index(index, str(temporary))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def search(self, queries: NDArray[np.float32], k: int) -> Found:
        return _search(self.index, self.embeddings, queries, k)


def _search(index: Any, embeddings: Embeddings, queries: NDArray[np.float32], k: int) -> Found:
    _, candidates = index.search(np.ascontiguousarray(queries, dtype=np.float32), min(_CANDIDATES * k, len(embeddings)))
    flat = embeddings.rows(candidates.reshape(-1)).reshape(*candidates.shape, -1)
    scores = np.einsum("qd,qcd->qc", queries, flat)
    scores[(candidates < 0) | ~flat.any(axis=2)] = -np.inf
    return _best(scores, candidates, k)


def _tune(index: Any, embeddings: Embeddings, kinds: Sequence[NDArray[np.float32]]) -> None:
    """Sets how many lists are looked into."""
    kinds = [queries for queries in kinds if len(queries)]
    _, all_wanted = Exact(embeddings).search(np.concatenate(kinds), 10)  # in one reading of the rows
    wanted = np.split(all_wanted, np.cumsum([len(queries) for queries in kinds[:-1]]))
    index.nprobe = 8
    while index.nprobe < index.nlist:
        found = [_search(index, embeddings, queries, 10)[1] for queries in kinds]
        if all(recall(f, w) >= _RECALL for f, w in zip(found, wanted, strict=True)):
            return
        index.nprobe = min(2 * index.nprobe, index.nlist)


def recall(found: NDArray[np.int64], wanted: NDArray[np.int64]) -> float:
    """Share of the wanted ids (Q, k) that were found."""
    shared = [len(set(f) & set(w)) for f, w in zip(found.tolist(), wanted.tolist(), strict=True)]
    return sum(shared) / wanted.size


def open_index(embeddings: Embeddings, folder: Path, name: str, queries: Callable[[], NDArray[np.float32]]) -> Index:
    """Exact for few rows; else approximate, built once under this name and tuned by `queries`."""
    if len(embeddings) <= EXACT_UP_TO:
        return Exact(embeddings)
    path = folder / f"{name}.faiss"
    if not path.exists():
        with FileLock(path.with_suffix(".lock")):  # who comes second waits, and finds it
            if not path.exists():
                Approximate.build(embeddings, path, queries())
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
        asking = np.setdiff1d(np.arange(len(rows)), _zero(rows))
        scores, ids = index.search(rows[asking], neighbours)
        query, place = np.nonzero((scores >= least) & (ids >= 0))
        for one, other in zip((first + asking[query]).tolist(), ids[query, place].tolist(), strict=True):
            low, high = sorted((root(one), root(other)))
            parent[high] = low
    groups: dict[int, list[int]] = {}
    for k in range(len(parent)):
        groups.setdefault(root(k), []).append(k)
    return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)


def _best(scores: NDArray[np.float32], ids: NDArray[np.int64], k: int) -> Found:
    """The k best columns of each row; of equals the lower id."""
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    scores, ids = np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
    return scores, np.where(np.isneginf(scores), -1, ids)


def _zero(rows: NDArray[np.float32]) -> NDArray[np.int64]:
    """Which rows are of pictures that could not be decoded."""
    some = np.flatnonzero(rows[:, 0] == 0)  # few: the others need not be looked at
    return some[~rows[some].any(axis=1)]
