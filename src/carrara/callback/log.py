"""Where scores go: `metrics.jsonl`, which is the truth, and W&B, which mirrors it."""

import json
import logging
import os
import secrets
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from carrara.callback.json_lines import append, rows
from carrara.errors import UserError, going_on_without

_MODES = ("auto", "online", "offline", "disabled")

_log = logging.getLogger(__name__)


class JsonLines(Logger):
    """Appends one JSON object a call to `metrics.jsonl`.

    Args:
        path: the file.
        batch_size: global batch; images seen = steps · batch_size.
        steps_per_epoch: optimizer steps between two evaluations.
    """

    def __init__(self, path: Path, batch_size: int, steps_per_epoch: int):
        super().__init__()
        self.path = path
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self._held: list[str] = []  # lines that there was no room for

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return self.path.parent.name

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        facts = counters(step, self.batch_size, self.steps_per_epoch)
        values = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        self._held.append(json.dumps(facts | {"time": time.time()} | values))
        with going_on_without(self.path):
            append(self.path, self._held)
            self._held = []

    def scores(self) -> dict[int, dict[str, float]]:
        """What evaluations have logged: step -> scores."""
        found = {}
        for row in rows(self.path):
            values = {name: value for name, value in row.items() if name.startswith("val")}
            if values:
                found[row["step"]] = values
        return found


def counters(step: int, batch_size: int, steps_per_epoch: int) -> dict[str, int]:
    """The three counters every line carries; epochs count from 1, so that one's scores bear its number."""
    return {"step": step, "images_seen": step * batch_size, "epoch": -(-step // steps_per_epoch)}


class Wandb(WandbLogger):
    """W&B with our own counters as axes; offline, and saying so, where there is no key.

    Args:
        folder: the run's; its W&B id is kept there, so that a resumed run is the same run.
        config: resolved, without secrets; `logger.wandb` says which project.
        batch_size, steps_per_epoch: see `JsonLines`.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], batch_size: int, steps_per_epoch: int):
        settings = config["logger"]["wandb"]
        os.environ.setdefault("WANDB_SILENT", "true")  # what is worth saying is said below, once
        if settings["mode"] not in _MODES:
            raise UserError(f"logger.wandb.mode={settings['mode']} is not known; it is one of {', '.join(_MODES)}")
        self._mode_before = os.environ.get("WANDB_MODE")
        mode = self._mode_before or settings["mode"]
        is_first = getattr(rank_zero_only, "rank", 0) == 0  # the others log nothing
        why_not = _why_not_online() if is_first and mode in ("auto", "online") else ""
        if mode == "online" and why_not:
            raise UserError(f"logger.wandb.mode=online cannot be, for {why_not}: see to that, or take auto or offline")
        online = is_first and mode in ("auto", "online") and not why_not
        identity = folder / "wandb_id.txt"
        if is_first:
            if not online and mode != "disabled":
                why = f", for {why_not}" if why_not else ""
                _log.info("W&B: offline%s; later: wandb sync %s/wandb/offline-*", why, folder)
            if not identity.exists():
                identity.write_text(secrets.token_hex(4))
        super().__init__(
            name="/".join(folder.parts[-2:]),
            id=identity.read_text() if identity.exists() else None,
            save_dir=folder,
            project=settings["project"],
            entity=settings["entity"],
            tags=settings["tags"],
            offline=not online,
            group=config["sweep"],
            config=dict(config),
            settings=wandb.Settings(silent=True, console="off", mode="online" if online else "offline"),
        )
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self._axes_defined = False

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        assert step is not None
        if not self._axes_defined:
            self.experiment.define_metric("images_seen")
            self.experiment.define_metric("*", step_metric="images_seen")
            self._axes_defined = True
        facts = counters(step, self.batch_size, self.steps_per_epoch)
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        self.experiment.log(facts | values)

    def finish(self) -> None:
        """Ends W&B's run: another that the same process trains, a part's under torchrun, has one of its own."""
        if self._experiment is None:
            return
        self._experiment.finish()
        if self._mode_before is None:
            os.environ.pop("WANDB_MODE", None)  # Lightning's

    @rank_zero_only
    def log_pictures(self, paths: list[Path], step: int) -> None:
        """Grids of pictures, each with a table of its captions and of what is right."""
        facts: dict[str, Any] = dict(counters(step, self.batch_size, self.steps_per_epoch))
        for path in paths:
            name = path.name.partition("=")[0]
            tiles = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["captions"]
            facts[f"samples/{name}"] = wandb.Image(str(path))
            rows = [[tile["caption"], tile["correct"]] for tile in tiles]
            facts[f"samples/{name}_captions"] = wandb.Table(columns=["caption", "correct"], data=rows)
        self.experiment.log(facts)


def _why_not_online() -> str:
    """What W&B's server cannot be written to for; nothing if it can."""
    try:
        return "" if wandb.login(prompt=False) else "want of a key (wandb login)"
    except wandb.Error as error:  # compute nodes often have a key and no network
        return f"an error of its server ({' '.join(str(error).split())[:200]})"
