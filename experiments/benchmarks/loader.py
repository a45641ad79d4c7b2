"""Our loader against plain webdataset on the same shards, in one process and with two workers, in alternation.

`python experiments/benchmarks/loader.py` prints webdataset's time / ours; above 1 ours is faster. Both give shuffled
batches of uint8 squares and captions. webdataset's way is the one of its documentation: decode with Pillow, a function
that crops and resizes, its own batches.
"""

import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
import webdataset.utils
from PIL import Image, ImageOps
from roof import describe

from carrara.data.module import ShardData

webdataset.utils.enforce_security = False  # carrara sets it; plain webdataset then opens no local file
BATCH, SHARDS = 64, 8
KINDS = {  # name -> format, side of the pictures, side of the squares, samples of a shard
    "photographs, JPEG of 512 to 256": ("JPEG", 512, 256, 200),
    "thumbnails, JPEG of 64 to 64": ("JPEG", 64, 64, 2000),
    "shapes, PNG of 32 to 32": ("PNG", 32, 32, 2000),
}


def write(folder: Path, format: str, side: int, count: int) -> str:
    """Shards of smooth random pictures."""
    rng = np.random.default_rng(0)
    for s in range(SHARDS):
        with wds.TarWriter(str(folder / f"{s:03d}.tar"), encoder=False) as tar:
            for k in range(count):
                coarse = rng.integers(0, 256, (max(2, side // 16), max(2, side // 12), 3), dtype=np.uint8)
                picture = Image.fromarray(coarse).resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
                buffer = io.BytesIO()
                picture.save(buffer, format, **({"quality": 90} if format == "JPEG" else {}))
                suffix = "jpg" if format == "JPEG" else "png"
                tar.write({"__key__": f"{s:03d}{k:05d}", suffix: buffer.getvalue(), "txt": b"a caption", "json": b"{}"})
    return f"{folder}/{{000..{SHARDS - 1:03d}}}.tar"


def theirs(urls: str, side: int, workers: int) -> Iterator[Any]:
    def prepare(pair: tuple[Image.Image, str]) -> tuple[np.ndarray, str]:
        image, caption = pair
        fitted = ImageOps.fit(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
        return np.asarray(fitted).transpose(2, 0, 1), caption

    dataset = (
        wds.WebDataset(urls, shardshuffle=SHARDS, seed=0)
        .shuffle(1000, seed=0)
        .decode("pil")
        .to_tuple("jpg;png", "txt")
        .map(prepare)
        .batched(BATCH, partial=False)
    )
    return iter(wds.WebLoader(dataset, batch_size=None, num_workers=workers))


def ours(urls: str, side: int, workers: int, cache: Path) -> Iterator[Any]:
    data = ShardData(
        "bench", urls, side, cache_dir=str(cache), val_samples=1, memory_limit=0, num_workers=workers, shuffle_window=4
    )
    return iter(data.train_loader(BATCH))


def seconds(batches: Iterator[Any], count: int) -> float:
    """Of so many batches, after the first few, when the workers are there."""
    for _ in itertools.islice(batches, 4):
        pass
    start = time.perf_counter()
    for _ in itertools.islice(batches, count):
        pass
    return time.perf_counter() - start


def main() -> None:
    torch.set_num_threads(1)
    print(describe())
    for name, (format, size, side, samples) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            urls = write(Path(folder), format, size, samples)
            count = SHARDS * samples // BATCH // 3
            for workers in (0, 2):
                seconds(ours(urls, side, workers, Path(folder)), 1)  # makes the index, once
                pairs = []
                for _ in range(5):
                    pairs.append(
                        (
                            seconds(theirs(urls, side, workers), count),
                            seconds(ours(urls, side, workers, Path(folder)), count),
                        )
                    )
                ratios = sorted(their / our for their, our in pairs)
                rate = count * BATCH / statistics.median(our for _, our in pairs)
                spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f})"
                print(f"{name}, {workers} workers: {spread}, ours {rate:.0f} samples/s", flush=True)


if __name__ == "__main__":
    main()
