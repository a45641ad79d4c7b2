"""An index of a million synthetic embeddings: how fast it is built and opened, and how well it finds.

`python experiments/benchmarks/search.py [ROWS]`.
"""

import sys
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch
from roof import describe

from carrara.search.embeddings import Embeddings
from carrara.search.index import Approximate, Exact, recall

WIDTH, INTRINSIC = 128, 24  # features, and the dimensions in which embeddings of pictures really differ
SHARDS, QUERIES = 100, 100


class Files(Embeddings):
    """Embeddings that lie in a folder."""

    def __init__(self, folder: Path, rows: int) -> None:
        rng = np.random.default_rng(0)
        self.basis = rng.normal(size=(INTRINSIC, WIDTH)).astype(np.float32)
        self.centres = rng.normal(size=(1000, INTRINSIC)).astype(np.float32)
        parts = []
        for s, count in enumerate(np.diff(np.linspace(0, rows, SHARDS + 1).astype(int)).tolist()):
            parts.append(folder / f"{s}.npy")
            np.save(parts[-1], self.like(rng, count).astype(np.float16))
        self.parts = [np.load(part, mmap_mode="r") for part in parts]
        self.starts = np.cumsum([0, *map(len, self.parts)])

    def like(self, rng: np.random.Generator, count: int) -> np.ndarray:
        found = self.centres[rng.integers(0, len(self.centres), count)]
        found = (found + rng.normal(size=(count, INTRINSIC)).astype(np.float32)) @ self.basis
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def away(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """As sentences lie: half of the way towards a direction that no picture has."""
        gap = np.full(WIDTH, WIDTH**-0.5, dtype=np.float32)
        found = self.like(rng, count) + gap
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def main(rows: int) -> None:
    faiss.omp_set_num_threads(torch.get_num_threads())
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        embeddings = Files(Path(folder), rows)
        path = Path(folder) / "index.faiss"
        rng = np.random.default_rng(1)
        sentences = embeddings.away(rng, 2 * QUERIES)
        start = time.perf_counter()
        Approximate.build(embeddings, path, sentences[:64])
        built = time.perf_counter() - start
        start = time.perf_counter()
        index = Approximate(path, embeddings)
        opened = time.perf_counter() - start
        for name, queries in (
            ("pictures", embeddings.like(rng, QUERIES)),
            ("sentences", sentences[QUERIES:]),
        ):
            start = time.perf_counter()
            _, found = index.search(queries, 10)
            fast = time.perf_counter() - start
            start = time.perf_counter()
            _, wanted = Exact(embeddings).search(queries, 10)
            slow = time.perf_counter() - start
            share = f"recall@10 {recall(found, wanted):.4f}"
            print(f"{name}: {share}, {slow / fast:.0f} times as fast as comparing with all")
        size = path.stat().st_size / rows
        print(f"{rows:,} rows of {WIDTH}, {size:.0f} bytes each in the index, {index.index.nprobe} lists looked into")
        print(f"built at {rows / built:,.0f} rows/s, opened in {opened:.3f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
