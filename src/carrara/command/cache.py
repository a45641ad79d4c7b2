"""`python shards.py do=cache`: shards that hold, beside each picture, what frozen parts make of it."""

import hashlib
import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from webdataset import TarWriter

from carrara.autoencoder.base import Autoencoder
from carrara.build import latent_facts, text_facts
from carrara.component import load_component
from carrara.conditioner.pretrained import Pretrained
from carrara.config import Config, build
from carrara.data.cached import SUFFIX, Cached, Facts, pack
from carrara.data.decode import DecodeError
from carrara.data.manifest import Shard
from carrara.data.module import ShardData
from carrara.data.reader import Decoding, Sample, Samples
from carrara.data.shard_index import CAPTION, IMAGE, JSON
from carrara.data.tar_walk import walk
from carrara.errors import UserError
from carrara.parts import find_component
from carrara.precision import default_device

_log = logging.getLogger(__name__)
_MADE_OF = "__made_of__/shard"  # the first member's key; `webdataset` passes over what stands in __…__, as we do
_LONGEST = 1 << 16  # bytes in which it lies


def cache(order: Config) -> None:
    """Writes a shard into `out` for each of `data.urls`; those that are there already, made of the same, are left.

    The same command on other machines that share the folder takes other shards.

    Raises:
        UserError: a mistake in the command, or shards in `out` that were made with something else.
    """
    if order["out"] is None or order["part"]["autoencoder"] is None:
        raise UserError("out=FOLDER and part.autoencoder=…: where the shards go, and which auto-encoder encodes them")
    node = order["data"]
    if node["flip"] or node["crop"] == "random" or node["bucket_aspect"] != 1:
        raise UserError("data.flip, data.crop=random and data.bucket_aspect do not go with a cache: leave them out")
    folder = find_component(str(order["part"]["autoencoder"]), "autoencoder", Path(order["runs_dir"]))
    data: ShardData = build({key: value for key, value in node.items() if key not in ("make", "root")})
    encoder = _Encoder.load(folder, order, data.decoding)
    out = Path(order["out"])
    out.mkdir(parents=True, exist_ok=True)
    skipped: Counter[str] = Counter()
    made = 0
    samples = Samples(data.samples().reader, data.decoding)
    names = [shard.name for shard in data.manifest.shards]
    if len(set(names)) < len(names):
        raise UserError("data.urls: two shards have the same name, and would be one in out")
    for number, shard in enumerate(data.manifest.shards):
        target, eligible = out / shard.name, data.eligible_in(number)
        made_of = _made_of(shard, eligible, data.decoding, encoder.facts)
        try:
            with FileLock(out / f".{shard.name}.lock", timeout=0):
                if target.exists():
                    _check_alike(target, made_of)
                    continue
                ids = np.arange(*data.manifest.starts[number : number + 2])[eligible]
                _write(target, made_of, samples, ids.tolist(), encoder, order["batch_size"], skipped)
                made += 1
        except Timeout:
            _log.info("%s is being made by another process", target)
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in (data.reasons + skipped).most_common())
    print(f"{made:,} of {len(names):,} shards made now, in {out}; samples left out: {reasons or 'none'}")


@dataclass(frozen=True)
class _Encoder:
    autoencoder: Autoencoder
    text: Pretrained | None
    facts: Facts

    @classmethod
    def load(cls, folder: Path, order: Config, decoding: Decoding) -> "_Encoder":
        autoencoder, _ = load_component(folder, "autoencoder")
        text = build(order["conditioner"])
        assert isinstance(autoencoder, Autoencoder)
        facts = latent_facts(folder, autoencoder, decoding)
        if isinstance(text, Pretrained):
            facts |= text_facts(text, decoding)
        elif order["conditioner"]["_target_"] != "carrara.conditioner.text.Unconditional":
            raise UserError("conditioner: only frozen text encoders can be cached: clip, t5, bert, gpt2, or none")
        facts = {**facts, "dtype": order["dtype"]}
        if order["dtype"] not in ("float16", "float32"):
            raise UserError(f"dtype={order['dtype']} is not known; it is float16 or float32")
        device = default_device()
        return cls(
            autoencoder.to(device).eval(), text.to(device).eval() if isinstance(text, Pretrained) else None, facts
        )

    @torch.no_grad()
    def __call__(self, samples: list[Sample]) -> Iterator[bytes]:
        """The member of each."""
        autoencoder = self.autoencoder
        pixels = torch.from_numpy(np.stack([sample.image for sample in samples])).to(autoencoder.latent_mean.device)
        mean, logvar = autoencoder.posterior(pixels.float() / 127.5 - 1)
        scale = autoencoder.latent_std[:, None, None]
        mean = (mean - autoencoder.latent_mean[:, None, None]) / scale
        std = (0.5 * logvar).exp() / scale
        encoded = None if self.text is None else self.text([sample.caption for sample in samples])
        for k in range(len(samples)):
            cached = Cached(mean[k].cpu().numpy(), std[k].cpu().numpy())
            if encoded is not None:
                tokens = encoded.tokens[k][encoded.mask[k]].cpu().numpy()
                cached = cached._replace(tokens=tokens, pooled=encoded.pooled[k].cpu().numpy())
            yield pack(cached, self.facts)


def _write(
    target: Path,
    made_of: Facts,
    samples: Samples,
    ids: list[int],
    encoder: _Encoder,
    batch_size: int,
    skipped: Counter[str],
) -> None:
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=".", suffix=".partial", delete=False) as file:
        try:
            with TarWriter(file, encoder=False, mtime=0) as tar:
                tar.write({"__key__": _MADE_OF, "json": json.dumps(made_of).encode()})
                _fill(tar, samples, ids, encoder, batch_size, skipped)
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


def _fill(
    tar: TarWriter, samples: Samples, ids: list[int], encoder: _Encoder, batch_size: int, skipped: Counter[str]
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
        for (number, _), member in zip(good, encoder([one for _, one in good]), strict=True):
            row = {"__key__": samples.reader.member(number), **_members(samples, number)}
            tar.write(row | {SUFFIX.removeprefix("."): member})


def _members(samples: Samples, number: int) -> dict[str, bytes]:
    """The sample's own."""
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
