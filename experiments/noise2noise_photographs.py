"""Does learning to restore photographs need clean ones (Lehtinen et al. 2018, tables 1 and 2)?

`python -m experiments.noise2noise_photographs FOLDER` takes the photographs in FOLDER/val, which are held out, and in
all other folders of FOLDER, which are learnt from: of BSDS500 (Arbelaez et al. 2011) its `BSDS500/data/images`. It
cuts them into tiles once, in data/photographs, and prints PSNR of restored photographs by what they were learned from:
of each, over all of its tiles, and the mean of these. More arguments go to every training.
"""

import io
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from webdataset import TarWriter

from carrara.build import load_trained
from carrara.config import build
from carrara.corruption.base import as_stored
from carrara.data.validation import ValidationSet
from carrara.metric.psnr import psnr
from carrara.model.restoration import RestorationModel, restored
from carrara.precision import default_device
from experiments.noise2noise import restorations
from experiments.tools import last_scores

NAME = "noise2noise_photographs"
GAUSSIAN = [f"experiment={NAME}"]
TEXT = [*GAUSSIAN, "corruption=text"]
TRAININGS = {
    "gaussian": {"clean": [*GAUSSIAN, "model.target=clean"], "noisy": [*GAUSSIAN, "model.target=noisy"]},
    "text": {
        "clean": [*TEXT, "model.target=clean", "size.restoration.max_steps=8000"],
        "noisy": [*TEXT, "model.target=noisy", "size.restoration.max_steps=8000"],
        # a quarter of a noisy target is under text: by then as many pixels have told something
        "noisy_longer": [*TEXT, "model.target=noisy", "size.restoration.max_steps=10800"],
    },
}
SEEDS = (0, 1, 2)
OUT, SIDE, SHARD_SIZE, BATCH = Path("data/photographs"), 64, 1000, 64


def tiles(photograph: Path) -> Iterator[tuple[str, bytes]]:
    """Names and PNGs of the SIDE × SIDE tiles that fit into a photograph, around its centre."""
    with Image.open(photograph) as image:
        pixels = np.asarray(image.convert("RGB"))
    rows, columns = pixels.shape[0] // SIDE, pixels.shape[1] // SIDE
    top, left = (pixels.shape[0] - rows * SIDE) // 2, (pixels.shape[1] - columns * SIDE) // 2
    for k in range(rows * columns):
        y, x = top + k // columns * SIDE, left + k % columns * SIDE
        file = io.BytesIO()
        Image.fromarray(pixels[y : y + SIDE, x : x + SIDE]).save(file, "PNG", compress_level=1)
        yield f"{photograph.stem}-{k}", file.getvalue()


def write_tiles(folder: Path, out: Path) -> None:
    """Shards `train-*.tar` and `val-*.tar` in `out`, unless it is there; it appears complete or not at all."""
    if out.exists():
        print(f"the tiles in {out} are taken; remove it to cut others")
        return
    found = [path for path in sorted(folder.glob("*/*")) if path.suffix.lower() in (".jpg", ".jpeg", ".png")]
    splits = {
        "train": [path for path in found if path.parent.name != "val"],
        "val": [path for path in found if path.parent.name == "val"],
    }
    for name, paths in splits.items():
        if not paths:
            sys.exit(
                f"error: {folder} has no photographs (.jpg, .jpeg, .png) for {name}: they lie in train, test and val"
            )
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process
    partial.mkdir(parents=True)
    for name, paths in splits.items():
        all_tiles = [tile for path in paths for tile in tiles(path)]
        for shard, start in enumerate(range(0, len(all_tiles), SHARD_SIZE)):
            with (partial / f"{name}-{shard:06d}.tar").open("wb") as file, TarWriter(file, mtime=0) as tar:
                for key, png in all_tiles[start : start + SHARD_SIZE]:
                    tar.write({"__key__": key, "png": png})
    partial.rename(out)


@torch.no_grad()
def photographs_psnr(model: RestorationModel, validation: ValidationSet) -> tuple[float, float]:
    """Of noisy and of restored photographs, whose tiles are all there is to validate on; means in dB.

    A photograph's is of the mean squared error of its tiles: the mean of the tiles' own would count flat ones more.
    """
    errors: dict[str, list[Tensor]] = {}  # of a photograph's tiles, (noisy, restored)
    for indices in np.array_split(np.arange(len(validation)), -(-len(validation) // BATCH)):
        batch = validation.take(indices)
        clean = batch["images"].to(model.device)
        noisy = as_stored(model.corruption(model.images({"images": clean}), batch["keys"], 0))
        both = torch.stack([psnr(noisy, clean), psnr(restored(model.restoration, noisy), clean)], dim=1)
        for key, error in zip(batch["keys"], 10 ** (-both / 10), strict=True):
            errors.setdefault(key.rpartition("/")[2].rpartition("-")[0], []).append(error)
    means = torch.stack([torch.stack(of_tiles).mean(0) for of_tiles in errors.values()])
    noisy_psnr, restored_psnr = (-10 * means.log10()).mean(0).tolist()
    return noisy_psnr, restored_psnr


def of_photographs(run: Path) -> tuple[float, float]:
    """The same of a run, computed once."""
    kept = run / "experiment" / "photographs"
    if not (kept / "scores.json").is_file():
        config, model, _ = load_trained(run)
        assert isinstance(model, RestorationModel)
        noisy, made = photographs_psnr(model.to(default_device()), build(config["data"]).validation)
        kept.mkdir(parents=True)
        (kept / "scores.json").write_text(json.dumps({"scores": {"noisy": noisy, "restored": made}}))
    scores = last_scores(kept)
    return scores["noisy"], scores["restored"]


def main(arguments: Sequence[str]) -> None:
    if not arguments or not Path(arguments[0]).is_dir():
        sys.exit(f"error: python -m experiments.{NAME} FOLDER: a folder with folders of photographs")
    write_tiles(Path(arguments[0]), OUT)
    restorations(NAME, TRAININGS, SEEDS, arguments[1:], of_photographs)


if __name__ == "__main__":
    main(sys.argv[1:])
