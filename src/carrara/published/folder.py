"""Folders in the layout of `diffusers`: a pipeline's, one of its parts', or either on the Hugging Face hub.

Nothing but JSON and safetensors is fetched or read: a pickle can run code.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from carrara.errors import UserError
from carrara.network.hugging_face import NotFetched, fetch

INDEX = "model_index.json"
CONFIG = "config.json"
_STEM = "diffusion_pytorch_model"
WEIGHTS, _SHARDED, _HALF = f"{_STEM}.safetensors", f"{_STEM}.safetensors.index.json", f"{_STEM}.fp16.safetensors"
_SHARDS = f"{_STEM}-*-of-*.safetensors"
_HUB_NAME = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)((?:/[\w-][\w.-]*)*)")  # owner/name, and a folder in it


@dataclass(frozen=True)
class Published:
    """One part of a published pipeline; of its weights only the names are known.

    Attributes:
        reference: how the user named it.
        folder: it lies in.
        config: its `config.json`.
        scheduler: the `scheduler_config.json` of its pipeline, if that is there.
        hub: the model of the hub that it is of, and its folder in that; None of a local one.
    """

    reference: str
    folder: Path
    config: dict[str, Any]
    scheduler: dict[str, Any] | None
    hub: tuple[str, str] | None

    @property
    def config_file(self) -> Path:
        return self.folder / CONFIG

    def weight_files(self) -> list[Path]:
        """The safetensors that hold it: one, or several shards.

        Raises:
            UserError: there are none.
        """
        if self.hub is not None:  # one precision, and not its weights before averaging, as well
            model, inner = self.hub
            for names in ((WEIGHTS, _SHARDED, _SHARDS), (_HALF,)):
                if not self._found():
                    _fetch(self.reference, model, [f"{inner}{name}" for name in names])
        found = self._found()
        if not found:
            raise UserError(
                f"{self.reference}: {self.folder} has no {WEIGHTS}; pickled weights (.bin) are not read, since they "
                "can run code: take a model with safetensors, or convert it with save_pretrained"
            )
        missing = [path for path in found if not path.is_file()]
        if missing:
            raise UserError(f"{self.reference}: {missing[0]} is missing, which {_SHARDED} names: fetch it again")
        return found

    def _found(self) -> list[Path]:
        for name in (WEIGHTS, _HALF):
            if (self.folder / name).is_file():
                return [self.folder / name]
        index = self.folder / _SHARDED
        if not index.is_file():
            return []
        names = read_json(index).get("weight_map")
        if not isinstance(names, Mapping) or not all(Path(str(name)).name == name for name in names.values()):
            raise UserError(f"{index}: its weight_map names no files: fetch it again")
        return [self.folder / name for name in sorted(set(names.values()))]


def is_published(reference: str) -> bool:
    """Whether it looks like a folder in the layout of `diffusers`, or the hub's name of one; nothing is fetched."""
    folder = Path(reference)
    if folder.is_dir():
        return (folder / INDEX).is_file() or (folder / CONFIG).is_file()
    return not folder.exists() and _hub(reference) is not None


def find_published(reference: str, part: str, class_name: str) -> Published:
    """A part of a pipeline.

    Args:
        reference: a folder, or a name on the hub (with a folder in it, `owner/name/unet`): a pipeline's or the part's.
        part: its folder in a pipeline.
        class_name: of `diffusers`, that its config must name.

    Raises:
        UserError: there is none, or it is something else.
    """
    hub = _hub(reference)
    if hub is None:
        folder = Path(reference)
    else:
        model, inner = hub
        files = [INDEX, f"{inner}{CONFIG}", f"{inner}{part}/{CONFIG}", "scheduler/scheduler_config.json"]
        folder = _fetch(reference, model, files) / inner
    if not folder.is_dir():
        raise UserError(f"{reference}: there is no such folder")
    if (folder / INDEX).is_file():
        folder = folder / part
        hub = None if hub is None else (hub[0], f"{part}/")
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(
            f"{reference}: there is no {file}; name a folder in the layout of diffusers, whose {INDEX} says what is in "
            f"it, or one with a {class_name}"
        )
    config = read_json(file)
    found = config.get("_class_name")
    if found != class_name:
        raise UserError(f"{file}: _class_name is {found}, where a {class_name} is needed")
    scheduler = folder.parent / "scheduler" / "scheduler_config.json"
    in_pipeline = (folder.parent / INDEX).is_file() and scheduler.is_file()
    return Published(reference, folder, config, read_json(scheduler) if in_pipeline else None, hub)


def read_json(file: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: it is no JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({' '.join(str(error).split())[:200]}): fetch it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds no settings: fetch it again")
    return content


def read_tensors(files: list[Path]) -> dict[str, Tensor]:
    """All tensors of the files, as they are.

    Raises:
        UserError: no safetensors.
    """
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= safetensors.torch.load_file(file)
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{file} is no safetensors file: {error}") from None
    return state


def read_fields(
    file: Path, config: Mapping[str, Any], defaults: Mapping[str, Any], read: set[str], ignored: set[str]
) -> dict[str, Any]:
    """A config with the defaults of `diffusers` for what it leaves out.

    Args:
        file: it comes from.
        config: its content.
        defaults: all fields that are known.
        read: those that we have a setting for; the others must have their default,
        ignored: except for these, on which what the part answers does not depend.

    Raises:
        UserError: a field that is not known, or a value that our part does not have.
    """
    fields = {key: value for key, value in config.items() if not key.startswith("_")}
    for key, value in fields.items():
        if key not in defaults:
            raise UserError(f"{file}: the field {key} is not known here, so neither is what the weights mean")
        if key not in read | ignored and value != defaults[key]:
            raise UserError(f"{file}: {key} is {value}; only {defaults[key]} can be read here")
    return {**defaults, **fields}


def check_fit(file: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Names and shapes of tensors are those that the config asks for.

    Raises:
        UserError: one is missing, extra, or of another shape.
    """
    wrong = [f"{key} is missing" for key in wanted if key not in state]
    wrong += [f"{key} has no place" for key in state if key not in wanted]
    wrong += [
        f"{key} is {tuple(state[key].shape)}, and the config makes it {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    if wrong:
        more = f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(f"{file} and the {CONFIG} beside it are of different models ({wrong[0]}{more}): fetch it again")


def _hub(reference: str) -> tuple[str, str] | None:
    """The hub's model and the folder in it, which ends with a slash or is empty; None for what is here."""
    match = None if Path(reference).exists() else _HUB_NAME.fullmatch(reference)
    return None if match is None else (match[1], f"{match[2][1:]}/" if match[2] else "")


def _fetch(reference: str, model: str, patterns: list[str]) -> Path:
    try:
        return fetch(model, patterns)
    except NotFetched as problem:
        raise UserError(f"{reference}: {problem}") from None
