"""The fixed samples that scores are computed on."""

import hashlib
import json
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from carrara.data.decode import DecodeError
from carrara.data.loader import collate
from carrara.data.manifest import Manifest
from carrara.data.reader import TRIES, Decoding, Samples
from carrara.data.workers import Batch
from carrara.errors import UserError

_FEW = 64  # shards


def hash_order(manifest: Manifest, eligible: NDArray[np.bool_], count: int | None = None) -> NDArray[np.int64]:
    """The eligible ids by a hash of (shard's name, key): the first `count` are a fixed random choice.

    It depends on neither the folder nor what other shards there are, so a sample keeps its place. Of many shards a
    `count` is taken from as many as hold four times as much, but at least 64: each must be opened for it.
    """
    shards = range(len(manifest.shards)) if count is None else _few(manifest, eligible, 4 * count)
    best = np.empty(0, dtype=np.int64)
    hashes = np.empty(0, dtype=np.uint64)
    starts = manifest.starts.tolist()
    for shard in shards:
        start = starts[shard]
        rows = np.flatnonzero(eligible[start : start + manifest.shards[shard].num_samples])
        keys = manifest.index(shard).keys[rows]
        best = np.concatenate([best, start + rows])
        hashes = np.concatenate([hashes, _hash(keys, manifest.shards[shard].name)])
        if count is not None:
            order = np.argsort(hashes, kind="stable")[:count]
            best, hashes = best[order], hashes[order]
    return best[np.argsort(hashes, kind="stable")]


def _few(manifest: Manifest, eligible: NDArray[np.bool_], count: int) -> list[int]:
    """The shards, by a hash of their names, that hold so many eligible samples; all, or 64 at least."""
    names = [hashlib.sha256(shard.name.encode("utf-8", "surrogateescape")).digest() for shard in manifest.shards]
    order = sorted(range(len(names)), key=names.__getitem__)
    starts = manifest.starts.tolist()
    held = np.cumsum([np.count_nonzero(eligible[starts[shard] : starts[shard + 1]]) for shard in order])
    return sorted(order[: max(_FEW, int(np.searchsorted(held, count)) + 1)])


def _hash(keys: NDArray[np.bytes_], salt: str) -> NDArray[np.uint64]:
    """(n,) 64-bit hashes: a random linear form of the bytes modulo 2^64, then SplitMix64's finaliser."""
    if not len(keys):
        return np.empty(0, dtype=np.uint64)
    letters = keys.view(np.uint8).reshape(len(keys), -1)  # NULs behind shorter keys add nothing
    seed = int.from_bytes(hashlib.sha256(salt.encode("utf-8", "surrogateescape")).digest()[:8], "little")
    factors = np.random.Philox(key=seed).random_raw(letters.shape[1] + 1) | np.uint64(1)
    h = (letters * factors[1:]).sum(axis=1, dtype=np.uint64) + factors[0]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor)
    mixed: NDArray[np.uint64] = h ^ (h >> np.uint64(31))
    return mixed


def split_validation(
    manifest: Manifest, eligible: NDArray[np.bool_], val_samples: int
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """What remains to train on, (N,) bool, and the `val_samples` ids that are validated on.

    Raises UserError if nothing remains to train on.
    """
    usable = int(eligible.sum())
    if val_samples >= usable:
        raise UserError(f"data.val_samples={val_samples} leaves none of {usable} usable samples to train on")
    chosen = hash_order(manifest, eligible, val_samples)
    train = eligible.copy()
    train[chosen] = False
    return train, chosen


class ValidationSet:
    """Validation samples by index, the same in every process; cropped at the centre."""

    def __init__(self, samples: Samples, ids: NDArray[np.int64]) -> None:
        self._samples, self._ids = samples, ids

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def decoding(self) -> Decoding:
        return self._samples.decoding

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the shards' contents as scanned, which samples are taken of them, and how they are decoded."""
        reader, decoding = self._samples.reader, self._samples.decoding
        shards = [[s.name, s.bytes, s.num_samples, s.digest] for s in reader.manifest.shards]
        facts = json.dumps([shards, asdict(decoding)]).encode() + self._ids.tobytes()
        return hashlib.sha256(facts).hexdigest()[:16]

    def batch(self, start: int, stop: int) -> Batch:
        """As the loader's, of the indices start ... stop - 1 (cut at the end); `positions` are indices."""
        return self.take(np.arange(start, min(stop, len(self))))

    def take(self, indices: NDArray[np.int64]) -> Batch:
        """As the loader's, of these indices. What cannot be decoded is replaced by the next that can be."""
        found = []
        for index in indices.tolist():
            following = self._ids.take(range(index + 1, index + 1 + TRIES), mode="wrap").tolist()
            sample, skipped = self._samples.load_or_substitute(int(self._ids[index]), following.__getitem__)
            found.append({"__key__": sample.key, "image": sample.image, "caption": sample.caption, "skipped": skipped})
        return collate(found, torch.from_numpy(np.asarray(indices, dtype=np.int64)))

    def captions(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Captions alone, no image decoded."""
        return [self._samples.caption(sample) for sample in self._ids[start:stop].tolist()]

    def metadata(self, index: int) -> dict[str, Any]:
        """The sample's JSON, empty if there is none."""
        try:
            facts = json.loads(self._samples.facts(int(self._ids[index])))
        except (ValueError, RecursionError, DecodeError):  # it may come from anyone
            return {}
        return facts if isinstance(facts, dict) else {}

    @property
    def held_out(self) -> NDArray[np.int64]:
        """Of `splits`.

        Raises:
            UserError: there are none.
        """
        if "held_out" not in self.splits:
            raise UserError(
                f'all {len(self)} samples to validate on are "split": "seen" by their JSON: score on others '
                "(data.val_urls)"
            )
        return self.splits["held_out"]

    @cached_property
    def splits(self) -> dict[str, NDArray[np.int64]]:
        """Indices by the JSON's "split": `seen`, or `held_out`, which is all that does not say so; none is empty."""
        seen = np.array([self.metadata(index).get("split") == "seen" for index in range(len(self))])
        parts = {"held_out": np.flatnonzero(~seen), "seen": np.flatnonzero(seen)}
        return {name: indices for name, indices in parts.items() if len(indices)}
