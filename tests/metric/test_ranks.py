"""One process and two give the same scores, with samples split unevenly and a rank that has none at all."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from carrara.metric.clip_score import CLIPScore
from carrara.metric.frechet import FrechetDistance
from carrara.metric.kernel_distance import KernelDistance
from carrara.metric.prompt_accuracy import PromptAccuracy
from carrara.metric.psnr import PSNR
from carrara.metric.r_precision import RPrecision
from carrara.metric.recall import Recall

SAMPLES, DIM = 21, 6
SPLITS = {"uneven": [range(13), range(13, 21)], "one rank idle": [range(21), range(0)]}
EXACT = ("kernel", "subsets", "precision", "recall_at_1", "recall_at_5", "accuracy/all", "accuracy/color")


def check(captions, images):
    return [{"all": bool(image.sum() % 2), "color": None if "x" in c else True} for c, image in zip(captions, images)]


def scores(samples: range) -> dict[str, Any]:
    """Scores over all ranks when this one is given `samples`, in batches of up to 4; and the counts seen."""
    generator = torch.Generator().manual_seed(0)
    real, generated = torch.randn(2, SAMPLES, DIM, generator=generator)
    texts = real + 0.7 * generated
    images = torch.randint(0, 256, (2, SAMPLES, 3, 4, 4), generator=generator, dtype=torch.uint8)
    captions = [f"caption {i % 15}" + "x" * (i % 3) for i in range(SAMPLES)]

    summed, gathered = FrechetDistance(DIM, num_images=SAMPLES), FrechetDistance(DIM, num_images=DIM)
    kernel, subsets = KernelDistance(DIM), KernelDistance(DIM, subset_size=8, num_subsets=5)
    clip, precision, recall = CLIPScore(), RPrecision(DIM, 4), Recall(DIM)
    accuracy, psnr = PromptAccuracy(check), PSNR()
    for start in range(samples.start, samples.stop, 4):
        i = torch.arange(start, min(start + 4, samples.stop))
        names = [captions[k] for k in i]
        for is_real, features in ((True, real), (False, generated)):
            for frechet in (summed, gathered):
                frechet.update(features[i], real=is_real)
            for metric in (kernel, subsets):
                metric.update(features[i], i, real=is_real)
        clip.update(real[i], texts[i])
        for pairs in (precision, recall):
            pairs.update(real[i], texts[i], names, i)
        accuracy.update(names, images[0][i])
        psnr.update(images[0][i], images[1][i])
    values = {
        "summed": summed.compute(),
        "gathered": gathered.compute(),
        "kernel": kernel.compute(),
        "subsets": subsets.compute(),
        "clip": clip.compute(),
        "precision": precision.compute(),
        **recall.compute(),
        **{f"accuracy/{key}": value for key, value in accuracy.compute().items()},
        "psnr": psnr.compute(),
    }
    assert int(clip.count) == len(samples)  # after compute a rank has its own states again
    counts = {
        "summed": summed.num_images,
        "gathered": gathered.num_images,
        "kernel": kernel.num_images,
        "captions": recall.num_captions,
        "accuracy": accuracy.counts,
    }
    return {"values": {name: value.item() for name, value in values.items()}, "counts": counts}


def main(rank: int, folder: str) -> None:
    """One of two ranks: scores of each split of `SPLITS` into a file."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {name: scores(split[rank]) for name, split in SPLITS.items()}
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes computed. They run this file: spawning would have to import it by name."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, __file__]
    processes = [subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(2)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_score_as_one(two_ranks, split):
    alone = json.loads(json.dumps(scores(range(SAMPLES))))
    assert alone["counts"]["summed"] == alone["counts"]["gathered"] == [SAMPLES, SAMPLES]
    assert alone["counts"]["kernel"] == [SAMPLES, SAMPLES]
    assert alone["counts"]["accuracy"] == {"all": SAMPLES, "color": 7}
    for rank in two_ranks:
        assert rank[split]["counts"] == alone["counts"]  # each sample once
        assert rank[split]["values"] == pytest.approx(alone["values"], rel=1e-6)
        for name in EXACT:
            assert rank[split]["values"][name] == alone["values"][name]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
