"""What is in the shards: their indexes, made once and kept."""

import hashlib
import json
import logging
import multiprocessing
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from carrara.data.cache import ShardCache, is_remote, size_of
from carrara.data.shard_index import CAPTION, IMAGE_SUFFIXES, ShardIndex, scan, scan_file
from carrara.errors import MachineError, UserError

_log = logging.getLogger(__name__)

_VERSION = 6  # of the index files; another number makes them anew
_SERIAL = 4  # up to so many shards are scanned without other processes


@dataclass(frozen=True)
class Shard:
    """What is kept in memory of a shard, whatever its size."""

    path: str  # or address
    name: str
    bytes: int
    mtime_ns: int | None  # None of a remote one
    sha256: str  # of a remote one
    cached: str  # facts of its cache
    index_path: str
    num_samples: int
    digest: str  # of keys, offsets, sizes and the index's `ends`: the shard's content as far as a scan sees it
    problems: dict[str, int]  # reason -> count


@dataclass(frozen=True)
class Manifest:
    """The shards in order. A sample's id counts through them; shard s begins with id starts[s]."""

    shards: tuple[Shard, ...]

    @property
    def starts(self) -> NDArray[np.int64]:
        """(S + 1,) first id of each shard, and the number of samples."""
        return np.concatenate([[0], np.cumsum([shard.num_samples for shard in self.shards], dtype=np.int64)])

    def __len__(self) -> int:
        return sum(shard.num_samples for shard in self.shards)

    def index(self, shard: int) -> ShardIndex:
        return ShardIndex.load(self.shards[shard].index_path)

    @classmethod
    def load(
        cls, paths: Sequence[str], cache_dir: str | Path, caption: str | None = ".txt", pictures: bool = False
    ) -> "Manifest":
        """Of local shards, scanned where they are new, and of remote ones that were; see `scan_all`.

        Raises UserError naming the shard that is no tar, has no image, or (with `caption`) no caption; or the command
        that scans the remote ones.
        """
        found = scan_all(paths, cache_dir, caption, pictures=pictures)
        absent = [path for path, shard in zip(paths, found, strict=True) if shard is None]
        if absent:
            some = [size for url in absent[:4] if (size := size_of(url)) is not None]
            amount = f", about {len(absent) * sum(some) / len(some) / 1e9:,.2f} GB," if some else ""
            count = f"{len(absent):,} of {len(paths):,}"
            raise UserError(
                f"{count} shards are remote and not known yet ({absent[0]}): python shards.py "
                f"do=inspect with the same data.… reads them{amount} once, and can be stopped and started again"
            )
        shards = []
        for shard in found:
            if isinstance(shard, UserError):
                raise shard
            assert shard is not None
            shards.append(shard)
        return cls(tuple(shards))


Scanned = Shard | UserError | None  # why a shard cannot be used; None of a remote one that is not known yet


def scan_all(
    paths: Sequence[str],
    cache_dir: str | Path,
    caption: str | None = ".txt",
    cache: ShardCache | None = None,
    pictures: bool = False,
) -> list[Scanned]:
    """Scan shards, several at once; what is unchanged since last time is taken from `cache_dir`.

    Remote ones are fetched only with a `cache`, and once they are known never looked at again: their `pictures` have
    their sizes in the index always.
    """
    folder = Path(cache_dir) / "index"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.cache_dir: cannot make {folder}: {error.strerror}") from None
    found = {path: _known(path, folder, caption, pictures) for path in paths}
    missing = [path for path, shard in found.items() if shard is None and (cache is not None or not is_remote(path))]
    processes = min(len(os.sched_getaffinity(0)), len(missing))
    scan_one = partial(_scanned, folder=folder, caption=caption, cache=cache, pictures=pictures)
    if len(missing) > _SERIAL and processes > 1:
        # fork: spawn would import the caller's main module again. The children touch files and numpy only
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
            scanned = list(pool.map(scan_one, missing))
    else:
        scanned = list(map(scan_one, missing))
    found |= dict(zip(missing, scanned, strict=True))
    return [found[path] for path in paths]


def _index_path(path: str, status: os.stat_result | None, folder: Path, caption: str | None, pictures: bool) -> Path:
    version = [path] if status is None else [os.path.realpath(path), status.st_size, status.st_mtime_ns, pictures]
    content = json.dumps([_VERSION, *version, caption])
    return folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}.npz"


def _known(path: str, folder: Path, caption: str | None, pictures: bool) -> Scanned:
    """The shard by its index on disk; None if there is none, or a damaged one."""
    try:
        status = None if is_remote(path) else os.stat(path)
        place = _index_path(path, status, folder, caption, pictures)
        index = ShardIndex.load(place)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None
    return _shard(path, status, place, index, caption)


def _scanned(
    path: str, folder: Path, caption: str | None, cache: ShardCache | None, pictures: bool
) -> Shard | UserError:
    try:
        if cache is not None and is_remote(path):
            with cache.open(path) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                index = scan_file(file, path, caption, pictures=True)
                index = replace(index, bytes=os.fstat(file.fileno()).st_size, sha256=digest)
            status = None
        else:
            status, index = os.stat(path), scan(path, caption, pictures)
    except OSError as error:
        return UserError(f"cannot read the shard {path}: {error.strerror}")
    except UserError as mistake:
        if cache is not None and is_remote(path):
            cache.forget(path)
        return mistake
    place = _index_path(path, status, folder, caption, pictures)
    try:
        index.save(place)
    except OSError as error:
        raise MachineError(f"data.cache_dir: cannot write {place}: {error.strerror}") from None
    return _shard(path, status, place, index, caption)


def _shard(
    path: str, status: os.stat_result | None, place: Path, index: ShardIndex, caption: str | None
) -> Shard | UserError:
    if not len(index.keys):
        return UserError(f"{path} holds no image ({', '.join(IMAGE_SUFFIXES)}); remove it from data.urls")
    if caption is not None and not (index.members[:, CAPTION, 1] >= 0).any():
        return UserError(f"{path} holds no image with a caption ({caption}); set data.caption, or null for none")
    return Shard(
        path=path,
        name=os.path.basename(path.partition("?")[0]) if status is None else os.path.basename(path),
        bytes=index.bytes if status is None else status.st_size,
        mtime_ns=None if status is None else status.st_mtime_ns,
        sha256=index.sha256,
        cached=index.cached,
        index_path=str(place),
        num_samples=len(index.keys),
        digest=hashlib.sha256(index.keys.tobytes() + index.members.tobytes() + b"%d" % index.ends).hexdigest()[:16],
        problems=dict(Counter(problem.reason for problem in index.problems)),
    )
