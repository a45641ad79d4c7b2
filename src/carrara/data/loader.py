"""Micro-batches in the stream's order, whatever the number of ranks and workers."""

import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info
from webdataset import DataPipeline

from carrara.data.buckets import BucketedStream
from carrara.data.cached import Cached
from carrara.data.order import Stream, uniforms
from carrara.data.reader import Samples, ShardReader
from carrara.data.workers import Batch, start
from carrara.errors import UserError

AnyStream = Stream | BucketedStream
Stage = Callable[[Iterable[dict[str, Any]]], Iterable[dict[str, Any]]]

_SLIDING = 2000  # samples over which failures are counted
_ENOUGH = 100  # before so many, no share is judged
_AHEAD = 1000  # samples that a stage may hold back, beyond a micro-batch


@dataclass(frozen=True)
class Share:
    """Which positions of the stream are one rank's: of every global batch a slice, cut into `accumulate`
    micro-batches.

    Micro-batch m (counted from the start of the stream) belongs to global batch m // accumulate.
    """

    global_batch: int
    rank: int = 0
    world: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.global_batch < 1 or self.global_batch % (self.world * self.accumulate):
            raise UserError(
                f"trainer.batch_size={self.global_batch} cannot be cut into {self.world} ranks × "
                f"{self.accumulate} micro-batches; make it a multiple of {self.world * self.accumulate}"
            )

    @property
    def size(self) -> int:
        """Samples in a micro-batch."""
        return self.global_batch // (self.world * self.accumulate)

    def start(self, m: int) -> int:
        """Position of the first sample of micro-batch m."""
        k, a = divmod(m, self.accumulate)
        return k * self.global_batch + (self.rank * self.accumulate + a) * self.size


class OrderedSource:
    """First stage, endless: {position, sample (its id), u (uniforms), size}; worker w has micro-batches w + i·W."""

    def __init__(self, stream: AnyStream, share: Share, first: int, reader: ShardReader) -> None:
        """`reader` is told which shards come next."""
        self.stream, self.share, self.first, self.reader = stream, share, first, reader
        self.held = 0  # samples handed out and not yet in a micro-batch

    def __call__(self) -> Iterator[dict[str, Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        for m in itertools.count(self.first + worker, workers):
            start = self.share.start(m)
            ids = self.stream.take(start, start + self.share.size)
            draws = uniforms(self.stream.seed, start, self.share.size)
            self.reader.prefetch(self.stream.ahead(start, start + self.share.size))
            size = self.stream.size(start) if isinstance(self.stream, BucketedStream) else None
            for position, sample, u in zip(itertools.count(start), ids.tolist(), draws.tolist(), strict=False):
                self.held += 1
                yield {"position": position, "sample": sample, "u": u, "size": size}
            if self.held > _AHEAD + self.share.size:
                raise UserError(f"a stage of data.stages holds back {self.held} samples; it must yield each one")


class Decode:
    """Second stage: {position, __key__, image uint8 (3, H, W), caption, skipped (reason -> count)}."""

    def __init__(self, samples: Samples, stream: AnyStream) -> None:
        self.samples, self.stream = samples, stream

    def __call__(self, source: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for item in source:
            position = item["position"]
            sample, skipped = self.samples.load_or_substitute(
                item["sample"], partial(self.stream.substitute, position), item["u"], item["size"]
            )
            yield {
                "position": position,
                "__key__": sample.key,
                "image": sample.image,
                "caption": sample.caption,
                "cached": sample.cached,
                "skipped": skipped,
            }


class MicroBatches:
    """Last stage: whole micro-batches. UserError if the samples are not those of the source, in order."""

    def __init__(self, source: OrderedSource) -> None:
        self.source = source

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[Batch]:
        size = self.source.share.size
        iterator = iter(samples)
        while chunk := list(itertools.islice(iterator, size)):
            positions = torch.tensor([sample["position"] for sample in chunk])
            first = int(positions[0])
            if first % size or not torch.equal(positions, torch.arange(first, first + size)):
                raise UserError("a stage of data.stages drops or reorders samples; it must yield each in order")
            self.source.held -= size
            yield collate(chunk, positions)


def collate(samples: Sequence[dict[str, Any]], positions: torch.Tensor) -> Batch:
    """images uint8 (B, 3, H, W), captions, positions int64 (B,), keys, skipped (reason -> count).

    Of samples whose cache is used, instead of images latent_mean and latent_std (B, C, h, w), and tokens (B, L, D),
    their mask and pooled (B, P) if the text was asked for; all float32.
    """
    contents = {"images": torch.from_numpy(np.stack([sample["image"] for sample in samples]))}
    if samples[0].get("cached") is not None:
        contents = _collate_cached([sample["cached"] for sample in samples])
    return {
        **contents,
        "captions": [sample["caption"] for sample in samples],
        "positions": positions,
        "keys": [sample["__key__"] for sample in samples],
        "skipped": dict(sum((sample["skipped"] for sample in samples), Counter[str]())),
    }


def _collate_cached(caches: Sequence[Cached]) -> dict[str, torch.Tensor]:
    stacked = {
        f"latent_{name}": torch.from_numpy(np.stack([getattr(cached, name) for cached in caches]))
        for name in ("mean", "std")
    }
    if caches[0].tokens is None:
        return stacked
    tokens = [torch.from_numpy(cached.tokens) for cached in caches if cached.tokens is not None]
    return stacked | {
        "tokens": pad_sequence(tokens, batch_first=True),
        "mask": pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in tokens], batch_first=True),
        "pooled": torch.from_numpy(np.stack([cached.pooled for cached in caches if cached.pooled is not None])),
    }


class Loader:
    """One rank's micro-batches from `start_position` on; an iteration ends where an epoch of
    `steps_per_epoch` does.

    The next iteration goes on from there (after a `break`, from the next micro-batch), with the same workers.
    Started within an epoch, the first iteration is the rest of it. `len` is that of a whole epoch.

    A batch holds images uint8 (B, 3, H, W), captions, positions int64 (B,), keys ("shard/key") and skipped:
    how many samples of what reason were replaced. UserError if more than `max_bad_fraction` of the last 2000
    must be.
    """

    def __init__(
        self,
        samples: Samples,
        stream: AnyStream,
        share: Share,
        steps_per_epoch: int,
        *,
        start_position: int = 0,
        num_workers: int = 0,
        stages: Sequence[Stage] = (),
        max_bad_fraction: float = 0.1,
        start_method: str | None = None,
    ) -> None:
        """`stages` go between decoding and batching, see `Decode` for what they get; each sample must come
        through.

        Raises UserError for a batch that cannot be cut and a position within a global batch.
        """
        if start_position % share.global_batch:
            raise UserError(
                f"the stream's position {start_position} is no multiple of "
                f"trainer.batch_size={share.global_batch}; resume with the batch size the run began with"
            )
        self.samples, self.stream, self.share, self.steps_per_epoch = samples, stream, share, steps_per_epoch
        self.num_workers, self.stages, self.start_method = num_workers, stages, start_method
        self.max_bad_fraction = max_bad_fraction
        self._given = start_position // share.global_batch * share.accumulate
        self._batches: Iterator[Batch] | None = None
        self._recent: deque[tuple[int, int]] = deque()  # (failures, samples) of micro-batches

    def __len__(self) -> int:
        return self.steps_per_epoch * self.share.accumulate

    @property
    def position(self) -> int:
        """Samples of the stream that all ranks' whole global batches given out so far have used."""
        return self._given // self.share.accumulate * self.share.global_batch

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(len(self) - self._given % len(self)):
            if self._batches is None:
                self._batches = start(self.pipeline(), self.num_workers, self.start_method)
            batch = next(self._batches, None)
            if batch is None:
                raise UserError("a stage of data.stages came to an end; it must go on as long as it is given samples")
            self._judge(batch)
            self._given += 1
            yield batch

    def close(self) -> None:
        """End the workers; iteration starts new ones where it stands."""
        self._batches = None

    def pipeline(self) -> DataPipeline:
        """The whole of it, from the next micro-batch on, as a worker runs it."""
        source = OrderedSource(self.stream, self.share, self._given, self.samples.reader)
        return DataPipeline(source, Decode(self.samples, self.stream), *self.stages, MicroBatches(source))

    def _judge(self, batch: Batch) -> None:
        bad = sum(batch["skipped"].values())
        self._recent.append((bad, bad + len(batch["positions"])))
        failures, tried = (sum(column) for column in zip(*self._recent, strict=True))
        if tried >= _ENOUGH and failures > self.max_bad_fraction * tried:
            raise UserError(
                f"{failures} of the last {tried} samples cannot be decoded (here: {batch['skipped']}), more "
                f"than data.max_bad_fraction={self.max_bad_fraction:g}; check the shards, or raise it"
            )
        while tried - self._recent[0][1] >= _SLIDING:
            tried -= self._recent.popleft()[1]
