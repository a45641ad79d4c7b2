import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from carrara import run_folder
from carrara.callback.checkpoint_file import checkpoint_name
from carrara.command import train
from carrara.command_line import RunFailed
from carrara.component import save_component
from carrara.config import build, compose, load_yaml
from carrara.errors import UserError

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path
from carrara.command import train
from carrara.command_line import cli
train.WORKER = "stub_worker"
cli(lambda argv: train.main(Path(sys.argv.pop(1)), argv[1:]))
"""


INLINE = """
import os
from carrara.command import train
def start(folder, devices):
    import stub_worker
    os.environ["RANK"] = "0"
    stub_worker.run(folder)
train._start_processes = start
"""  # what runs in the processes runs in the launcher, which spares a test their imports


def start(
    conf: Path,
    *arguments: str,
    script: str = SCRIPT,
    said: Path | None = None,
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[str]:
    """`said`: a file for stderr, to be read while it runs."""
    command = [sys.executable, "-c", script, str(conf), *arguments]
    env = os.environ | (environment or {})
    if said is None:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    with said.open("w") as err:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=err, text=True, env=env)


def run(conf: Path, *arguments: str, code: int = 0) -> tuple[str, str]:
    process = start(conf, *arguments)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    return out, err


def folders(pattern: str) -> list[Path]:
    return sorted(path.parent for path in Path("runs").glob(f"{pattern}/config.yaml"))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)


class Started(list[tuple[Path, int]]):
    """The (folder, devices) of what was started; a start exports a part, or raises `failure`."""

    failure: BaseException | None = None

    def start(self, folder: Path, devices: int) -> None:
        self.append((folder, devices))
        if self.failure is not None:
            raise self.failure
        component = run_folder.component_folder(folder)
        component.mkdir(exist_ok=True)
        config = load_yaml(folder / "config.yaml")
        kind = "prior" if config["name"] == "prior" else "evaluator" if "evaluator" in config else "autoencoder"
        card = {"kind": kind, "sha256": "", "steps": config["trainer"]["max_steps"]}
        (component / "card.json").write_text(json.dumps(card))
        (component / "config.yaml").write_text("latent_channels: 3\n")

    @property
    def folders(self) -> list[Path]:
        return [folder for folder, _ in self]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """Starts that are noted rather than made, for `train.main` in this process."""
    started = Started()
    monkeypatch.setattr(train, "_start_processes", started.start)
    return started


def test_a_run_trains_its_missing_part_first(conf):
    _, err = run(conf, "trainer.devices=2", "trainer.accelerator=cpu")
    [part] = folders("components/*")
    [own] = folders("latent_unet-shapes/*")
    assert f"training the autoencoder first, in {part}" in err
    assert load_yaml(own / "config.yaml")["part"] == {"autoencoder": str(part / "component")}
    assert load_yaml(part / "config.yaml")["trainer"]["devices"] == 2
    assert sorted((part / "trained.txt").read_text()) == ["0", "1"]
    assert sorted((own / "trained.txt").read_text()) == ["0", "1"]


def test_a_part_is_trained_once_for_all_who_need_it(conf, started):
    train.main(conf, ["seed=1"])
    train.main(conf, ["seed=2", "trainer.max_steps=6", "trainer.devices=2", "callback.num_images=16"])
    part, first, second = started.folders
    assert part.parent == Path("runs/components")
    assert first.parent == second.parent == Path("runs/latent_unet-shapes")
    others = (
        ["autoencoder.num_blocks=2"],
        ["size.latent_channels=5"],
        ["data.root=other", "data.resolution=48"],
    )
    for overrides in others:  # what shapes the part's weights
        train.main(conf, overrides)
    assert len(folders("components/*")) == 4


def test_a_mistake_is_told_before_anything_is_made(conf):
    out, err = run(conf, "trainer.devces=2", code=2)
    assert (out, err) == ("", "error: unknown key trainer.devces; did you mean 'trainer.devices'?\n")
    for arguments in (
        ["-m", "seed=1,2", "trainer.devices=1,x"],
        ["-m", "+typo=1,2"],
        ["-m", "model=a,latent_unet"],
    ):
        _, err = run(conf, *arguments, code=2)
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert os.listdir() == []


def test_what_the_machine_needs_is_as_the_command_says_it(conf, started):
    """For the parts too, and for a run that goes on by itself."""
    train.main(conf, ["resume=auto", "trainer.max_restarts=2"])
    part, own = started.folders
    assert load_yaml(part / "config.yaml")["trainer"]["max_restarts"] == 2
    (own / "component" / "card.json").unlink()
    train.main(conf, ["resume=auto", "trainer.timeout_s=7200", "trainer.deterministic=true"])
    assert started.folders[2:] == [own]
    trainer = load_yaml(own / "config.yaml")["trainer"]
    assert (trainer["timeout_s"], trainer["deterministic"], trainer["max_restarts"]) == (7200, True, 0)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=imagen", "pipeline.augmentation=0.8"], r"pipeline\.augmentation=0\.8 lies outside of \[0, 0\.5\]"),
        (["model=imagen", "model.factor=4"], r"part\.small_pictures makes pictures of 32 / 2 pixels, .* of 32 / 4"),
        (["model=imagen", "part.small_pictures=null"], r"part\.small_pictures=null: model=imagen is sampled after it"),
        (["model=dalle2", "part.prior=null"], r"part\.prior=null: model=dalle2 is sampled after it"),
        (["model=latent_unet", "part.autoencoder=null"], r"part\.autoencoder=null: model=latent_unet needs a trained"),
        (
            ["model=super_resolution", "part.classifier=cnn"],
            r"part\.classifier: no score of model=super_res",
        ),
        (["model=super_resolution", "model.factor=0"], r"model\.factor=0 must be a whole number"),
    ],
)
def test_stages_that_do_not_fit_are_told_before_they_are_trained(overrides, message, started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cnn = {"_target_": "carrara.classifier.cnn.CNN", "channels": [8, 8], "num_classes": 3}
    save_component(Path("cnn"), "classifier", cnn, build(cnn), {"fingerprint": "", "data": {}, "scores": {}})
    with pytest.raises(UserError, match=message):
        train.main(ROOT / "conf", [*overrides, "size=demo"])
    assert started == [] and os.listdir() == ["cnn"]


def test_a_clip_that_was_trained_to_be_the_evaluator_does_not_judge(started, tmp_path, monkeypatch):
    """Before they are trained, their components cannot tell that they are one."""
    monkeypatch.chdir(tmp_path)
    made = [f"data.make.{name}=4" for name in ("num_train", "num_val", "num_val_seen")]
    with pytest.raises(UserError, match=r"part\.evaluator=.* is part\.clip, too, which would judge what it has made"):
        train.main(ROOT / "conf", ["model=dalle2", "size=demo", *made])
    assert {folder.parent.name for folder in started.folders} == {"components"}


def test_a_sweep_makes_a_folder_for_each_run(conf, started):
    train.main(conf, ["-m", "seed=1,2", "trainer.max_steps=3,4", "trainer.accelerator=cpu"])
    part, *runs = started.folders
    assert folders("components/*") == [part]
    assert [folder.name for folder in runs] == ["0", "1", "2", "3"]
    [sweep] = {folder.parent for folder in runs}
    assert sweep.parent == Path("runs/sweeps").resolve()
    configs = [load_yaml(folder / "config.yaml") for folder in runs]
    assert [(c["seed"], c["trainer"]["max_steps"]) for c in configs] == [(1, 3), (1, 4), (2, 3), (2, 4)]
    assert {c["sweep"] for c in configs} == {sweep.name}
    assert {c["part"]["autoencoder"] for c in configs} == {str(part / "component")}
    assert sorted(os.listdir(sweep)) == ["0", "1", "2", "3", "multirun.yaml"]
    assert sorted(os.listdir()) == ["data", "runs"]
    assert sorted(os.listdir("runs")) == ["cache", "components", "sweeps"]
    assert not [path for path in Path().rglob("*") if path.name == ".hydra" or path.suffix == ".log"]


def test_what_cannot_be_is_told_before_a_sweep_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    singular = ["diffusion/schedule=cosine,zero_terminal_snr", "diffusion/parameterization=epsilon"]
    for more in ([], ["dry_run=true"]):
        with pytest.raises(UserError, match="zero"):
            train.main(ROOT / "conf", ["-m", "model=pixel_unet", "size=demo", *singular, *more])
    assert os.listdir() == []


def test_a_plan_does_not_hide_a_mistake_in_data_that_are_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = ["model=autoencoder", *(f"data.make.{key}={n}" for key, n in (("num_train", 24), ("num_val", 4)))]
    wrong = [*few, "dry_run=true", "data.caption=shpae"]
    train.main(ROOT / "conf", wrong)
    assert "they are made when training starts" in capsys.readouterr().out
    build(compose(ROOT / "conf", "train", few).config["data"])
    train.main(ROOT / "conf", wrong)
    assert "holds no image with a caption (shpae); set data.caption" in capsys.readouterr().out


@pytest.mark.parametrize("failure", [RunFailed(3), UserError("no captions")])
def test_a_sweep_goes_on_after_a_run_that_fails(conf, started, failure, capfd):
    started.failure = failure
    with pytest.raises(RunFailed) as failed:
        train.main(conf, ["-m", "seed=1,2", "model=autoencoder"])
    assert failed.value.code == (3 if isinstance(failure, RunFailed) else 2)
    assert [folder.name for folder in started.folders] == ["0", "1"]
    assert capfd.readouterr().err.count("error: no captions\n") == (0 if isinstance(failure, RunFailed) else 2)


def test_a_signal_stops_a_sweep(conf, started):
    started.failure = SystemExit(143)
    with pytest.raises(SystemExit) as stopped:
        train.main(conf, ["-m", "seed=1,2", "model=autoencoder"])
    assert stopped.value.code == 143
    assert [folder.name for folder in started.folders] == ["0"]


def test_two_sweeps_in_a_second_have_their_folders(conf, started):
    for _ in range(2):
        train.main(conf, ["-m", "seed=1", "model=autoencoder"])
    assert len({folder.parent for folder in started.folders}) == 2


def test_two_runs_train_a_part_once(conf):
    Path("hold").touch()
    said = [Path(f"said_{seed}") for seed in (1, 2)]
    both = [start(conf, f"seed={seed}", script=INLINE + SCRIPT, said=path) for seed, path in enumerate(said)]
    wait_until(lambda: any("waiting for" in path.read_text() for path in said))
    Path("hold").unlink()
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    errors = [path.read_text() for path in said]
    [part] = folders("components/*")
    assert (part / "trained.txt").read_text() == "0"
    assert sum("training the autoencoder first" in err for err in errors) == 1
    assert sum(f"waiting for {part}" in err for err in errors) == 1
    assert sum(f"using {part}" in err for err in errors) == 1
    assert len(folders("latent_unet-shapes/*")) == 2


def test_a_stopped_part_goes_on_where_it_was(conf, started):
    started.failure = RunFailed(3)
    with pytest.raises(RunFailed):
        train.main(conf, [])
    started.failure = None
    train.main(conf, ["trainer.devices=2"])
    stopped, again, _ = started
    assert (stopped[0], stopped[1]) == (again[0], 1)
    assert load_yaml(stopped[0] / "config.yaml")["trainer"]["devices"] == 2


def test_torchrun_starts_the_ranks(conf):
    port = str(20000 + os.getpid() % 10000)
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}

    def start_ranks(*arguments: str) -> tuple[list[int], list[str]]:
        envs = [{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        ranks = [start(conf, *arguments, environment=env) for env in envs]
        errors = [process.communicate(timeout=120)[1] for process in ranks]
        return [process.returncode for process in ranks], errors

    codes, errors = start_ranks()
    assert codes == [0, 0], errors
    [part], [own] = folders("components/*"), folders("latent_unet-shapes/*")
    assert sorted((part / "trained.txt").read_text()) == ["0", "1"]
    assert sorted((own / "trained.txt").read_text()) == ["0", "1"]
    assert load_yaml(own / "config.yaml")["trainer"]["devices"] == 2
    codes, errors = start_ranks("trainer.devices=4")
    assert codes == [2, 1]
    assert errors == ["error: trainer.devices=4, but 2 were started: leave trainer.devices out\n", ""]


def test_a_run_is_resumed_in_its_folder(conf, started):
    train.main(conf, ["model=autoencoder", "seed=5"])
    [(folder, _)] = started
    (folder / "component" / "card.json").unlink()
    train.main(conf, [f"resume={folder}", "trainer.devices=2", "trainer.max_steps=9"])
    assert started[1] == (folder, 2)
    config = load_yaml(folder / "config.yaml")
    assert (config["seed"], config["trainer"]["max_steps"], config["resume"]) == (5, 9, None)
    with pytest.raises(UserError, match="is finished"):
        train.main(conf, [f"resume={folder}"])
    started.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        train.main(conf, [f"resume={folder}", "trainer.max_steps=12"])
    started.failure = None
    train.main(conf, [f"resume={folder}"])  # stopped on the longer way: not finished, though it has been exported
    assert started.folders == [folder] * 4
    with pytest.raises(UserError, match="is finished"):
        train.main(conf, [f"resume={folder}"])


def test_a_resumed_run_is_dealt_out_by_its_own_batch(conf, started):
    train.main(conf, ["model=autoencoder", "trainer.batch_size=9"])  # the model that `train` takes by default has 8
    [(folder, _)] = started
    (folder / "component" / "card.json").unlink()
    train.main(conf, [f"resume={folder}", "trainer.devices=3"])
    assert started[1] == (folder, 3)


def test_more_machines_than_one_have_to_be_started(conf, started, capsys):
    with pytest.raises(UserError, match=r"trainer\.num_nodes=2: this machine is one; start it with torchrun or srun"):
        train.main(conf, ["model=autoencoder", "trainer.num_nodes=2"])
    assert started == []
    train.main(conf, ["model=autoencoder"])
    [(folder, _)] = started
    (folder / "component" / "card.json").unlink()
    config = load_yaml(folder / "config.yaml")
    run_folder.save_config(folder, {**config, "trainer": {**config["trainer"], "num_nodes": 4}})
    train.main(conf, [f"resume={folder}"])  # goes on on one
    assert load_yaml(folder / "config.yaml")["trainer"]["num_nodes"] == 1


def test_a_resumed_run_finds_its_shards_elsewhere(conf, started):
    train.main(conf, ["model=autoencoder"])
    [(folder, _)] = started
    (folder / "component" / "card.json").unlink()
    shutil.copytree("data/shapes", "elsewhere")
    train.main(conf, [f"resume={folder}", "data.urls=elsewhere/train-*.tar", "data.val_urls=elsewhere/val-*.tar"])
    data = load_yaml(folder / "config.yaml")["data"]
    assert (data["urls"], data["val_urls"]) == ("elsewhere/train-*.tar", "elsewhere/val-*.tar")
    (folder / "component" / "card.json").unlink()
    with pytest.raises(UserError, match=r"data\.resolution cannot change"):
        train.main(conf, [f"resume={folder}", "data.resolution=16"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=3", "seed cannot change in a run that is resumed"),
        ("trainer.batch_size=16", "trainer.batch_size cannot change"),
        ("data=laion", "data cannot change"),
        ("trainer.devices=3", "trainer.batch_size=8 cannot be divided"),
    ],
)
def test_a_resumed_run_stays_the_same(conf, started, override, message):
    train.main(conf, ["model=autoencoder"])
    [(folder, _)] = started
    (folder / "component" / "card.json").unlink()
    before = (folder / "config.yaml").read_text()
    with pytest.raises(UserError, match=message):
        train.main(conf, [f"resume={folder}", override])
    assert (folder / "config.yaml").read_text() == before


def test_a_resumed_run_is_not_made_shorter_than_it_is(conf, started):
    train.main(conf, ["model=autoencoder", "trainer.max_steps=9"])
    [(folder, _)] = started
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / checkpoint_name(6)).touch()
    before = (folder / "config.yaml").read_text()
    with pytest.raises(UserError, match=r"trainer\.max_steps=5: .* has reached step 6"):
        train.main(conf, [f"resume={folder}", "trainer.max_steps=5"])
    assert (folder / "config.yaml").read_text() == before
    train.main(conf, [f"resume={folder}", "trainer.max_steps=12"])
    assert load_yaml(folder / "config.yaml")["trainer"]["max_steps"] == 12


def test_a_part_that_runs_share_stays_what_its_name_says(conf, started):
    train.main(conf, [])
    part = started.folders[0]
    with pytest.raises(UserError, match=r"is a part that runs share: for trainer\.max_steps=9 train it by itself"):
        train.main(conf, [f"resume={part}", "trainer.max_steps=9"])
    (part / "component" / "card.json").unlink()
    train.main(conf, [f"resume={part}"])
    assert started.folders[-1] == part


def test_resume_names_what_it_does_not_find(conf, started):
    with pytest.raises(UserError, match="there is no run nowhere"):
        train.main(conf, ["resume=nowhere"])


def test_resume_auto_takes_the_newest_unfinished_run_of_the_configuration(conf, started):
    arguments = ["resume=auto", "trainer.devices=2"]
    train.main(conf, arguments)
    part, first = (folder for folder, _ in started)
    assert part.parent.name == "components"
    train.main(conf, arguments)  # the first is finished
    second = started[-1][0]
    assert second != first
    (second / "component" / "card.json").unlink()
    train.main(conf, ["resume=auto", "seed=1"])  # another configuration
    assert started[-1][0] not in (first, second)
    with run_folder.claim(second):
        train.main(conf, arguments)  # somebody is training it
        assert started[-1][0] != second
    (started[-1][0] / "component" / "card.json").unlink()
    os.utime(second / "config.yaml", (1, 1))
    newest = started[-1][0]
    train.main(conf, ["resume=auto", "trainer.devices=1"])
    assert started[-1] == (newest, 1)
    assert load_yaml(newest / "config.yaml")["trainer"]["devices"] == 1


def test_resume_auto_in_a_sweep_goes_on_with_each_of_its_runs(conf, started):
    arguments = ["-m", "resume=auto", "seed=1,2", "model=autoencoder"]
    train.main(conf, arguments)
    first = started.folders
    for folder in first:
        (folder / "component" / "card.json").unlink()
    train.main(conf, arguments)
    assert [folder.resolve() for folder in started.folders[2:]] == first
    train.main(conf, [*arguments, "trainer.batch_size=4"])  # another configuration: runs of its own
    assert not set(started.folders[4:]) & set(started.folders[:4]) and len(started) == 6
    (first[1] / "component" / "card.json").unlink()
    train.main(conf, ["resume=auto", "seed=2", "model=autoencoder"])
    assert started.folders[-1].resolve() == first[1]


@pytest.mark.parametrize("content", ["", "a: [1", "trainer: 5", None])
def test_resume_auto_passes_over_a_run_that_cannot_be_read(conf, started, content, caplog):
    arguments = ["resume=auto", "model=autoencoder"]
    train.main(conf, arguments)
    [folder] = started.folders
    (folder / "component" / "card.json").unlink()
    broken = folder.with_name("broken") / "config.yaml"
    broken.parent.mkdir()
    if content is None:
        broken.mkdir()
    else:
        broken.write_text(content)
    train.main(conf, arguments)
    assert started.folders == [folder, folder]
    assert (f"passing over {broken.parent}: {broken}" in caplog.text) == (content != "trainer: 5")  # readable


def test_missing_shards_are_told_before_a_folder_is_made(conf, started):
    with pytest.raises(UserError, match=r"data\.urls"):
        train.main(conf, ["data.urls=nowhere/{0..3}.tar", "data.make=null"])
    assert started == []
    assert folders("*/*") == []


def test_too_many_devices_are_told(conf, started):
    with pytest.raises(UserError, match=r"trainer\.devices=2, but this machine has 0 GPUs"):
        train.main(conf, ["trainer.accelerator=gpu", "trainer.devices=2"])
    with pytest.raises(UserError, match=r"trainer\.precision=16-mixed is of GPUs alone"):
        train.main(conf, ["trainer.accelerator=cpu", "trainer.precision=16-mixed"])


def test_cfg_shows_every_key(conf):
    out, _ = run(conf, "--cfg", "job", "seed=4")
    assert "seed: 4" in out
    out, _ = run(conf, "--help")
    assert "model: autoencoder, latent_unet" in out
    assert os.listdir() == []
