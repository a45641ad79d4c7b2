"""`ShardData`: all that training asks of a data set."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from carrara.data.buckets import BucketedStream, bucket_sizes, nearest_bucket
from carrara.data.cache import ShardCache
from carrara.data.cached import decoded_bytes
from carrara.data.decode import Crop
from carrara.data.eligibility import eligible
from carrara.data.loader import Loader, Share, Stage
from carrara.data.manifest import Manifest
from carrara.data.order import Stream
from carrara.data.reader import Decoding, Samples, ShardReader, Use
from carrara.data.source import expand, unpacked
from carrara.data.validation import ValidationSet, hash_order, split_validation
from carrara.errors import UserError

_log = logging.getLogger(__name__)
_CAPTION_SHARDS = 64  # are enough for a vocabulary, and a remote set is not fetched for it

Check = Callable[[Sequence[str], Tensor], Sequence[Mapping[str, bool | None]]]  # (captions, uint8 images) -> answers


class ShardData:
    """Image–caption shards: a training stream and a validation set. Building it scans what is new."""

    def __init__(
        self,
        name: str,
        urls: str | Sequence[str],
        resolution: int,
        *,
        cache_dir: str,
        seed: int = 0,
        root: str | None = None,
        make: Callable[[str], object] | None = None,
        val_urls: str | Sequence[str] | None = None,
        val_samples: int | None = None,
        caption: str | None = ".txt",
        filters: Mapping[str, float | None] | None = None,
        crop: Crop = "center",
        flip: bool = False,
        max_pixels: int = 64_000_000,
        shuffle_window: int = 16,
        groups: int = 1,
        bucket_aspect: float = 1.0,
        bucket_multiple: int = 64,
        num_workers: int = 0,
        use_cache: bool = True,
        memory_limit: float = 512e6,
        max_bad_fraction: float = 0.1,
        cache_bytes: float = 100e9,
        stages: Sequence[Stage] = (),
        prompt_check: Check | None = None,
    ) -> None:
        """
        Args:
            name: what runs on this data are called by.
            urls, val_urls: shards, see `source.expand`. Without val_urls, validation takes samples from training.
            resolution: R; pictures are R × R.
            cache_dir: for indexes and for copies of remote shards.
            seed: of order, crops and flips.
            root, make: `make(root)` writes the shards first, or finds them there.
            val_samples: how many; default all of val_urls, else one in 20, from 2, which scores need, to 5000.
            caption: suffix of the caption's member, or a key of the JSON, or null for none.
            filters: see `eligibility.FILTERS`.
            crop, flip, max_pixels: see `decode.decode_image`; flip mirrors every second sample.
            shuffle_window, groups: see `order.Stream`.
            bucket_aspect, bucket_multiple: see `buckets.bucket_sizes`; validation is of squares always.
            num_workers: processes that decode, for each rank.
            use_cache: whether what shards.py do=cache wrote is trained on, where it fits the run.
            memory_limit: bytes; a set that needs no more when decoded is kept in memory (of each rank), and no
                workers are started. Not with crop=random.
            cache_bytes: copies of remote shards are kept up to so many.
            max_bad_fraction: more samples that cannot be decoded stop the run.
            stages: between decoding and batching, see `loader.Decode`.
            prompt_check: says whether a picture shows what its caption says, where that is a fact.
        """
        if make is not None and root is not None:
            make(root)
        for key, value, least in (
            ("val_samples", val_samples, 1),
            ("num_workers", num_workers, 0),
            ("resolution", resolution, 1),
            ("max_pixels", max_pixels, 1),
        ):
            if value is not None and (type(value) is not int or value < least):
                raise UserError(f"data.{key} must be a whole number from {least} on, not {value!r}")
        if not 0 <= max_bad_fraction <= 1:
            raise UserError(f"data.max_bad_fraction={max_bad_fraction} is a share, from 0 to 1")
        self.name, self.seed = name, seed
        self.prompt_check = prompt_check
        self.num_workers, self.window, self.groups = num_workers, shuffle_window, groups
        self.max_bad_fraction, self.stages = max_bad_fraction, stages
        self.use_cache = use_cache
        self.filters = {key: value for key, value in (filters or {}).items() if value is not None}
        self.decoding = Decoding(resolution, caption, crop, flip, max_pixels)
        self.sizes = bucket_sizes(resolution, bucket_aspect, bucket_multiple)

        self.manifest = Manifest.load(unpacked(expand(urls), cache_dir), cache_dir, caption, len(self.sizes) > 1)
        self.eligible, self.reasons = eligible(self.manifest, caption, filters or {})
        if val_urls is None:
            count = min(5000, max(2, int(self.eligible.sum()) // 20)) if val_samples is None else val_samples
            self.val_manifest = self.manifest
            self.train, val_ids = split_validation(self.manifest, self.eligible, count)
        else:
            val_paths = unpacked(expand(val_urls, "data.val_urls"), cache_dir)
            self.val_manifest = Manifest.load(val_paths, cache_dir, caption)
            val_eligible, _ = eligible(self.val_manifest, caption, filters or {})
            self.train, val_ids = self.eligible, hash_order(self.val_manifest, val_eligible, val_samples)

        open_shards = min(256, 2 * shuffle_window)
        cache = ShardCache(cache_dir, cache_bytes)
        self.num_train = int(self.train.sum())
        self.memory_limit = memory_limit
        self.in_memory = self._fits(self.num_train, 3 * resolution**2) and crop != "random"
        self._samples = Samples(ShardReader(self.manifest, open_shards, cache), self.decoding, keep=self.in_memory)
        as_scored = Decoding(resolution, caption, "none" if crop == "none" else "center", max_pixels=max_pixels)
        val_reader = ShardReader(self.val_manifest, open_shards, cache)
        self.validation = ValidationSet(
            Samples(val_reader, as_scored, keep=self._fits(len(val_ids), 3 * resolution**2)), val_ids
        )

    def _fits(self, count: int, each: int) -> bool:
        """Whether so many samples of so many bytes are kept in memory."""
        return count * each <= self.memory_limit

    def train_loader(
        self,
        global_batch: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        steps_per_epoch: int | None = None,
        position: int = 0,
        use: Use = "pictures",
    ) -> Loader:
        """This rank's micro-batches from `position` (samples consumed by all ranks) on; see `Loader`.

        `use`: pictures, or their cache. Without `steps_per_epoch` an epoch is the whole global batches that the
        training samples fill, or one.
        """
        ordering = (self.manifest.starts, self.seed, self.window, self.groups, global_batch)
        stream: Stream | BucketedStream
        if len(self.sizes) == 1:
            stream = Stream(self.train, *ordering)
        else:
            stream = BucketedStream(self.train, self._buckets, self.sizes, *ordering)
        samples = self._samples
        if use != "pictures":
            assert self.cached is not None
            keep = self._fits(self.num_train, decoded_bytes(self.cached, use == "latents_and_text"))
            samples = Samples(samples.reader, self.decoding, keep, use)
        return Loader(
            samples,
            stream,
            Share(global_batch, rank, world, accumulate),
            steps_per_epoch or max(1, self.num_train // global_batch),
            start_position=position,
            num_workers=0 if samples.keep else self.num_workers,
            stages=self.stages,
            max_bad_fraction=self.max_bad_fraction,
        )

    @cached_property
    def cached(self) -> dict[str, Any] | None:
        """What the training shards' cache was made with; None if there is none, or it is not to be used.

        Raises UserError: they were not made alike.
        """
        shards = self.manifest.shards
        other = next((shard for shard in shards if shard.cached != shards[0].cached), None)
        if not self.use_cache or (other is None and not shards[0].cached):
            return None
        if other is not None:
            raise UserError(
                f"the caches of {shards[0].path} and {other.path} were not made alike; make them again with shards.py "
                "do=cache, or set data.use_cache=false"
            )
        found: dict[str, Any] = json.loads(shards[0].cached)
        return found

    def eligible_in(self, shard: int) -> NDArray[np.bool_]:
        """Of a shard's samples those that can be trained or validated on."""
        start, stop = self.manifest.starts[shard : shard + 2].tolist()
        return self.eligible[start:stop]

    def samples(self) -> Samples:
        """All of them by id, each decoded as it is for scores: whole, or the square at its centre."""
        return Samples(self._samples.reader, self.validation.decoding)

    @cached_property
    def _buckets(self) -> NDArray[np.int64]:
        indexes = map(self.manifest.index, range(len(self.manifest.shards)))
        return np.concatenate([nearest_bucket(index.pictures.astype(np.int64), self.sizes) for index in indexes])

    def captions(self, limit: int | None = None) -> Iterator[str]:
        """Captions of training samples, of 64 shards at most, in their order; of more than `limit`, evenly spread."""
        train = self.train.copy()
        starts = self.manifest.starts.tolist()
        kept = set(spread(len(self.manifest.shards), _CAPTION_SHARDS).tolist())
        for shard, (start, stop) in enumerate(pairwise(starts)):
            train[start:stop] &= shard in kept
        ids = np.flatnonzero(train)
        if limit is not None and limit < len(ids):
            ids = ids[spread(len(ids), limit)]
        return map(self._samples.caption, ids.tolist())

    def every_caption(self) -> Iterator[str]:
        """Captions of all samples of training, then of validation; all shards are read for them, remote ones, too."""
        yield from map(self._samples.caption, np.flatnonzero(self.train).tolist())
        yield from self.validation.captions()

    @property
    def fingerprint(self) -> str:
        """Hash of what is trained on: the shards' contents as scanned, filters, split and decoding.

        It does not depend on the folder, the seed or how the shards are read.
        """

        def content(manifest: Manifest) -> list[list[str | int]]:
            return sorted([shard.name, shard.bytes, shard.num_samples, shard.digest] for shard in manifest.shards)

        decoding = self.decoding
        facts = {
            "shards": content(self.manifest),
            "eligible": int(self.eligible.sum()),
            "train": self.num_train,
            "val_shards": content(self.val_manifest),
            "val": len(self.validation),
            "filters": dict(sorted(self.filters.items())),
            "decoding": [
                decoding.resolution,
                decoding.caption,
                decoding.crop,
                decoding.flip,
                decoding.max_pixels,
                *(self.sizes if len(self.sizes) > 1 else ()),
            ],
        }
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    def report(self) -> list[str]:
        """Short lines on what was found and what is left out."""
        shards = self.manifest.shards
        size = sum(shard.bytes for shard in shards)
        lines = [
            f"{self.name}: {len(shards)} shards, {size / 1e6:,.1f} MB, {len(self.manifest):,} samples",
            f"{self.num_train:,} to train on, {len(self.validation):,} to validate on"
            + (", kept in memory" if self.in_memory else ""),
        ]
        problems: Counter[str] = Counter()
        for shard in shards:
            problems.update(shard.problems)
        for title, counts in (("left out", self.reasons), ("damaged", problems)):
            if counts:
                lines.append(f"{title}: " + ", ".join(f"{reason} {n:,}" for reason, n in counts.most_common()))
        return lines


def spread(count: int, limit: int) -> NDArray[np.int64]:
    """Up to `limit` of the numbers 0 … count − 1, evenly spread."""
    return np.arange(count) if count <= limit else np.arange(limit) * count // limit
