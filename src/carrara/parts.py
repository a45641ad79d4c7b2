"""The trained parts a run needs: named, found by fingerprint, or trained first, once for all.

`carrara.published` is imported where something published is named: with it comes torch.
"""

import logging
import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carrara import run_folder
from carrara.component import CARD, read_component
from carrara.config import Composed, Config, fingerprint
from carrara.errors import UserError
from carrara.parts_check import check_captions, check_interface, check_judge
from carrara.parts_composed import AUTO, compose_part, kinds_of
from carrara.start import check_lora, check_start, network_of

if TYPE_CHECKING:
    from carrara.published.folder import Published

STAGES = ("small_pictures", "prior")
"""Parts that are whole runs, which know how they are sampled; the rest are components."""

_NOT_THE_PART = (
    "runs_dir", "resume", "dry_run", "sweep", "logger", "callback", "size", "part", "data",
)  # fmt: skip
_THERE = "a component's folder or a finished run"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Part:
    """A part a run needs, or begins with.

    Attributes:
        folder: the component; None while the data, which the fingerprint is of, is not there, and of a published one.
        run: the folder it is trained in, of an `auto` part.
        config: of that training.
        parts: what that training needs itself.
        published: where it is, if it has to be imported.
        node: of the config that names it, by its kind.
        architecture: the node that a named part is built from.
        doubt: what may be wrong with it, and need not be.
    """

    kind: str
    folder: Path | None
    run: Path | None = None
    config: Config = field(default_factory=dict)
    parts: "tuple[Part, ...]" = ()
    published: "Published | None" = None
    node: str = "part"
    architecture: Config = field(default_factory=dict)
    doubt: str = ""

    def is_ready(self) -> bool:
        """Whether the component is there now."""
        return self.folder is not None and (self.folder / CARD).is_file()


def needed_parts(conf_dir: Path, composed: Composed, data_fingerprint: str | None) -> list[Part]:
    """The parts that the run's `part` node names, and what it starts with; nothing is trained or written.

    Args:
        data_fingerprint: of the contents of the run's data; None where they are not there yet.

    Raises:
        UserError: a part that does not exist, is of another kind, does not fit the run's network, or judges itself.
    """
    config = composed.config
    check_captions(config)
    found = []
    for kind, reference in (config.get("part") or {}).items():
        if reference is not None and kind == config.get("name"):
            raise UserError(
                f"part.{kind}={reference}: model={kind} trains its own; take another {kind}=…, or leave it out"
            )
        if reference == AUTO:
            found.append(_auto_part(conf_dir, composed, kind, data_fingerprint))
        elif reference is not None:
            part = _named(str(reference), kind, Path(config["runs_dir"]), f"{_THERE}, or {AUTO}")
            check_interface(kind, str(part.folder or reference), part.architecture, config)
            found.append(part)
    check_judge(folders(found))
    start = start_of(config)
    return found if start is None else [*found, start]


def folders(parts: list[Part]) -> dict[str, Path]:
    """The components that are there, by kind."""
    return {part.kind: part.folder for part in parts if part.folder is not None and part.is_ready()}


def start_of(config: Config) -> Part | None:
    """What the run's training begins with, if it is said; nothing is written.

    Raises:
        UserError: there is no such thing, or it does not fit the run's network.
    """
    check_lora(config)
    reference = (config.get("start") or {}).get("network")
    if reference is None:
        return None
    folder = _component(str(reference), Path(config["runs_dir"]))
    if folder is not None:
        doubt = check_start(str(reference), *network_of(folder), config)
        return Part("network", folder, node="start", doubt=doubt)
    published = _published(f"start.network={reference}", str(reference), "network")
    if published is None:
        raise _missing(f"start.network={reference}", str(reference), f"{_THERE}, or a published U-Net")
    from carrara.published.importing import node_of, trained_with

    doubt = check_start(str(reference), node_of(published, "network"), trained_with(published), config)
    return Part("network", None, published=published, node="start", doubt=doubt)


def imported(parts: list[Part], runs_dir: Path) -> list[Part]:
    """The same with published ones as components, which are made once."""

    def component(part: Part) -> Part:
        if part.published is None:
            return part
        from carrara.published.importing import import_published

        return replace(part, folder=import_published(part.published, part.kind, runs_dir), published=None)

    return [component(part) for part in parts]


def with_parts(config: Config, parts: list[Part]) -> Config:
    """The run's config with concrete component folders in `part` and `start`."""
    config = deepcopy(config)
    for part in parts:
        if part.folder is not None:
            config[part.node][part.kind] = _portable(part.folder)
    return config


def with_architectures(config: Config, parts: list[Part]) -> Config:
    """The run's config with its named parts as they are, whatever its own settings of them."""
    return config | {part.kind: part.architecture for part in parts if part.architecture and part.kind in config}


def train_missing(parts: list[Part], train: Callable[[Path], None]) -> None:
    """Trains what is missing, in the order in which it is needed; an unfinished part goes on where it was.

    Args:
        train: runs the run in a folder to its end.
    """
    for part in in_order(parts):
        if part.is_ready():
            continue
        assert part.run is not None
        with run_folder.claim(part.run, wait=True):
            if part.is_ready():  # by whom we waited for
                _log.info("using %s", part.run)
                continue
            run_folder.save_config(part.run, part.config)
            _log.info("training the %s first, in %s", part.kind, part.run)
            train(part.run)
        if not part.is_ready():
            raise UserError(f"the {part.kind} in {part.run} was trained and not exported; start again to go on with it")


def in_order(parts: "list[Part] | tuple[Part, ...]") -> list[Part]:
    """Each part once, after those it needs itself."""
    found: list[Part] = []
    for part in parts:
        found += [one for one in (*in_order(part.parts), part) if one not in found]
    return found


def find_component(reference: str, kind: str, runs_dir: Path) -> Path:
    """The component folder that a reference names: itself, a run's, one below `runs_dir/components`, or published.

    Raises:
        UserError: there is none, or it is of another kind.
    """
    [part] = imported([_named(reference, kind, runs_dir, _THERE)], runs_dir)
    assert part.folder is not None
    return part.folder


def _named(reference: str, kind: str, runs_dir: Path, others: str) -> Part:
    """A part that is there; nothing is written. `others` may be named instead."""
    folder = _component(reference, runs_dir)
    if folder is not None:
        config = read_component(folder, *kinds_of(kind)).config
        if kind in STAGES and not run_folder.is_run(folder.parent):
            raise UserError(f"part.{kind}={reference} is a component alone; name its run, which samples it")
        return Part(kind, folder, architecture=config)
    published = _published(f"part.{kind}={reference}", reference, kind)
    if published is None:
        raise _missing(f"part.{kind}={reference}", reference, others)
    from carrara.published.importing import node_of

    return Part(kind, None, published=published, architecture=node_of(published, kind))


def _component(reference: str, runs_dir: Path) -> Path | None:
    for base in (Path(reference), runs_dir / "components" / reference):
        for folder in (base, run_folder.component_folder(base)):
            if (folder / CARD).is_file():
                return folder
    return None


def _published(key: str, reference: str, kind: str) -> "Published | None":
    from carrara.published.importing import look_up

    try:
        return look_up(reference, kind)
    except UserError as mistake:
        raise UserError(f"{key}: {str(mistake).removeprefix(f'{reference}: ')}") from None


def _missing(key: str, reference: str, others: str) -> UserError:
    wrong = "it has no finished component" if Path(reference).is_dir() else "there is no such folder"
    return UserError(f"{key}: {wrong}; name {others}")


def _auto_part(conf_dir: Path, composed: Composed, kind: str, data_fingerprint: str | None) -> Part:
    own = compose_part(conf_dir, composed, kind)
    parts = needed_parts(conf_dir, own, data_fingerprint)
    config = with_parts(own.config, parts)
    if data_fingerprint is None:
        return Part(kind, None, None, config, tuple(parts))
    run = Path(config["runs_dir"]) / "components" / f"{kind}-{_part_fingerprint(config, parts, data_fingerprint)}"
    return Part(kind, run_folder.component_folder(run), run, config, tuple(parts))


def _part_fingerprint(config: Mapping[str, Any], parts: list[Part], data_fingerprint: str) -> str:
    """Of what shapes the part's weights: not of where it lies, how it is watched, or the machine."""
    content = {key: value for key, value in config.items() if key not in _NOT_THE_PART}
    content["trainer"] = {k: v for k, v in config["trainer"].items() if k not in run_folder.OF_THE_MACHINE}
    content["data"] = [data_fingerprint, config["data"].get("stages") or []]
    content["part"] = {part.kind: _content_of(part) for part in parts}
    return fingerprint(content)


def _content_of(part: Part) -> str:
    if part.run is not None:
        return part.run.name
    assert part.folder is not None
    return str(read_component(part.folder).card["sha256"])


def _portable(folder: Path) -> str:
    """Relative below the working directory, so that it can be moved as a whole; absolute elsewhere."""
    absolute = folder.resolve()
    here = Path.cwd().resolve()
    return os.fspath(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)
