"""The evaluator's embeddings of every picture in a set of shards, one file a shard."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from carrara.data.decode import DecodeError
from carrara.data.manifest import Manifest, Shard
from carrara.data.reader import Samples
from carrara.errors import UserError
from carrara.evaluator.clip import CLIP

_log = logging.getLogger(__name__)


class Embeddings:
    """Rows of unit length, (N, D) float16 in files that are mapped, not read; row k is of the sample with id k.

    The row of a picture that cannot be decoded is zero: nothing is like it.
    """

    def __init__(self, paths: Sequence[Path], manifest: Manifest) -> None:
        """Raises UserError naming the file that is not of its shard."""
        self.starts = manifest.starts
        self.parts: list[NDArray[np.float16]] = []
        for path, shard in zip(paths, manifest.shards, strict=True):
            try:
                rows = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError):
                rows = np.empty(0)
            if rows.dtype != np.float16 or rows.ndim != 2 or len(rows) != shard.num_samples:
                raise UserError(f"{path} is damaged; remove it, and it is made again")
            self.parts.append(rows)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def width(self) -> int:
        return int(self.parts[0].shape[1])

    def blocks(self, size: int = 1 << 16) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(first id, rows) over everything, in order."""
        for start, part in zip(self.starts.tolist(), self.parts, strict=False):
            for first in range(0, len(part), size):
                yield start + first, part[first : first + size].astype(np.float32)

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, D) of any ids; zeros where an id is negative."""
        found = np.zeros((len(ids), self.width), dtype=np.float32)
        shards = np.searchsorted(self.starts, ids, side="right") - 1
        for shard in np.unique(shards[ids >= 0]).tolist():
            here = (shards == shard) & (ids >= 0)
            found[here] = self.parts[shard][ids[here] - self.starts[shard]]
        return found


class _Pictures(Dataset[tuple[Tensor, bool]]):
    def __init__(self, samples: Samples, first: int, count: int) -> None:
        self.samples, self.first, self.count = samples, first, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[Tensor, bool]:
        size = self.samples.decoding.resolution
        try:
            return torch.from_numpy(np.array(self.samples.load(self.first + row).image)), True
        except DecodeError:
            return torch.zeros(3, size, size, dtype=torch.uint8), False


@torch.no_grad()
def embed_images(evaluator: CLIP, images: Tensor) -> NDArray[np.float32]:
    """uint8 (B, 3, R, R) -> (B, D) of unit length."""
    device = evaluator.log_temperature.device
    return F.normalize(evaluator.embed_images(images.to(device).float() / 127.5 - 1), dim=1).cpu().numpy()


@torch.no_grad()
def embed_texts(evaluator: CLIP, texts: list[str]) -> NDArray[np.float32]:
    """(B, D) of unit length."""
    return F.normalize(evaluator.embed_texts(texts), dim=1).cpu().numpy()


def embed_shards(
    manifest: Manifest, samples: Samples, evaluator: CLIP, folder: Path, batch_size: int, num_workers: int
) -> Embeddings | None:
    """Embeds what is not there yet, with or without a caption; the same command on other machines that share the folder
    takes other shards.

    Returns:
        None while another process is still at some of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    samples = Samples(samples.reader, replace(samples.decoding, caption=None))
    paths = [folder / _name(shard) for shard in manifest.shards]
    waiting = 0
    for number, path in enumerate(paths):
        if path.exists():
            continue
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                if not path.exists():
                    first, count = int(manifest.starts[number]), manifest.shards[number].num_samples
                    pictures = _Pictures(samples, first, count)
                    loader: DataLoader[Any] = DataLoader(pictures, batch_size, num_workers=num_workers)
                    rows = [embed_images(evaluator, images) * good.numpy()[:, None] for images, good in loader]
                    _save(np.concatenate(rows).astype(np.float16), path)
                    _log.info("embedded %s: %d pictures", manifest.shards[number].name, count)
        except Timeout:
            waiting += 1
    if waiting:
        _log.info("%d shards are being embedded by other processes", waiting)
        return None
    return Embeddings(paths, manifest)


def _name(shard: Shard) -> str:
    return f"{hashlib.sha256(shard.name.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}-{shard.digest}.npy"


def _save(rows: NDArray[np.float16], path: Path) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".partial", delete=False) as file:
        try:
            np.save(file, rows, allow_pickle=False)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
