"""The four commands as a user types them, on tiny settings, in processes of their own."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from carrara.build import load_trained
from carrara.callback.checkpoint_file import newest_valid
from carrara.component import load_component, read_component, save_component
from carrara.errors import UserError
from carrara.launch import launch
from carrara.run_folder import load_config, save_config
from tests.commands import ROOT, TINY, check_scores_again, last, rows, run, trained_part


def test_bare_training_makes_parts_scores_and_a_report(workplace: tuple[Path, Path]) -> None:
    cwd, folder = workplace
    parts = sorted(p.name.split("-")[0] for p in (cwd / "runs" / "components").iterdir())
    assert parts == ["autoencoder", "evaluator"]
    for name in ("fd_evaluator", "kd_evaluator", "clip_score", "r_precision", "prompt_accuracy/all", "loss"):
        assert last(folder, f"val/{name}") == last(folder, f"val/{name}")  # there, and not NaN
        assert f"val_seen/{name}" in {key for row in rows(folder) for key in row}
    assert (folder / "report.html").is_file()
    assert (folder / "samples" / "strip.png").is_file()
    assert json.loads((folder / "component" / "card.json").read_text())["kind"] == "noise_predictor"
    scores = json.loads((folder / "scores.json").read_text())
    assert scores["fingerprint"]["num_generated"] == 8
    assert scores["warnings"]  # 8 images are few


def test_parts_are_trained_once(workplace: tuple[Path, Path]) -> None:
    cwd, _ = workplace
    before = {p: p.stat().st_mtime_ns for p in (cwd / "runs" / "components").rglob("weights.safetensors")}
    done = run("train.py", *TINY, "seed=5", cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert {p: p.stat().st_mtime_ns for p in (cwd / "runs" / "components").rglob("weights.safetensors")} == before


def test_a_part_that_was_replaced_since_is_told(
    workplace: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its latents are not those that the run learned; a judge may be another, whose hash is beside the scores."""
    cwd, folder = workplace
    shutil.copytree(cwd / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    folder = folder.relative_to(cwd) if folder.is_absolute() else folder
    for kind in ("evaluator", "autoencoder"):
        load_trained(folder)
        part = read_component(Path(load_config(folder)["part"][kind]))
        module, card = load_component(part.folder)
        with torch.no_grad():
            next(module.parameters()).add_(0.01)
        save_component(part.folder, kind, part.config, module, card)
    for checkpoint in (None, newest_valid(folder / "checkpoints")):
        with pytest.raises(
            UserError, match=r"cannot be sampled: part\.autoencoder has other weights than it had .*Put back"
        ):
            load_trained(folder, checkpoint=checkpoint)


def test_generate_writes_pictures_grid_and_strip(workplace: tuple[Path, Path]) -> None:
    cwd, folder = workplace
    prompt = "a large red circle, 'quoted' {braces} [brackets] = on black"
    out = cwd / "pictures"
    done = run(
        "generate.py", f"run={folder}", f"prompt={prompt}", "count=3", "sampler=heun", "num_steps=3",
        f"out={out}", cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in out.glob("0*.png")) == ["0000.png", "0001.png", "0002.png"]
    assert (out / "0000.txt").read_text().strip() == prompt
    assert Image.open(out / "grid.png").size == (96, 32)
    assert (out / "strip.png").is_file()


def test_generate_starts_from_a_picture_and_keeps_what_the_mask_does(workplace: tuple[Path, Path]) -> None:
    cwd, folder = workplace
    image = Image.linear_gradient("L").resize((40, 40)).convert("RGB")
    image.save(cwd / "start, {here}.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    mask.save(cwd / "mask.png")
    out = cwd / "painted"
    done = run(
        "generate.py", f"run={folder}", "prompt=a red circle", "count=2", "num_steps=5", f"out={out}",
        f"image={cwd / 'start, {here}.png'}", f"mask={cwd / 'mask.png'}", "guidance_interval=[0.2,0.9]", cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    start = torch.tensor(list(image.resize((32, 32), Image.Resampling.BICUBIC).tobytes())).reshape(32, 32, 3).int()
    for name in ("0000.png", "0001.png"):
        made = torch.tensor(list(Image.open(out / name).tobytes())).reshape(32, 32, 3).int()
        assert (made - start)[:, 16:].abs().max() <= 1
        assert (made - start)[:, :16].abs().float().mean() > 5
    assert len(json.loads((out / "strip.json").read_text())["t"]) == 5
    less = run("generate.py", f"run={folder}", "prompt=x", f"image={cwd / 'mask.png'}", "num_steps=8", "strength=0.25",
               f"out={cwd / 'less'}", cwd=cwd)  # fmt: skip
    assert less.returncode == 0, less.stderr
    assert json.loads((cwd / "less" / "strip.json").read_text())["t"] == [0.125, 0]


def test_evaluate_run_repeats_the_runs_scores(workplace: tuple[Path, Path]) -> None:
    cwd, folder = workplace
    check_scores_again(folder, cwd / "again", cwd)


def test_scores_are_the_same_on_any_number_of_ranks(workplace: tuple[Path, Path]) -> None:
    """F8: 21 samples on 1, 2 and 3 ranks, in chunks of 4, so that no rank has as many as another."""
    cwd, folder = workplace
    scores = []
    for devices in (1, 2, 3):
        done = run(
            "evaluate.py", f"run={folder}", f"trainer.devices={devices}", "trainer.accelerator=cpu",
            "trainer.precision=32-true", "batch_size=4", "num_images=21", f"out={cwd / f'eval{devices}'}", cwd=cwd,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        scores.append(json.loads((cwd / f"eval{devices}" / "scores.json").read_text()))
    assert scores[0]["num_images"]["val/num_images"] == 21
    for other in scores[1:]:
        assert other["hash"] == scores[0]["hash"]
        assert other["scores"] == pytest.approx(scores[0]["scores"], rel=1e-6, abs=1e-9)


def test_evaluate_folder_of_pictures(workplace: tuple[Path, Path]) -> None:
    cwd, folder = workplace
    out = cwd / "to_score"
    assert (
        run("generate.py", f"run={folder}", "prompt=[a red circle,a blue square]", f"out={out}", cwd=cwd).returncode
        == 0
    )
    part = trained_part(cwd, "evaluator")
    data = [a for a in TINY if a.startswith("data.")]
    done = run("evaluate.py", f"images={out}", f"part.evaluator={part}", "trainer.accelerator=cpu", *data, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "fd_evaluator" in done.stdout and "fingerprint" in done.stdout


def test_two_ranks_make_one_run_and_agree(workplace: tuple[Path, Path]) -> None:
    """d: disjoint samples, one folder, and with SGD the same weights as one rank with the same global batch."""
    cwd, _ = workplace
    weights = []
    for devices in (1, 2):
        runs = f"runs_dir=sgd{devices}"
        part = trained_part(cwd, "autoencoder")
        judge = trained_part(cwd, "evaluator")
        done = run(
            "train.py", *TINY, "model/optimizer=sgd", f"trainer.devices={devices}", runs, "trainer.max_steps=3",
            "trainer.learning_rate=0.01", f"part.autoencoder={part}", f"part.evaluator={judge}", cwd=cwd,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (folder,) = (cwd / f"sgd{devices}" / "latent_unet-shapes").iterdir()
        assert len(list((folder / "checkpoints").glob("*.ckpt"))) <= 2
        weights.append(load_file(folder / "component" / "weights.safetensors"))
    moved = 0.0
    for name, value in weights[0].items():
        if value.is_floating_point():
            torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-5)
            moved += float(value.abs().sum())
    assert moved > 0


@pytest.mark.slow
def test_torchruns_processes_train_the_part_and_then_the_run(workplace: tuple[Path, Path], tmp_path: Path) -> None:
    cwd, _ = workplace
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py",
            *TINY, "part.evaluator=null", "logger.wandb.mode=offline", f"runs_dir={tmp_path}/runs",
        ],
        cwd=cwd, text=True, capture_output=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folders = [path.parent for path in tmp_path.glob("runs/*/*/metrics.jsonl")]
    assert sorted(folder.parent.name for folder in folders) == ["components", "latent_unet-shapes"]
    for folder in folders:
        assert (folder / "component" / "card.json").is_file()
        (log,) = folder.glob("wandb/offline-run-*")  # its own
        assert log.name.endswith((folder / "wandb_id.txt").read_text())


def test_ranks_hold_the_same_weights_with_the_shipped_optimizer(
    workplace: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """d: after 20 steps of Muon on two ranks the weights are bitwise equal."""
    cwd, folder = workplace
    config = load_config(folder)
    config["trainer"] |= {"devices": 2, "max_steps": 20}
    config["model"]["max_steps"] = 20
    save_config(tmp_path, config)
    monkeypatch.chdir(cwd)  # where the config's relative paths begin
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent / "helpers"))
    assert launch(tmp_path, 2, module="dump_weights") == 0
    first, second = (torch.load(tmp_path / f"rank{k}.pt", weights_only=True) for k in (0, 1))
    assert first.keys() == second.keys() and len(first) > 50
    assert all(torch.equal(first[name], second[name]) for name in first)
    untrained = load_file(folder / "component" / "weights.safetensors")
    assert any(
        not torch.equal(first[f"predictor.{name}"], v) for name, v in untrained.items() if f"predictor.{name}" in first
    )


def test_killed_run_goes_on_in_its_folder(workplace: tuple[Path, Path], tmp_path: Path) -> None:
    """i: killed −9 after a checkpoint, resumed in the same folder, with the log cut back and no step twice."""
    cwd, _ = workplace
    command = [
        sys.executable, str(ROOT / "train.py"), *TINY, f"runs_dir={tmp_path}/runs", "model=autoencoder",
        "trainer.max_steps=400", "trainer.epoch_samples=16", "trainer.log_steps=1",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=cwd, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        found: list[Path] = []
        for _ in range(600):
            found = list(tmp_path.glob("runs/autoencoder-shapes/*/checkpoints/*.ckpt"))
            if found:
                break
            time.sleep(0.2)
        assert found, "no checkpoint within two minutes"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    folder = found[0].parents[1]
    step = max(int(p.stem.split("=")[1]) for p in folder.glob("checkpoints/*.ckpt"))
    done = run("train.py", f"resume={folder}", f"trainer.max_steps={step + 4}", cwd=cwd)
    assert done.returncode == 0, done.stderr
    steps = [row["step"] for row in rows(folder) if "train/loss" in row]
    assert steps == sorted(set(steps)) and steps[-1] == step + 4
    assert (folder / "component" / "card.json").is_file()


def test_pixels_without_captions_or_evaluator(workplace: tuple[Path, Path], tmp_path: Path) -> None:
    """B4: unconditional, on shards whose captions are not read; nothing is scored by an untrained evaluator."""
    cwd, _ = workplace
    done = run(
        "train.py", *TINY, "experiment=ddpm", "conditioner=none", "data.caption=null", "part.evaluator=null",
        "size.pixel_unet.channels=[16,16,16]", "trainer.max_steps=2", "trainer.batch_size=4",
        "diffusion.num_steps=2", f"runs_dir={tmp_path}/runs", cwd=cwd,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (folder,) = (tmp_path / "runs" / "pixel_unet-shapes").iterdir()
    names = {key for row in rows(folder) for key in row}
    assert "val/loss" in names and "val/fd_evaluator" not in names and "val/clip_score" not in names
    done = run("evaluate.py", f"run={folder}", "likelihood_steps=3", f"out={tmp_path / 'bits'}", cwd=cwd)
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "bits" / "scores.json").read_text())["scores"]
    assert scores["val/bits_per_dim/bound"] > 0 and scores["val/bits_per_dim/ode"] > 0


def test_sweep_makes_one_run_each(workplace: tuple[Path, Path]) -> None:
    """e: four runs, each trained once, the parts trained once for all."""
    cwd, _ = workplace
    done = run("train.py", "-m", "seed=1,2", "diffusion/schedule=cosine,flow", *TINY, cwd=cwd, timeout=500)
    assert done.returncode == 0, done.stderr
    (sweep,) = (cwd / "runs" / "sweeps").iterdir()
    folders = sorted(p for p in sweep.iterdir() if p.is_dir())
    assert [p.name for p in folders] == ["0", "1", "2", "3"]
    configs = [yaml.safe_load((p / "config.yaml").read_text()) for p in folders]
    assert {(c["seed"], c["diffusion"]["schedule"]["_target_"].split(".")[-1]) for c in configs} == {
        (1, "Cosine"), (1, "Flow"), (2, "Cosine"), (2, "Flow"),
    }  # fmt: skip
    assert all((p / "component" / "card.json").is_file() for p in folders)
    assert len(list((cwd / "runs" / "components").glob("autoencoder-*"))) == 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["modle=x"], "model"),
        (["trainer.devces=2"], "trainer.devices"),
        (["+typo=1"], "typo"),
        (["data=laion", "data.urls=nowhere/{000..003}.tar"], "nowhere"),
        (["model=latent_unt"], "latent_unet"),
        (["trainer.batch_size=7", "trainer.devices=2"], "trainer.batch_size"),
        (["diffusion/parameterization=epsilon"], "epsilon"),
        (["size.latent_unet.channels=[16,16]"], "network.attention"),  # one entry a level
        (["network.context_width=77"], "does not fit latents of (4, 8, 8) and captions of width 128"),
        (["network.in_channels=3", "dry_run=true"], "does not fit latents"),
    ],
)
def test_mistakes_get_one_clear_line(arguments: list[str], says: str, tmp_path: Path) -> None:
    done = run("train.py", "trainer.accelerator=cpu", *arguments, cwd=tmp_path)
    assert done.returncode not in (0, 1)
    assert "Traceback" not in done.stderr
    assert says in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error:")]) == 1
    assert not list(tmp_path.glob("*/*"))  # neither data were made nor a part trained


def test_sigterm_ends_a_run_with_143_and_no_traceback(workplace: tuple[Path, Path], tmp_path: Path) -> None:
    cwd, _ = workplace
    command = [
        sys.executable, str(ROOT / "train.py"), *TINY, f"runs_dir={tmp_path}/runs", "model=autoencoder",
        "trainer.max_steps=2000", "trainer.log_steps=1",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=cwd, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        for _ in range(600):
            if any(p.read_text() for p in tmp_path.glob("runs/autoencoder-shapes/*/metrics.jsonl")):
                break
            time.sleep(0.2)
        process.terminate()
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors


def test_a_shard_that_is_no_tar_and_one_without_captions_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.tar").write_text("<html>not found</html>")
    done = run("train.py", "data=laion", "size=demo", "data.urls=bad.tar", "trainer.accelerator=cpu", cwd=tmp_path)
    assert done.returncode == 2
    assert "bad.tar" in done.stderr and "Traceback" not in done.stderr


def test_a_part_of_the_wrong_width_is_named(workplace: tuple[Path, Path]) -> None:
    cwd, _ = workplace
    part = trained_part(cwd, "autoencoder")
    done = run("train.py", *TINY, f"part.autoencoder={part}", "autoencoder.latent_channels=8", cwd=cwd)
    assert done.returncode == 2
    assert "latent_channels" in done.stderr and "Traceback" not in done.stderr
