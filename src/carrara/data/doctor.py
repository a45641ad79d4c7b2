"""What is wrong with shards: every sample read as training would, and accounted for."""

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from carrara.data.cache import ShardCache
from carrara.data.decode import DecodeError
from carrara.data.eligibility import judge
from carrara.data.manifest import Manifest, Shard, scan_all
from carrara.data.reader import Decoding, Samples, ShardReader
from carrara.errors import UserError

_EXAMPLES = 5  # keys told of each reason


@dataclass
class ShardHealth:
    """One shard. `samples` are all keys that have a picture, a caption or a JSON: ok + the sum of `skipped`.

    Attributes:
        unusable: why nothing of the shard can be read; "" if it can.
        skipped: reason -> samples; of several reasons the first.
        archive: what is wrong with the tar and its members -> how often; it need not cost a sample.
        examples: reason -> some keys, or places in the tar.
    """

    path: str
    unusable: str = ""
    samples: int = 0
    ok: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    archive: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Health:
    """All shards."""

    shards: list[ShardHealth]
    repeated_keys: int  # that occur in more than one shard; they are told apart here

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def skipped(self) -> Counter[str]:
        return sum((Counter(shard.skipped) for shard in self.shards), Counter())

    @property
    def archive(self) -> Counter[str]:
        return sum((Counter(shard.archive) for shard in self.shards), Counter())

    def exceeds(self, max_bad_fraction: float) -> bool:
        """Whether a shard is unusable, or more samples than that are skipped."""
        unusable = any(shard.unusable for shard in self.shards)
        return unusable or self.skipped.total() > max_bad_fraction * self.samples

    def as_json(self) -> str:
        """Everything, for programs."""
        totals = {
            "samples": self.samples,
            "ok": sum(shard.ok for shard in self.shards),
            "skipped": dict(self.skipped),
            "archive": dict(self.archive),
            "repeated_keys": self.repeated_keys,
            "unusable_shards": sum(bool(shard.unusable) for shard in self.shards),
        }
        return json.dumps({**totals, "shards": [asdict(shard) for shard in self.shards]}, indent=1)

    def lines(self) -> Iterator[str]:
        """For people: the shards with something wrong, and the sum."""
        for shard in self.shards:
            wrong = {**shard.skipped, **shard.archive}
            if shard.unusable:
                yield f"{shard.path}: {shard.unusable}"
            elif wrong:
                told = (f"{reason} {n:,} ({', '.join(shard.examples[reason])})" for reason, n in wrong.items())
                yield f"{shard.path}: {shard.ok:,} of {shard.samples:,} samples can be used; {'; '.join(told)}"
        skipped = ", ".join(f"{reason} {n:,}" for reason, n in self.skipped.most_common()) or "none"
        usable = self.samples - self.skipped.total()
        counts = f"{len(self.shards):,} shards, {self.samples:,} samples"
        yield f"{counts} = {usable:,} that can be used + skipped: {skipped}"
        if self.repeated_keys:
            yield f"{self.repeated_keys:,} keys occur in more than one shard, and are told apart by the shard's name"


def examine(
    paths: Sequence[str],
    cache_dir: str | Path,
    cache: ShardCache,
    decoding: Decoding,
    filters: Mapping[str, float | None],
    processes: int | None = None,
) -> Health:
    """The health of shards, every eligible sample decoded, in so many `processes` (default: one a core)."""
    scanned = scan_all(paths, cache_dir, decoding.caption, cache)
    manifest = Manifest(tuple(shard for shard in scanned if isinstance(shard, Shard)))
    work = enumerate(judge(manifest, decoding.caption, filters)) if manifest.shards else iter(())
    found = _decode_all(manifest, cache, decoding, work, processes)
    usable = iter([found[number] for number in range(len(manifest.shards))])
    shards = [
        ShardHealth(path, unusable=str(shard)) if isinstance(shard, UserError) else next(usable)
        for path, shard in zip(paths, scanned, strict=True)
    ]
    return Health(shards, _repeated(manifest))


Work = tuple[int, NDArray[np.str_]]  # a shard, and why its samples are left out before they are decoded


_examine: Callable[[Work], ShardHealth]  # in a child process


def _decode_all(
    manifest: Manifest, cache: ShardCache, decoding: Decoding, work: Iterator[Work], processes: int | None
) -> dict[int, ShardHealth]:
    """By shard. What a library crashes on costs its shard, and no other: each is read in a child process."""
    one = partial(_examine_one, manifest, cache, decoding)
    count = min(processes or len(os.sched_getaffinity(0)), max(1, len(manifest.shards)))
    found: dict[int, ShardHealth] = {}
    item = next(work, None)
    while item is not None:
        running: dict[Future[ShardHealth], Work] = {}
        try:
            with _children(count, one) as pool:
                while item is not None or running:
                    while item is not None and len(running) < count:  # no more: these are looked at anew after a crash
                        running[pool.submit(_examine_here, item)] = item
                        item = next(work, None)
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        found[running[future][0]] = future.result()
                        del running[future]
        except BrokenProcessPool:
            for suspect in running.values():
                found[suspect[0]] = _examine_alone(one, manifest, suspect)
    return found


def _children(count: int, one: Callable[[Work], ShardHealth]) -> ProcessPoolExecutor:
    # fork, as in `manifest`: what a child begins with is there, and not sent with every shard
    return ProcessPoolExecutor(count, multiprocessing.get_context("fork"), _begin, (one,))


def _begin(one: Callable[[Work], ShardHealth]) -> None:
    global _examine
    _examine = one


def _examine_here(item: Work) -> ShardHealth:
    return _examine(item)


def _examine_alone(one: Callable[[Work], ShardHealth], manifest: Manifest, item: Work) -> ShardHealth:
    try:
        with _children(1, one) as pool:
            return pool.submit(_examine_here, item).result()
    except BrokenProcessPool:
        path = manifest.shards[item[0]].path
        return ShardHealth(path, unusable="a decoder crashed on it (or was out of memory)")


def _examine_one(manifest: Manifest, cache: ShardCache, decoding: Decoding, item: Work) -> ShardHealth:
    number, why = item
    shard, index = manifest.shards[number], manifest.index(number)
    samples = Samples(ShardReader(manifest, 1, cache), decoding)
    first = int(manifest.starts[number])
    skipped: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}

    def skip(reason: str, key: str) -> None:
        skipped[reason] += 1
        note(reason, key)

    def note(reason: str, place: str) -> None:
        if len(examples.setdefault(reason, [])) < _EXAMPLES:
            examples[reason].append(place.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))

    archive: Counter[str] = Counter()
    for problem in index.problems:
        if problem.reason == "no_image":  # keys without one are not in the index, and are samples all the same
            skip(problem.reason, problem.place)
        else:
            archive[problem.reason] += 1
            note(problem.reason, problem.place)
    for row, reason in enumerate(why.tolist()):
        key = bytes(index.keys[row]).decode("utf-8", "replace")
        if not reason:
            try:
                samples.load(first + row)
            except DecodeError as error:
                reason = error.reason
        if reason:
            skip(reason, key)
    total = len(why) + skipped["no_image"]
    return ShardHealth(shard.path, "", total, total - skipped.total(), dict(skipped), dict(archive), examples)


def _repeated(manifest: Manifest) -> int:
    """Keys that are in more than one shard. (A key occurs once in an index.)"""
    if not manifest.shards:
        return 0
    hashes = [
        np.fromiter((hash(key) for key in manifest.index(number).keys.tolist()), np.int64)
        for number in range(len(manifest.shards))
    ]
    _, counts = np.unique(np.concatenate(hashes), return_counts=True)
    return int((counts > 1).sum())
