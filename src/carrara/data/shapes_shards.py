"""Write captioned shapes as shards in the layout of LAION and img2dataset.

`train-000000.tar …` and `val-000000.tar …` hold `KEY.png`, `KEY.txt` and `KEY.json` for every sample.
Validation has first the captions with a held-out combination, then captions whose combinations are in
training; the JSON says which ("split": "held_out" or "seen"), what the picture shows ("scene"), and the labels a
classifier can learn ("shape", "color").
"""

import hashlib
import io
import json
import logging
import shutil
from dataclasses import asdict
from pathlib import Path

from filelock import FileLock
from numpy import uint8
from numpy.typing import NDArray
from PIL import Image
from webdataset import TarWriter

from carrara.data.shapes import Examples, Scene, Split, examples
from carrara.errors import UserError

_log = logging.getLogger(__name__)
_CARD = "shapes.json"
_BATCH = 256  # pictures drawn at once


def write_shapes(
    folder: str | Path,
    *,
    num_train: int,
    num_val: int,
    num_val_seen: int,
    resolution: int = 32,
    seed: int = 0,
    shard_size: int = 1000,
    pair_share: float = 0.6,
) -> Path:
    """Make the shards in `folder`, or keep them if it already holds exactly these; returns `folder`.

    `num_val` captions have a held-out combination, `num_val_seen` have none. Shards hold `shard_size`
    samples, the last one of a split perhaps fewer. The files' bytes depend on the arguments only. The folder
    appears complete or not at all, and processes that ask for it at once make it once.

    Raises UserError for an impossible argument, and if the folder holds anything else.
    """
    counts = {"num_train": num_train, "num_val": num_val, "num_val_seen": num_val_seen}
    bad = [name for name, count in counts.items() if count < 0]
    bad += [name for name, value in (("shard_size", shard_size), ("seed", seed + 1)) if value < 1]
    bad += ["resolution"] if resolution < 16 else []
    bad += ["pair_share"] if not 0 <= pair_share <= 1 else []
    if bad:
        raise UserError(f"shapes: {bad[0]} is out of range; counts and seed are >= 0, resolution >= 16")
    card = {
        **counts,
        "resolution": resolution,
        "seed": seed,
        "shard_size": shard_size,
        "pair_share": pair_share,
        "drawing": _drawing_fingerprint(),
    }
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if _holds(folder, card):
            return folder
        partial = folder.parent / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # of a killed process: we hold the lock
        partial.mkdir()
        try:
            splits: dict[str, list[tuple[Split, int]]] = {
                "train": [("train", k) for k in range(num_train)],
                "val": [("held_out", k) for k in range(num_val)] + [("seen", k) for k in range(num_val_seen)],
            }
            for name, samples in splits.items():
                for shard, start in enumerate(range(0, len(samples), shard_size)):
                    path = partial / f"{name}-{shard:06d}.tar"
                    _write_shard(path, samples[start : start + shard_size], seed, resolution, pair_share)
            (partial / _CARD).write_text(json.dumps(card, indent=2) + "\n")
            partial.rename(folder)  # an empty folder of that name is replaced
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    _log.info("wrote %d training and %d validation shapes to %s", num_train, num_val + num_val_seen, folder)
    return folder


def _holds(folder: Path, card: dict[str, object]) -> bool:
    """True if `folder` holds the shapes of `card`, False if it is missing or empty; UserError otherwise."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = dict(json.loads((folder / _CARD).read_text()))
    except (OSError, ValueError, TypeError):
        raise UserError(f"{folder} is not a folder of shapes; name another folder or remove it") from None
    differing = [f"{key} {found.get(key)} is not {value}" for key, value in card.items() if found.get(key) != value]
    if differing:
        raise UserError(f"{folder} holds other shapes ({differing[0]}); name another folder or remove it")
    return True


def _drawing_fingerprint() -> str:
    """Differs once the same arguments give other pictures or captions than when a folder was written."""
    drawn = examples(0, "train", range(64))
    texts = [*drawn.captions, *(label for scene in drawn.scenes for label in labels(scene).values())]
    return hashlib.sha256(drawn.images.tobytes() + "\n".join(texts).encode()).hexdigest()[:16]


def labels(scene: Scene) -> dict[str, str]:
    """Of all objects, the first first: "shape" (42 different ones) and "color"."""
    return {key: ", ".join(getattr(thing, key) for thing in scene.objects) for key in ("shape", "color")}


def _write_shard(path: Path, samples: list[tuple[Split, int]], seed: int, resolution: int, pair_share: float) -> None:
    with path.open("wb") as file, TarWriter(file, encoder=False, mtime=0) as tar:
        for start in range(0, len(samples), _BATCH):
            batch = samples[start : start + _BATCH]
            for split in dict.fromkeys(split for split, _ in batch):
                indices = [index for of, index in batch if of == split]
                drawn = examples(seed, split, indices, resolution, pair_share)
                for row, index in enumerate(indices):
                    tar.write(_members(f"{split}_{index:08d}", split, drawn, row))


def _members(key: str, split: Split, drawn: Examples, row: int) -> dict[str, str | bytes]:
    """The sample as webdataset's writer takes it: the key and the bytes of each member by extension."""
    image, text = _png(drawn.images[row]), drawn.captions[row]
    height, width = drawn.images.shape[2:]
    facts = {
        "key": key,
        "caption": text,
        "width": width,
        "height": height,
        "WIDTH": width,
        "HEIGHT": height,
        "sha256": hashlib.sha256(image).hexdigest(),
        "split": split,
        "scene": asdict(drawn.scenes[row]),
        **labels(drawn.scenes[row]),
    }
    return {"__key__": key, "png": image, "txt": text.encode(), "json": json.dumps(facts).encode()}


def _png(image: NDArray[uint8]) -> bytes:
    """PNG of a uint8 (3, H, W) image."""
    buffer = io.BytesIO()
    Image.fromarray(image.transpose(1, 2, 0)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
