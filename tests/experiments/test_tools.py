"""What the experiments' scripts share: nothing is trained or scored twice."""

import subprocess
from pathlib import Path

import pytest

from experiments import tools


@pytest.fixture(autouse=True)
def runs(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def scored(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text("{}")
    return folder


def test_a_run_is_trained_once_and_the_parts_that_it_needs_are_no_run(runs, monkeypatch):
    scored(runs / "components" / "autoencoder-0")
    commands = []

    def train(command, check):
        commands.append(command)
        scored(Path(command[-2].removeprefix("runs_dir=")) / "latent_unet-shapes" / "today")

    monkeypatch.setattr(subprocess, "run", train)
    for _ in range(2):
        run = tools.trained("objectives", "cosine-v", ["experiment=objectives"])
        [place] = (runs / "objectives").glob("cosine-v-*")
        assert run.resolve() == place / "latent_unet-shapes" / "today"
    assert len(commands) == 1
    assert "experiment=objectives" in commands[0]
    assert (place / "components" / "autoencoder-0").is_dir()  # it finds them there


def test_a_short_trial_is_not_taken_for_the_experiment(runs, monkeypatch):
    commands = []

    def train(command, check):
        commands.append(command)
        scored(Path(command[-2].removeprefix("runs_dir=")) / "latent_unet-shapes" / "today")

    monkeypatch.setattr(subprocess, "run", train)
    trial = tools.trained("objectives", "cosine-v", ["experiment=objectives", "trainer.max_steps=2"])
    assert tools.trained("objectives", "cosine-v", ["experiment=objectives"]) != trial and len(commands) == 2


def test_a_score_is_computed_once_for_each_order(runs, monkeypatch):
    commands = []

    def evaluate(command, check, stdout):
        commands.append(command[2:-1])
        out = Path(command[-1].removeprefix("out="))
        out.mkdir(parents=True)
        (out / "scores.json").write_text(f'{{"scores": {{"val/loss": {len(commands)}}}}}')

    monkeypatch.setattr(subprocess, "run", evaluate)
    asked = [(8, {"sampler": "heun"}), (8, {"sampler": "ddim"}), (16, {"sampler": "heun"})]
    for _ in range(2):
        assert [tools.scores(runs / "a", count, order)["val/loss"] for count, order in asked] == [1, 2, 3]
    assert commands[0] == [f"run={runs / 'a'}", "sampler=heun", "num_images=8"] and len(commands) == 3


def test_seeds_are_told_as_mean_and_deviation():
    assert tools.spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
    assert tools.spread([0.25], digits=2) == "0.25"


def test_a_table_is_markdown():
    assert tools.table(["a", "b"], [["1", "2"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
