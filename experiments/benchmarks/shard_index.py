"""The index of a million samples in a hundred shards: how fast it is made and opened; `tarfile`'s walk beside it.

`python experiments/benchmarks/shard_index.py [SAMPLES]`. The samples are LAION's by their members (picture, caption,
JSON with its columns); the pictures are small, since an index does not read them.
"""

import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from PIL import Image

from carrara.data.manifest import Manifest

SHARDS = 100
FACTS = {
    "url": "https://example.org/some/picture.jpg", "caption": "a caption of some length, as they are",
    "key": "000000000", "status": "success", "sha256": "0" * 64,
    "width": 512, "height": 384, "original_width": 1024, "original_height": 768,
    "similarity": 0.33, "punsafe": 0.01, "pwatermark": 0.2, "aesthetic": 5.5,
}  # fmt: skip


def write(path: Path, first: int, count: int) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), "red").save(buffer, "JPEG")
    picture, facts = buffer.getvalue(), json.dumps(FACTS).encode()
    with tarfile.open(path, "w") as tar:
        for k in range(first, first + count):
            for suffix, content in (("jpg", picture), ("txt", b"a caption of some length"), ("json", facts)):
                member = tarfile.TarInfo(f"{k:09d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def main(samples: int) -> None:
    count = samples // SHARDS
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{s:05d}.tar" for s in range(SHARDS)]
        for s, path in enumerate(paths):
            write(path, s * count, count)
        names = [str(path) for path in paths]
        print(f"{len(os.sched_getaffinity(0))} processes, {sum(p.stat().st_size for p in paths) / 1e9:.2f} GB")
        for _ in range(3):
            start = time.perf_counter()
            with tarfile.open(paths[0]) as tar:
                members = len(tar.getmembers())
            theirs = members / 3 / (time.perf_counter() - start)
            shutil.rmtree(Path(folder) / "cache", ignore_errors=True)
            start = time.perf_counter()
            Manifest.load(names, Path(folder) / "cache")
            made = time.perf_counter() - start
            start = time.perf_counter()
            manifest = Manifest.load(names, Path(folder) / "cache")
            opened = time.perf_counter() - start
            rate = len(manifest) / made
            print(
                f"{len(manifest):,} samples: made at {rate:,.0f} a second, {rate / theirs:.1f} times tarfile's walk in "
                f"one process; opened in {opened:.2f} s",
                flush=True,
            )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
