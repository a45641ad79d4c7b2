"""The commands in processes of their own, on tiny settings, and what a tiny run leaves."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TINY = [
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "data.make.num_train=64",
    "data.make.num_val=24",
    "data.make.num_val_seen=8",
    "size.autoencoder.channels=[16,16]",
    "size.autoencoder.max_steps=2",
    "size.autoencoder.batch_size=8",
    "size.evaluator.image_width=16",
    "size.evaluator.text_width=16",
    "size.evaluator.embedding_width=16",
    "size.evaluator.max_steps=2",
    "size.evaluator.batch_size=8",
    "size.conditioner.width=16",
    "size.latent_unet.channels=[16,16]",
    "size.latent_unet.attention=[true,true]",
    "size.latent_unet.batch_size=8",
    "size.latent_unet.max_steps=4",
    "size.evaluation.num_images=8",
    "size.evaluation.batch_size=4",
    "size.evaluation.num_steps=2",
    "logger.wandb.mode=disabled",
]


def run(command: str, *arguments: str, cwd: Path, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / command), *arguments], cwd=cwd, text=True, capture_output=True, timeout=timeout
    )


def rows(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last(folder: Path, name: str) -> float:
    return next(row[name] for row in reversed(rows(folder)) if name in row)


def trained_part(cwd: Path, name: str) -> Path:
    """The folder of the only part of that name that the runs of a working directory share."""
    (found,) = (cwd / "runs" / "components").glob(f"{name}-*")
    return found


def check_scores_again(folder: Path, out: Path, cwd: Path) -> dict[str, float]:
    """Evaluates a run once more, and compares with what it logged last; the scores."""
    done = run(
        "evaluate.py", f"run={folder}", "trainer.accelerator=cpu", "trainer.precision=32-true", "batch_size=4",
        f"out={out}", cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = json.loads((out / "scores.json").read_text())["scores"]
    for name, value in scores.items():
        assert last(folder, name) == pytest.approx(value, rel=1e-4, abs=1e-5), name
    return scores


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A working directory in which a tiny latent U-Net and its parts have been trained; and the run's folder."""
    cwd = tmp_path_factory.mktemp("work")
    done = run("train.py", *TINY, cwd=cwd)
    assert done.returncode == 0, done.stderr
    (folder,) = (cwd / "runs" / "latent_unet-shapes").iterdir()
    assert done.stderr.splitlines()[-1] == f"report: {(folder / 'report.html').resolve()}"
    return cwd, folder
