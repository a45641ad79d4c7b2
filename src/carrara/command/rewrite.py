"""What `python shards.py` with do=cache, restore and corrupt share: every shard is written anew, in another folder."""

import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
from filelock import FileLock, Timeout
from webdataset import TarWriter

from carrara.config import Config, build
from carrara.data.decode import DecodeError
from carrara.data.module import ShardData
from carrara.data.reader import Sample, Samples
from carrara.data.shard_index import CAPTION, IMAGE, JSON
from carrara.errors import UserError

Members = dict[str, bytes]  # of a sample, by suffix
Rewrite = Callable[[list[Sample], list[Members]], Iterator[Members]]  # (decoded samples, as they lie there) -> anew

_log = logging.getLogger(__name__)


def source(order: Config) -> ShardData:
    """The shards of the command's `data` node.

    Raises:
        UserError: `out` is missing, or pictures would be cropped, mirrored or sized at random.
    """
    node, do = order["data"], order["do"]
    if order["out"] is None:
        raise UserError(f"out=FOLDER: where the shards of do={do} go")
    if node["flip"] or node["crop"] == "random" or node["bucket_aspect"] != 1:
        raise UserError(f"data.flip, data.crop=random and data.bucket_aspect do not go with do={do}: leave them out")
    data: ShardData = build({key: value for key, value in node.items() if key not in ("make", "root")})
    return data


def rewrite(
    data: ShardData, out: Path, anew: Rewrite, batch_size: int, check_alike: Callable[[Path], None] | None = None
) -> None:
    """Writes a shard into `out` for each of the data's, of its usable samples; those that are there are left.

    The same command on other machines that share the folder takes other shards; one that was interrupted goes on.

    Args:
        anew: what is written of a batch of samples.
        check_alike: raises UserError if a shard that is there was made with something else.
    """
    out.mkdir(parents=True, exist_ok=True)
    skipped: Counter[str] = Counter()
    made = 0
    samples = Samples(data.samples().reader, data.decoding)
    names = [shard.name for shard in data.manifest.shards]
    if len(set(names)) < len(names):
        raise UserError("data.urls: two shards have the same name, and would be one in out")
    for number, shard in enumerate(data.manifest.shards):
        target = out / shard.name
        try:
            with FileLock(out / f".{shard.name}.lock", timeout=0):
                if target.exists():
                    if check_alike is not None:
                        check_alike(target)
                    continue
                ids = np.arange(*data.manifest.starts[number : number + 2])[data.eligible_in(number)]
                _write(target, samples, ids.tolist(), anew, batch_size, skipped)
                made += 1
        except Timeout:
            _log.info("%s is being made by another process", target)
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in (data.reasons + skipped).most_common())
    print(f"{made:,} of {len(names):,} shards made now, in {out}; samples left out: {reasons or 'none'}")


def _write(
    target: Path, samples: Samples, ids: list[int], anew: Rewrite, batch_size: int, skipped: Counter[str]
) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", suffix=".partial", delete=False) as file:
        try:
            _fill(file, samples, ids, anew, batch_size, skipped)
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


def _fill(
    file: IO[bytes], samples: Samples, ids: list[int], anew: Rewrite, batch_size: int, skipped: Counter[str]
) -> None:
    with TarWriter(file, encoder=False, mtime=0) as tar:
        for start in range(0, len(ids), batch_size):
            good: list[tuple[int, Sample]] = []
            for number in ids[start : start + batch_size]:
                try:
                    good.append((number, samples.load(number)))
                except DecodeError as error:
                    skipped[error.reason] += 1
            if not good:
                continue
            decoded = [sample for _, sample in good]
            written = anew(decoded, [_members(samples, number) for number, _ in good])
            for sample, members in zip(decoded, written, strict=True):
                tar.write({"__key__": sample.key.partition("/")[2], **members})


def _members(samples: Samples, number: int) -> Members:
    """The sample's own: picture, caption and JSON."""
    picture = samples.reader.read(number, IMAGE)
    suffix = "png" if picture[:4] == b"\x89PNG" else "webp" if picture[8:12] == b"WEBP" else "jpg"
    found = {suffix: picture}
    caption, facts = samples.reader.read(number, CAPTION), samples.reader.read(number, JSON)
    name = samples.decoding.caption
    if name is not None and name.startswith("."):
        found[name.removeprefix(".")] = caption
    if facts:
        found["json"] = facts
    return found
