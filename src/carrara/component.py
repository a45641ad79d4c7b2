"""A trained part on disk: `config.yaml` builds it, `weights.safetensors` fills it, `card.json` tells of it.

torch is imported where weights are touched, so that a misspelt key is answered without waiting for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carrara.config import Config, build, load_yaml, save_yaml
from carrara.config_check import check_target, refuse_interpolations, targets
from carrara.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

CONFIG, WEIGHTS, CARD = "config.yaml", "weights.safetensors", "card.json"
CONDITIONED = ("noise_predictor", "generator")
"""Kinds that are a network and a conditioner."""
_PACKAGES = {"restoration": ("network",)} | dict.fromkeys(CONDITIONED, ("model", "network", "conditioner"))
"""Of other kinds it is the kind's own."""


@dataclass(frozen=True)
class Component:
    """What a component's folder says of itself; no weights are read.

    Attributes:
        kind: `autoencoder`, `evaluator`, …: the group whose classes it is built from.
        config: the architecture's node.
        card: `kind`, `fingerprint`, `data`, `scores`, `sha256` of the weights, and what else was noted.
    """

    folder: Path
    kind: str
    config: Config
    card: dict[str, Any]


def save_component(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    module: nn.Module,
    card: Mapping[str, Any],
    write_more: Callable[[Path], None] | None = None,
) -> Component:
    """Writes a component, whole or not at all; one that was there is replaced.

    Args:
        config: the node with `_target_` that `module` was built from.
        card: at least `fingerprint`, `data` and `scores`; `kind` and `sha256` are added.
        write_more: writes further files into the folder it is given.
    """
    import safetensors.torch

    missing = {"fingerprint", "data", "scores"} - set(card)
    if missing:
        raise ValueError(f"the card of a component lacks {', '.join(sorted(missing))}")
    check_packages(config, kind)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        # clones, since safetensors refuses tensors that share memory (tied weights)
        state = {key: value.detach().cpu().clone().contiguous() for key, value in _state(module).items()}
        safetensors.torch.save_file(state, temporary / WEIGHTS)
        save_yaml(temporary / CONFIG, config)
        whole = {"kind": kind, **card, "sha256": _sha256(temporary / WEIGHTS)}
        (temporary / CARD).write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        if write_more is not None:
            write_more(temporary)
        temporary.chmod(0o755)  # mkdtemp keeps others out
        for path in (*temporary.rglob("*"), temporary):
            _fsync(path)
        _replace(temporary, folder)
        _fsync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return Component(folder, kind, dict(config), whole)


def read_component(folder: Path, *kinds: str) -> Component:
    """Reads config and card, and checks targets and, where `kinds` are named, that it is of one of them.

    Raises:
        UserError: not a component, of another kind, made of classes that are not ours, or with an interpolation.
    """
    try:
        card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        found = str(card["kind"])
    except FileNotFoundError:
        raise UserError(f"{folder} is no component: it has no {CARD}") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{folder / CARD} is damaged: export the component again") from None
    if kinds and found not in kinds:
        raise UserError(f"{folder} is a component of kind {found}, where kind {' or '.join(kinds)} is needed")
    config = load_yaml(folder / CONFIG)
    refuse_interpolations(config, f"{folder / CONFIG}: ")
    check_packages(config, found)
    return Component(folder, found, config, card)


def load_component(folder: Path, *kinds: str) -> tuple[nn.Module, dict[str, Any]]:
    """Builds a component and fills it; the module comes back on the CPU, in evaluation mode, with its card.

    Raises:
        UserError: as `read_component`; or weights that were changed, or do not fit what the config builds.
    """
    from torch import nn

    component = read_component(folder, *kinds)
    state = read_weights(component)
    module = build(component.config)
    assert isinstance(module, nn.Module)
    _check_fit(folder, state, _state(module))
    module.load_state_dict(state, strict=True)
    return module.eval(), component.card


def read_weights(component: Component) -> dict[str, Tensor]:
    """The tensors of a component.

    Raises:
        UserError: they are not there, or were changed.
    """
    import safetensors.torch

    weights = component.folder / WEIGHTS
    if not weights.is_file():
        raise UserError(f"{weights} does not exist: export the component again")
    if _sha256(weights) != component.card.get("sha256"):
        raise UserError(f"{weights} is not the file its {CARD} describes (sha256 differs): copy or export it again")
    try:
        return safetensors.torch.load_file(weights)
    except safetensors.SafetensorError as error:
        raise UserError(f"{weights} is no safetensors file: {error}") from None


def check_packages(config: Mapping[str, Any], kind: str) -> None:
    """A component is built from the classes of its kind's package.

    Raises:
        UserError: a `_target_` elsewhere.
    """
    for target in targets(config):
        check_target(target, *_PACKAGES.get(kind, (kind,)))


def _state(module: nn.Module) -> dict[str, Tensor]:
    from torch import Tensor

    state = module.state_dict()
    foreign = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise TypeError(f"the state of a component must be tensors, and {foreign[0]} is not")
    return state


def _check_fit(folder: Path, state: Mapping[str, Tensor], built: Mapping[str, Tensor]) -> None:
    wrong = [  # an extra state (a tokenizer's vocabulary, as bytes) is as long as it is
        f"{key} is {tuple(state[key].shape)}, built is {tuple(value.shape)}"
        for key, value in built.items()
        if key in state and value.shape != state[key].shape and not key.endswith("_extra_state")
    ]
    wrong += [f"{key} has no weights" for key in built if key not in state]
    wrong += [f"{key} has no place" for key in state if key not in built]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise UserError(
            f"{CONFIG} and {WEIGHTS} of {folder} are of different parts ({wrong[0]}{more}): "
            f"export the component again, or restore its {CONFIG}"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`; a folder cannot be renamed over a full one, so that steps aside first."""
    if not folder.exists():
        new.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    folder.rename(aside)  # over the empty folder just made
    new.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)
