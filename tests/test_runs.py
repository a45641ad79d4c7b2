"""Runs that are stopped, killed, suspended or spoilt in their middle, in processes of their own."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from carrara.config import build, compose
from carrara.launch import launch
from carrara.run_folder import load_config, save_config
from tests.tiny import equal

KILLS_SEED = int(os.environ.get("KILLS_SEED", "0"))
CONF = Path(__file__).parents[1] / "conf"
TINY = [
    "experiment=ddpm", "part.evaluator=null", "trainer.accelerator=cpu", "trainer.precision=32-true",
    "data.make.num_train=64", "data.make.num_val=8", "data.make.num_val_seen=4",
    "size.pixel_unet.channels=[8,8]", "size.pixel_unet.attention=[false,true]", "size.conditioner.width=16",
    "size.conditioner.depth=1", "size.evaluation.num_images=4", "diffusion.num_steps=1", "trainer.batch_size=6",
    "trainer.epoch_samples=30", "trainer.max_steps=12", "trainer.log_steps=1", "trainer.timeout_s=15",
    "logger.wandb.mode=disabled",
]  # fmt: skip
"""Epochs of five steps; the stream's own end lies within a batch, 64 being no multiple of 6."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def surroundings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(str(p) for p in (Path(__file__).parent / "helpers", *_source())))


def _source() -> list[Path]:
    return [Path(__file__).parents[1] / "src"]


def new(folder: Path, *overrides: str, harm: list[dict[str, Any]] | None = None) -> Path:
    """A run's folder, ready to be launched."""
    folder.mkdir(parents=True)
    save_config(folder, compose(CONF, "train", [*TINY, *overrides]).config)
    (folder / "harm.json").write_text(json.dumps(harm or []))
    return folder


def go(folder: Path, devices: int = 1, max_restarts: int = 0) -> int:
    _ = build(load_config(folder)["data"]).fingerprint  # made and scanned once, by one process
    return launch(folder, devices, module="traced_worker", max_restarts=max_restarts)


def trace(folder: Path, rank: int = 0) -> dict[int, list[Any]]:
    """step -> what was seen; a step made again must be the same again."""
    steps: dict[int, list[Any]] = {}
    for line in (folder / f"trace_rank{rank}.jsonl").read_text().splitlines():
        row = json.loads(line)
        seen = [row["loss"], row["keys"]]
        assert steps.setdefault(row["step"], seen) == seen
    return steps


def end(folder: Path, rank: int = 0) -> dict[str, Any]:
    return torch.load(folder / f"end_rank{rank}.pt", weights_only=True)


def flat(state: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {name: state}
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: value for k, part in items for key, value in flat(part, f"{name}/{k}").items()}
    return {name: torch.tensor(state)} if isinstance(state, int | float) else {}


def assert_same(folder: Path, whole: Path, devices: int) -> None:
    for rank in range(devices):
        assert trace(folder, rank) == trace(whole, rank)
        assert equal(flat(end(folder, rank)), flat(end(whole, rank)))
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (folder, whole)]
    varying = ("time", "images_per_second")
    told = [[{key: row[key] for key in row if key not in varying} for row in of_run] for of_run in rows]
    assert told[0] == told[1]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("*.ckpt"))


@pytest.fixture(scope="module")
def whole(home: Path) -> dict[int, Path]:
    """Uninterrupted runs by number of processes, made when they are asked for."""
    return {}


def uninterrupted(whole: dict[int, Path], home: Path, devices: int) -> Path:
    if devices not in whole:
        whole[devices] = new(home / f"whole_{devices}", f"trainer.devices={devices}")
        assert go(whole[devices], devices) == 0
    return whole[devices]


def test_two_ranks_killed_and_started_again_end_as_if_they_had_not_been(whole, home, tmp_path, capfd):
    """The first time after a checkpoint, the second before the next one: rank 1, then rank 0, by -9."""
    harm = [{"rank": 1, "step": 7, "what": "kill"}, {"rank": 0, "step": 9, "what": "kill"}]
    folder = new(tmp_path / "run", "trainer.devices=2", harm=harm)
    assert go(folder, 2, max_restarts=2) == 0
    told = capfd.readouterr().err
    assert told.count("was ended by SIGKILL") == 2
    assert_same(folder, uninterrupted(whole, home, 2), 2)


def test_a_signal_to_one_rank_stops_both_with_a_checkpoint_of_the_step(whole, home, tmp_path):
    folder = new(tmp_path / "run", "trainer.devices=2", harm=[{"rank": 1, "step": 7, "what": "signal"}])
    assert go(folder, 2, max_restarts=1) == 128 + signal.SIGTERM  # asked for: not started again
    assert checkpoints(folder) == ["step=00000005.ckpt", "step=00000008.ckpt"]
    assert go(folder, 2) == 0
    assert_same(folder, uninterrupted(whole, home, 2), 2)


def test_a_signal_to_every_process_does_not_end_the_data_workers_first_and_other_data_are_refused(tmp_path, capfd):
    """As a terminal, a service manager and Slurm send it."""
    streaming = ["data.memory_limit=0", "data.num_workers=2"]
    folder = new(tmp_path / "run", *streaming, harm=[{"rank": 0, "step": 7, "what": "signal"}])
    assert go(folder) == 128 + signal.SIGTERM
    assert checkpoints(folder) == ["step=00000005.ckpt", "step=00000008.ckpt"]
    assert "error" not in capfd.readouterr().err
    # its shards have been moved, and a download has gone on: the stream would be another
    config = load_config(folder)
    mine = shutil.copytree(config["data"]["root"], tmp_path / "mine")
    shutil.copy(mine / "train-000000.tar", mine / "train-000001.tar")
    save_config(folder, {**config, "data": {**config["data"], "urls": f"{mine}/train-*.tar"}})
    assert go(folder) == 2
    assert "error: this run cannot go on: data.urls: train-000001.tar new" in capfd.readouterr().err
    assert checkpoints(folder) == ["step=00000005.ckpt", "step=00000008.ckpt"]


def test_trap_19_denormal_numbers_are_flushed(whole, home):
    assert end(uninterrupted(whole, home, 2))["flushed"]
    assert (torch.full((1000,), 1e-40) * 1.0 > 0.0).all()  # the control


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler here")
def test_trap_17_compiled_networks_keep_the_names_of_their_weights(home, tmp_path):
    folder = new(tmp_path / "run", "trainer.compile=true", "trainer.max_steps=2")
    assert go(folder) == 0
    assert end(folder)["compiled"] > 0
    state = load_file(folder / "component" / "weights.safetensors")
    assert state and not [name for name in state if "_orig_mod" in name]


def test_a_loss_that_is_nan_on_one_rank_is_left_out_on_both(tmp_path):
    folder = new(tmp_path / "run", "trainer.devices=2", harm=[{"rank": 1, "step": 6, "what": "nan"}])
    assert go(folder, 2) == 0
    states = [
        flat({"weights": end(folder, rank)["weights"], "optimizer": end(folder, rank)["optimizer"]}) for rank in (0, 1)
    ]
    assert equal(states[0], states[1]) and all(value.isfinite().all() for value in states[0].values())
    (line,) = [json.loads(line) for line in (folder / "skipped_steps.jsonl").read_text().splitlines()]
    assert line["step"] == 7 and line["gradient_norm"] == "nan"
    assert line["keys"] == [trace(folder, rank)[7][1] for rank in (0, 1)] or line["keys"][1] == trace(folder, 1)[7][1]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (seventh,) = [row for row in rows if row["step"] == 7 and "train/learning_rate" in row]
    assert seventh["train/skipped_steps"] == 1 and seventh["train/loss"] == pytest.approx(
        float.fromhex(trace(folder, 0)[7][0])
    )


@pytest.mark.parametrize("what", ["raise", "stop"])
def test_no_rank_is_left_behind(tmp_path, what, capfd):
    """Rank 1 fails or hangs: both are gone within the time limit of 15 s and 15 more, after their 20 s of starting."""
    folder = new(tmp_path / "run", "trainer.devices=2", harm=[{"rank": 1, "step": 2, "what": what}])
    start = time.monotonic()
    assert go(folder, 2) not in (0, 2)
    assert time.monotonic() - start < 15 + 15 + 40
    told = capfd.readouterr().err
    assert ("ZeroDivisionError: harm" in told) == (what == "raise")


def test_a_key_in_the_environment_is_in_no_file(tmp_path, monkeypatch):
    """W&B offline, with its own folder, checkpoints, logs and the report."""
    monkeypatch.setenv("WANDB_API_KEY", "5ec2e7" + "0" * 34)
    monkeypatch.setenv("HF_TOKEN", "hf_5ec2e7")
    folder = new(tmp_path / "run", "logger.wandb.mode=offline", "trainer.max_steps=3")
    assert go(folder) == 0
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert any("wandb" in path.parts for path in files) and any(path.suffix == ".ckpt" for path in files)
    for path in files:
        assert b"5ec2e7" not in path.read_bytes(), path
    assert any(b"offline" in path.read_bytes() for path in files)  # the control: it does look


@pytest.mark.slow
def test_a_run_goes_on_with_other_ranks_on_the_same_global_batches(whole, home, tmp_path):
    folder = new(tmp_path / "run", "trainer.devices=2", harm=[{"rank": 1, "step": 7, "what": "kill"}])
    assert go(folder, 2) not in (0, 2)
    save_config(folder, {**(config := load_config(folder)), "trainer": {**config["trainer"], "devices": 1}})
    assert go(folder, 1) == 0
    full = uninterrupted(whole, home, 2)
    alone = [json.loads(line) for line in (folder / "trace_rank0.jsonl").read_text().splitlines()]
    after = {row["step"]: row["keys"] for row in alone if len(row["keys"]) == 6}
    assert list(after) == list(range(6, 13))  # from the checkpoint of step 5 on
    for step, keys in after.items():
        assert keys == [key for rank in (0, 1) for key in trace(full, rank)[step][1]]


@pytest.mark.slow
def test_ten_kills_at_random_moments_change_nothing(home, tmp_path):
    """In a step, between steps, while a checkpoint is written or scores are computed: wherever the time falls."""
    settings = ["trainer.devices=2", "trainer.max_steps=200", "trainer.epoch_samples=120"]
    full = new(tmp_path / "full", *settings)
    assert go(full, 2) == 0
    rng = random.Random(KILLS_SEED)
    steps = sorted(rng.sample(range(200), 10))
    harm = [{"rank": rng.randrange(2), "step": s, "what": "kill", "after": rng.uniform(0.001, 0.5)} for s in steps]
    folder = new(tmp_path / "run", *settings, harm=harm)
    assert go(folder, 2, max_restarts=10) == 0
    assert len(list(folder.glob("done_*"))) == 10
    assert_same(folder, full, 2)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("steps", [[3], [4], [5], [7, 8]], ids=["middle", "last", "first", "twice"])
def test_a_killed_run_ends_as_if_it_had_not_been(whole, home, tmp_path, workers, steps):
    streaming = ["data.memory_limit=0", f"data.num_workers={workers}"]
    if workers + 10 not in whole:
        whole[workers + 10] = new(home / f"workers_{workers}", *streaming)
        assert go(whole[workers + 10]) == 0
    harm = [{"rank": 0, "step": step, "what": "kill"} for step in steps]
    folder = new(tmp_path / "run", *streaming, "trainer.epoch_samples=12", harm=harm)
    assert go(folder, max_restarts=len(steps)) == 0
    assert trace(folder) == trace(whole[workers + 10]) == trace(whole.get(10, whole[workers + 10]))
    assert equal(flat(end(folder)), flat(end(whole[workers + 10])))


def test_a_killed_data_worker_ends_the_run_and_says_so(tmp_path, capfd):
    streaming = ["data.memory_limit=0", "data.num_workers=2"]
    folder = new(tmp_path / "run", *streaming, harm=[{"rank": 0, "step": 2, "what": "data_worker"}])
    start = time.monotonic()
    assert go(folder) == 1
    assert time.monotonic() - start < 30 + 40
    told = capfd.readouterr().err
    assert "error: a data worker is gone" in told and "data.num_workers" in told and "Traceback" not in told


def test_shared_memory_that_is_full_ends_the_run_and_says_so(tmp_path):
    """On a /dev/shm of 64 kB, mounted for the run alone."""
    mount = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    command = [
        *mount,
        sys.executable,
        str(CONF.parent / "train.py"),
        *TINY,
        "data.memory_limit=0",
        "data.num_workers=2",
    ]
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=100, check=False)
    assert done.returncode == 1
    assert "error: shared memory is full: enlarge /dev/shm" in done.stderr
    assert "Traceback" not in done.stderr
