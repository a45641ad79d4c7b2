"""What `python shards.py` with do=cache, restore and corrupt share: every shard is written anew, in another folder."""

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from webdataset import TarWriter

from carrara.config import Config, build
from carrara.data.cached import Facts
from carrara.data.decode import DecodeError
from carrara.data.manifest import Shard
from carrara.data.module import ShardData
from carrara.data.reader import Decoding, Sample, Samples
from carrara.data.shard_index import CAPTION, IMAGE, JSON
from carrara.data.tar_walk import walk
from carrara.errors import UserError
from carrara.run_folder import made_folder

Members = dict[str, bytes]  # of a sample, by suffix
Rewrite = Callable[[list[Sample], list[Members]], Iterator[Members]]  # (decoded samples, as they lie there) -> anew

_log = logging.getLogger(__name__)
_MADE_OF = "__made_of__/shard"  # the first member's key; `webdataset` passes over what stands in __…__, as we do
_LONGEST = 1 << 16  # bytes in which it lies


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


def rewrite(data: ShardData, out: Path, anew: Rewrite, batch_size: int, facts: Facts) -> None:
    """Writes a shard into `out` for each of the data's, of its usable samples; those made of the same are left.

    The same command on other machines that share the folder takes other shards; one that was interrupted goes on.

    Args:
        anew: what is written of a batch of samples.
        facts: what that depends on besides the sample.

    Raises:
        UserError: a shard lies in `out` that was made with something else.
    """
    made_folder(out)
    skipped: Counter[str] = Counter()
    made = 0
    samples = Samples(data.samples().reader, data.decoding)
    names = [shard.name for shard in data.manifest.shards]
    if len(set(names)) < len(names):
        raise UserError("data.urls: two shards have the same name, and would be one in out")
    for number, shard in enumerate(data.manifest.shards):
        target, eligible = out / shard.name, data.eligible_in(number)
        made_of = _made_of(shard, eligible, data.decoding, facts)
        try:
            with FileLock(out / f".{shard.name}.lock", timeout=0):
                if target.exists():
                    _check_alike(target, made_of)
                    continue
                ids = np.arange(*data.manifest.starts[number : number + 2])[eligible]
                _write(target, made_of, samples, ids.tolist(), anew, batch_size, skipped)
                made += 1
        except Timeout:
            _log.info("%s is being made by another process", target)
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in (data.reasons + skipped).most_common())
    print(f"{made:,} of {len(names):,} shards made now, in {out}; samples left out: {reasons or 'none'}")


def _write(
    target: Path,
    made_of: Facts,
    samples: Samples,
    ids: list[int],
    anew: Rewrite,
    batch_size: int,
    skipped: Counter[str],
) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", suffix=".partial", delete=False) as file:
        try:
            with TarWriter(file, encoder=False, mtime=0) as tar:
                tar.write({"__key__": _MADE_OF, "json": json.dumps(made_of).encode()})
                _fill(tar, samples, ids, anew, batch_size, skipped)
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


def _fill(
    tar: TarWriter, samples: Samples, ids: list[int], anew: Rewrite, batch_size: int, skipped: Counter[str]
) -> None:
    for start in range(0, len(ids), batch_size):
        good: list[tuple[int, Sample]] = []
        for number in ids[start : start + batch_size]:
            try:
                good.append((number, samples.load(number)))
            except DecodeError as error:
                skipped[error.reason] += 1
        if not good:
            continue
        written = anew([sample for _, sample in good], [_members(samples, number) for number, _ in good])
        for (number, _), members in zip(good, written, strict=True):
            tar.write({"__key__": samples.reader.member(number), **members})


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


def _made_of(shard: Shard, eligible: NDArray[np.bool_], decoding: Decoding, facts: Facts) -> Facts:
    """All that a shard of the cache depends on."""
    return facts | {
        "source": shard.digest,
        "eligible": hashlib.sha256(eligible.tobytes()).hexdigest(),
        "caption": decoding.caption,  # whether it is encoded or not
        "max_pixels": decoding.max_pixels,
    }


def _check_alike(target: Path, made_of: Facts) -> None:
    """Raises UserError unless `made_of` is what stands in the shard."""
    try:
        with target.open("rb") as file:
            start = file.read(_LONGEST)
        members, _ = walk(start)
        found = [json.loads(start[at : at + size]) for name, at, size in members if name == f"{_MADE_OF}.json"]
    except (OSError, ValueError):
        found = []
    if found[:1] != [made_of]:
        old = found[0] if found and isinstance(found[0], dict) else {}
        fields = [field for field, value in made_of.items() if old.get(field) != value]
        raise UserError(f"{target} was made with something else ({', '.join(fields)}): remove it, or take another out")
