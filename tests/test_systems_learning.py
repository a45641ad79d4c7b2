"""What the systems must have learned: the demo's networks, briefly trained by the commands of README."""

import json
from pathlib import Path

import pytest

from tests.test_end_to_end import run

pytestmark = pytest.mark.slow
BRIEFLY = [
    "data.make.num_train=3000", "data.make.num_val=128", "data.make.num_val_seen=2", "size.evaluator.max_steps=60",
    "trainer.accelerator=cpu", "logger.wandb.mode=disabled",
]  # fmt: skip


def scores(cwd: Path, *arguments: str) -> dict[str, float]:
    """Of the run that `train.py` makes with these arguments, on held-out captions."""
    done = run("train.py", *BRIEFLY, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    newest = max((cwd / "runs").glob("*-shapes/*/scores.json"), key=lambda file: file.stat().st_mtime)
    found: dict[str, float] = json.loads(newest.read_text())["scores"]
    return found


def test_a_decoder_of_shrunken_pictures_beats_bicubic_enlargement_by_a_decibel(tmp_path):
    found = scores(tmp_path, "model=autoencoder", "autoencoder=enlarger", "trainer.max_steps=250")
    assert found["val/psnr"] > found["val/psnr_bicubic"] + 1


def test_super_resolution_looks_more_like_the_pictures_than_bicubic_enlargement_does(tmp_path):
    found = scores(tmp_path, "model=super_resolution", "trainer.max_steps=250", "diffusion.num_steps=8")
    assert found["val/fd_evaluator"] < 0.6 * found["val/fd_evaluator_bicubic"]


@pytest.mark.parametrize(("model", "max_steps"), [("prior", 200), ("autoregressive_prior", 400)])
def test_a_prior_comes_nearer_to_the_pictures_embedding_than_the_captions_does(tmp_path, model, max_steps):
    found = scores(tmp_path, f"model={model}", f"trainer.max_steps={max_steps}")
    assert found["val/prior_cosine"] > found["val/text_cosine"] + 0.01
    assert found["val/shuffled_cosine"] < 0.5
