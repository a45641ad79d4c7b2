"""Folders of runs: made once, locked while they are trained in, found again to go on."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from carrara.component import CARD, read_component
from carrara.config import Config, check, fingerprint, load_yaml, save_yaml
from carrara.config_check import refuse_interpolations
from carrara.errors import UserError

OF_THE_MACHINE = (
    "devices", "num_nodes", "accelerator", "precision", "compile", "timeout_s",
    "checkpoint_minutes", "keep_checkpoints", "keep_every", "keep_best", "best_score", "best_is_highest",
    "max_restarts", "deterministic", "log_steps",
)  # fmt: skip
"""Settings of the trainer that say how it is run and watched, not what is learnt."""

REQUEUED = tuple(f"trainer.{key}" for key in OF_THE_MACHINE)
"""What a run that goes on by itself (resume=auto) takes anew."""

CHANGEABLE = (*REQUEUED, "trainer.max_steps", "data.urls", "data.val_urls", "data.cache_dir")
"""With resume=RUN; that the shards are the same elsewhere is checked (`callback.inputs`)."""

_CONFIG, _COMPONENT, _LOCK = "config.yaml", "component", ".lock"
_NOT_THE_RUN = ("resume", "dry_run", "sweep", "runs_dir", "logger")  # the same run may differ in these

_log = logging.getLogger(__name__)


def create_run_folder(runs_dir: Path, name: str, data_name: str) -> Path:
    """`runs_dir/<name>-<data_name>/<time>`, new even if another run starts in the same second."""
    return _create(runs_dir / f"{name}-{data_name}")


def create_sweep_folder(runs_dir: Path) -> Path:
    """`runs_dir/sweeps/<time>`; its runs are numbered folders in it."""
    return _create(runs_dir / "sweeps")


def _create(parent: Path) -> Path:
    parent.mkdir(parents=True, exist_ok=True)
    now = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    for number in count(1):
        folder = parent / (now if number == 1 else f"{now}_{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            continue
    raise AssertionError


def made_folder(out: Path) -> Path:
    """The folder that `out=` names, there from now on.

    Raises:
        UserError: there is a file of that name, or it cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out} cannot be made a folder: {error.strerror}") from None
    return out


def save_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Writes the resolved config where the run's processes read it."""
    save_yaml(folder / _CONFIG, config)


def load_config(folder: Path) -> Config:
    """The config of a run, checked as if it were composed now: the file may come from elsewhere.

    Raises:
        UserError: no config there, or one that may not be used.
    """
    if not is_run(folder):
        raise UserError(f"{folder} is no run: it has no {_CONFIG}, or is a part that a run exported")
    config = load_yaml(folder / _CONFIG)
    refuse_interpolations(config, f"{folder / _CONFIG}: ")
    check(config)
    return config


def is_run(folder: Path) -> bool:
    """Whether it is a run's folder; that of the part it exported, which has its own config and card, is not."""
    return (folder / _CONFIG).is_file() and not (folder / CARD).exists()


def component_folder(folder: Path) -> Path:
    """Where a run exports the part it trained."""
    return folder / _COMPONENT


def is_finished(folder: Path) -> bool:
    """A run is finished when its part has been exported after its last step; one made longer is not, until then."""
    if not (component_folder(folder) / CARD).is_file():
        return False
    steps = read_component(component_folder(folder)).card["steps"]
    return bool(steps >= load_config(folder)["trainer"]["max_steps"])


@contextmanager
def claim(folder: Path, wait: bool = False) -> Iterator[None]:
    """Only one launcher at a time trains in a folder; a killed one's claim is gone with it.

    Args:
        wait: for the other one to end, which is said in one line, rather than fail.

    Raises:
        UserError: another process trains there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if not wait:
            raise UserError(f"{folder} is being trained by another process") from None
        _log.info("waiting for %s, which another run is training", folder)
        lock.acquire(poll_interval=0.5)
    try:
        yield
    finally:
        lock.release()


def _is_claimed(folder: Path) -> bool:
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def find_run(reference: str, runs_dir: Path) -> Path:
    """The run that `resume=` or `run=` names: its folder, or the part of the path below `runs_dir`.

    Raises:
        UserError: there is none.
    """
    for folder in (Path(reference), runs_dir / reference):
        if is_run(folder):
            return folder
        if (folder / CARD).exists():
            raise UserError(f"{reference} is a trained part; name the run's folder, which component/ lies in")
    raise UserError(f"there is no run {reference}: a run is a folder with {_CONFIG}, such as those below {runs_dir}/")


def newest_unfinished(runs_dir: Path, config: Mapping[str, Any]) -> Path | None:
    """The unfinished run of the same configuration that was started last and that nobody is training now."""
    wanted = _identity(config)
    files = [*runs_dir.glob(f"*/*/{_CONFIG}"), *runs_dir.glob(f"sweeps/*/*/{_CONFIG}")]
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        folder = file.parent
        if folder.parent.name == "components":
            continue
        try:
            if _identity(load_yaml(file)) == wanted and not is_finished(folder) and not _is_claimed(folder):
                return folder
        except UserError as mistake:  # of a run that is perhaps another
            _log.warning("passing over %s: %s", folder, mistake)
    return None


def _identity(config: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in config.items() if key not in _NOT_THE_RUN}
    if isinstance(trainer := rest.get("trainer"), Mapping):
        rest["trainer"] = {key: value for key, value in trainer.items() if key not in OF_THE_MACHINE}
    return fingerprint(rest)


def continued(saved: Config, now: Config, keys: Iterable[str]) -> Config:
    """A run's config with what may change when it goes on.

    Args:
        now: holds the values of
        keys: dotted, of `CHANGEABLE`.

    Raises:
        UserError: a key that may not.
    """
    config = deepcopy(saved)
    for key in keys:
        if key not in CHANGEABLE:
            raise UserError(f"{key} cannot change in a run that is resumed; only {', '.join(CHANGEABLE)} can")
        node, name = key.split(".")
        config[node][name] = now[node][name]
    model = config.get("model") or {}
    if "max_steps" in model:  # was resolved from the trainer's; the learning rate falls towards it
        model["max_steps"] = config["trainer"]["max_steps"]
    check(config)
    return config
