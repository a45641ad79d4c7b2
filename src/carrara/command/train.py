"""`python train.py [model=…] [data=…] [key=value …]`: trains one model, and first the parts it lacks."""

import importlib.util
import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig

from carrara import parts, run_folder
from carrara.command_line import RunFailed, quote, quote_free_text, show_error, split_flags
from carrara.config import Composed, Config, build, check, compose, resolve, size_of, sweep_overrides
from carrara.errors import UserError
from carrara.parts_check import check_judge
from carrara.signals import EXIT_CODES
from carrara.world import Relay, World, outside_world

NAME = "train"
WORKER = "carrara.worker"  # has run(folder)

_log = logging.getLogger(__name__)

Start = Callable[[Path, int], None]  # trains the run in a folder on so many devices of this machine, to its end


def main(conf_dir: Path, argv: list[str]) -> None:
    """Trains as `argv` says.

    Raises:
        UserError: a mistake, found before anything is built where it can be.
        RunFailed: training failed, and why has been shown.
    """
    flags, overrides = split_flags(quote_free_text(argv))
    sweep = bool({"-m", "--multirun"} & set(flags))
    if flags and not sweep:  # --help, --cfg job, ...
        compose(conf_dir, NAME, overrides)
        _hydra_main(conf_dir, [*flags, *overrides])
        return
    world = outside_world()
    if sweep:
        _sweep(conf_dir, overrides, world)
    elif world is None:
        train(Job(conf_dir, compose(conf_dir, NAME, overrides), tuple(overrides)), _start_processes)
    else:
        _train_in_world(conf_dir, overrides, world)


@dataclass(frozen=True)
class Job:
    """One run to train.

    Attributes:
        overrides: of the command line.
        folder: for the run, if it is a new one; None makes one.
    """

    conf_dir: Path
    composed: Composed
    overrides: tuple[str, ...]
    folder: Path | None = None
    world: World | None = None


def train(job: Job, start: Start) -> None:
    """Trains the parts that are missing, then the run, in its folder."""
    from carrara.command.train_check import (  # here: a misspelt key does not wait for torch
        check_cache,
        check_modules,
        check_stages,
    )
    from carrara.precision import check_machine

    config, resumed = _config(job)
    begun = resumed is not None and _has_all(resumed, config)
    composed = Composed({**config, "start": None} if begun else config, job.composed.choices, job.composed.size)
    check_modules(config, parts.needed_parts(job.conf_dir, composed, None))  # told before data are made
    if config["dry_run"]:
        _show_plan(job.conf_dir, composed)
        return
    check_machine(config["trainer"])
    if job.world is None and (nodes := config["trainer"]["num_nodes"]) > 1:
        raise UserError(
            f"trainer.num_nodes={nodes}: this machine is one; start it with torchrun or srun on all of them"
        )
    data = build(config["data"])
    # one process makes and scans what is missing
    needed = parts.needed_parts(job.conf_dir, composed, data.fingerprint)
    devices = config["trainer"]["devices"]
    for part in needed:
        if part.doubt:
            _log.warning("%s", part.doubt)
    needed = parts.imported(needed, Path(config["runs_dir"]))
    check_cache(config, needed, data)
    parts.train_missing(needed, lambda folder: start(folder, devices))
    check_judge(parts.folders(needed))
    config = parts.with_parts(config, needed)
    check_stages(config)
    runs_dir = Path(config["runs_dir"])
    folder = resumed
    if config["resume"] == "auto":
        folder = run_folder.newest_unfinished(runs_dir, config)
        if folder is not None:
            _log.info("resuming %s", folder)
            config = run_folder.continued(run_folder.load_config(folder), config, run_folder.REQUEUED)
    if folder is None:
        folder = job.folder or run_folder.create_run_folder(runs_dir, config["name"], config["data"]["name"])
    with run_folder.claim(folder):
        run_folder.save_config(folder, {**config, "resume": None})
        start(folder, devices)


def _config(job: Job) -> tuple[Config, Path | None]:
    """The config to train, and with `resume=RUN` the folder it came from."""
    config = job.composed.config
    given = [override.lstrip("+~").partition("=")[0] for override in job.overrides]
    if job.world is not None:
        config = {**config, "trainer": job.world.fill_in(config["trainer"], set(given))}
        check(config)
    if config["resume"] in (None, "auto"):
        return config, None
    folder = run_folder.find_run(str(config["resume"]), Path(config["runs_dir"]))
    changed = [key for key in given if key not in ("resume", "dry_run", "runs_dir")]
    if run_folder.is_finished(folder) and "trainer.max_steps" not in changed:
        raise UserError(f"{folder} is finished; more trainer.max_steps=… make it longer")
    changed.append("trainer.num_nodes")  # as many as there are now
    if job.world is not None:
        changed.append("trainer.devices")
    if "trainer.max_steps" in changed:
        _check_length(folder, config["trainer"]["max_steps"])
    saved = run_folder.continued(run_folder.load_config(folder), config, changed)
    return {**saved, "dry_run": config["dry_run"]}, folder


def _has_all(folder: Path, config: Config) -> bool:
    """Whether a run has checkpoints that hold all of its network: what it began with is not needed any more."""
    from carrara.callback.checkpoint_file import checkpoints

    return bool(checkpoints(folder / "checkpoints")) and config["model"].get("lora") is None


def _check_length(folder: Path, max_steps: int) -> None:
    """A run is not made shorter than it is, and what runs share stays what its name says."""
    from carrara.callback.checkpoint_file import checkpoints

    if folder.parent.name == "components":
        raise UserError(
            f"{folder} is a part that runs share: for trainer.max_steps={max_steps} train it by itself, and name that "
            "run with part.…=RUN"
        )
    reached = max(checkpoints(folder / "checkpoints"), default=0)
    if max_steps < reached:
        raise UserError(f"trainer.max_steps={max_steps}: {folder} has reached step {reached}; no run is made shorter")


def _show_plan(conf_dir: Path, composed: Composed) -> None:
    from carrara.data.module import ShardData
    from carrara.plan import describe

    node = {**composed.config["data"], "make": None}  # a plan makes nothing
    data: ShardData | UserError
    try:
        data = build(node)
    except UserError as mistake:
        there = any(Path(composed.config["data"].get("root") or "").glob("*.tar"))
        to_make = composed.config["data"].get("make") and not there
        data = UserError("they are made when training starts") if to_make else mistake
    data_fingerprint = None if isinstance(data, UserError) else data.fingerprint
    needed = parts.needed_parts(conf_dir, composed, data_fingerprint)
    print(describe(composed.config, needed, data))


# --- processes ---


def _start_processes(folder: Path, devices: int) -> None:
    from carrara.launch import launch

    code = launch(folder, devices, WORKER, run_folder.load_config(folder)["trainer"]["max_restarts"])
    if code in EXIT_CODES:
        sys.exit(code)
    if code:
        raise RunFailed(code)


def _train_in_world(conf_dir: Path, overrides: list[str], world: World) -> None:
    """The processes are there: rank 0 names the folders of runs, and all of them train there."""
    worker = importlib.import_module(WORKER)
    if world.rank > 0:
        try:
            with closing(Relay(world).receive()) as folders:
                for folder in folders:
                    worker.run(Path(folder))
        except ConnectionError:
            raise RunFailed(1) from None
        return
    with _ending(Relay(world)) as relay:

        def start(folder: Path, devices: int) -> None:
            relay.send(str(folder))
            worker.run(folder)

        train(Job(conf_dir, compose(conf_dir, NAME, overrides), tuple(overrides), world=world), start)


@contextmanager
def _ending(relay: Relay) -> Iterator[Relay]:
    try:
        yield relay
    except BaseException:
        relay.end(failed=True)
        raise
    relay.end()


# --- sweeps ---


def _sweep(conf_dir: Path, overrides: list[str], world: World | None) -> None:
    """Every run of `-m`, by the launcher that Hydra is told to use; all are checked before the first starts."""
    if world is not None:
        raise UserError("-m starts its own processes: leave torchrun or srun out, or take hydra/launcher=slurm")
    _check_launcher(overrides)
    from carrara.command.train_check import check_modules

    runs = [compose(conf_dir, NAME, run) for run in sweep_overrides(conf_dir, overrides)]
    if any(run.config["resume"] not in (None, "auto") for run in runs):
        raise UserError("resume=RUN goes on with one run; leave -m out")
    for run in runs:
        check_modules(run.config, parts.needed_parts(conf_dir, run, None))
    if all(run.config["dry_run"] for run in runs):
        for run in runs:
            _show_plan(conf_dir, run)
        return
    if not any(override.startswith("hydra.sweep.dir=") for override in overrides):
        folder = run_folder.create_sweep_folder(Path(runs[0].config["runs_dir"]))
        overrides = [*overrides, f"hydra.sweep.dir={quote(str(folder))}"]
    _hydra_main(conf_dir, ["--multirun", *overrides])


def _check_launcher(overrides: list[str]) -> None:
    if "hydra/launcher=slurm" not in overrides:
        return
    if importlib.util.find_spec("submitit") is None:
        raise UserError("hydra/launcher=slurm needs a package: pip install 'carrara[slurm]'")
    if shutil.which("srun") is None:
        raise UserError(
            "hydra/launcher=slurm: there is no srun here; start the sweep on a machine of the Slurm cluster"
        )


def _hydra_main(conf_dir: Path, arguments: list[str]) -> None:
    """Hydra's own main, for sweeps and for `--help`, `--cfg`, ...; its errors come back as exceptions."""
    application = hydra.main(version_base="1.3", config_path=str(conf_dir.resolve()), config_name=NAME)(run_of_sweep)
    argv = patch.object(sys, "argv", [f"{NAME}.py", *arguments])
    with argv, patch.dict("os.environ", HYDRA_FULL_ERROR="1"):
        try:
            application()
        except HydraException as error:
            raise UserError(" ".join(str(error).split())) from None


def run_of_sweep(settings: DictConfig) -> None:
    """One run of a sweep, here or on the machine that Hydra's launcher found for it."""
    job = HydraConfig.get()
    conf_dir = Path(next(s.path for s in job.runtime.config_sources if s.provider == "main"))
    folder = Path(job.runtime.output_dir)
    try:
        config = resolve(settings)
        config["sweep"] = folder.parent.name  # W&B's group
        check(config)
        choices = {key: value for key, value in job.runtime.choices.items() if isinstance(value, str)}
        overrides = tuple(str(override) for override in job.overrides.task)
        _log.info("run %s: %s", folder, " ".join(overrides))
        train(Job(conf_dir, Composed(config, choices, size_of(settings)), overrides, folder), _start_processes)
    except UserError as mistake:  # the sweep goes on with its other runs, and ends with this one's code
        show_error(mistake)
        raise RunFailed(2) from None
