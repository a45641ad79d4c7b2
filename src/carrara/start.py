"""Weights that a training begins with: `start.network`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carrara.component import Component, read_component, read_weights
from carrara.config import Config
from carrara.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from carrara.model.base import Model

_FREE = ("resolution", "checkpointing")  # settings of a network on which its weights do not depend
_log = logging.getLogger(__name__)


def network_of(folder: Path) -> tuple[Config, dict[str, Any]]:
    """The node of a component's network, and what it was trained with as far as its card says.

    Raises:
        UserError: it holds no noise predictor.
    """
    component = read_component(folder)
    if component.kind not in ("network", "noise_predictor"):
        raise UserError(
            f"start.network={folder} is a component of kind {component.kind}; name a noise predictor, or a published "
            "U-Net"
        )
    return _network_node(component), component.card.get("diffusion", {})


def check_start(reference: str, network: Mapping[str, Any], diffusion: Mapping[str, Any], config: Config) -> str:
    """Whether a run can begin with these weights.

    Args:
        reference: how the user named them.
        network: the node of their network.
        diffusion: `schedule` and `parameterization` that they were trained with, where that is known.
        config: of the run.

    Returns:
        What to tell of another schedule or target than theirs, which may be meant; "" of the same.

    Raises:
        UserError: the run's network is another one.
    """
    ours = config["network"]
    free = _FREE[1:] if ours.get("learned_positions") else _FREE
    keys = [key for key in {**network, **ours} if key not in free]
    different = [key for key in keys if _spread(network, key) != _spread(ours, key)]
    if "_target_" in different:
        kinds = [str(node["_target_"]).rpartition(".")[2] for node in (network, ours)]
        raise UserError(f"start.network={reference} is a {kinds[0]}, and this run's network a {kinds[1]}")
    if different:
        differences = ", ".join(f"{key} is {_short(ours.get(key))}" for key in different)
        wanted = " ".join(f"network.{key}={_short(network.get(key))}" for key in different)
        raise UserError(
            f"start.network={reference} is of another network than this run's, whose {differences}: pass {wanted}, or "
            "another network=…"
        )
    for key, theirs in diffusion.items():
        if config["diffusion"][key] != theirs:
            return (
                f"start.network={reference} was trained with {_in_words(theirs)}, and this run has "
                f"{_in_words(config['diffusion'][key])}, which it has to learn first: published ones go with "
                "diffusion=stable_diffusion"
            )
    return ""


def check_lora(config: Config) -> None:
    """
    Raises:
        UserError: additions, and nothing that they could be added to.
    """
    if (config.get("model") or {}).get("lora") is not None and config["start"]["network"] is None:
        raise UserError("model.lora is added to weights that are trained: name them with start.network=…")


def begin(config: Config, model: Model) -> None:
    """Fills the model of a run with the weights its training begins with, if it names any.

    The network's; and the conditioner's, where those were trained along with it and are of the same kind.

    Raises:
        UserError: they are not there any more, or were changed.
    """
    reference = (config.get("start") or {}).get("network")
    if reference is None:
        return
    from carrara.build import exported_config
    from carrara.conditioner.pretrained import Pretrained
    from carrara.model.diffusion import DiffusionModel

    assert isinstance(model, DiffusionModel)
    component = read_component(Path(reference))
    state = read_weights(component)
    whole = component.kind == "noise_predictor"
    conditioner = _below("conditioner.", state) if whole else {}
    alike = whole and component.config["conditioner"] == exported_config(config, component.kind)["conditioner"]
    if model.lora is not None and not (alike or isinstance(model.predictor.conditioner, Pretrained)):
        raise UserError(
            f"model.lora leaves the conditioner as it is, and start.network={reference} has none like this run's: take "
            "its own, or a text encoder that is trained (conditioner=clip)"
        )
    if conditioner and not alike:
        _log.info("start.network=%s: its conditioner is another one, so only the network begins with it", reference)
    model.begin_with(
        _below("network.", state) if whole else state,
        conditioner if alike else None,
        str(component.card["sha256"]),
    )


def _network_node(component: Component) -> Config:
    return dict(component.config["network"] if component.kind == "noise_predictor" else component.config)


def _spread(node: Mapping[str, Any], key: str) -> object:
    """A setting, one number of heads for all levels as one for each."""
    value = node.get(key)
    return (
        [value] * len(node["channels"]) if key == "heads" and isinstance(value, int) and "channels" in node else value
    )


def _below(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _short(value: object) -> str:
    return str(value).replace(" ", "").lower() if isinstance(value, list | bool) else str(value)


def _in_words(node: Mapping[str, Any]) -> str:
    """A schedule or target: its class and settings."""
    inner = {key: value for key, value in node.items() if key not in ("_target_", "table")}
    of = f" of {_in_words(node['table'])}" if "table" in node else ""
    settings = ", ".join(f"{key} {value}" for key, value in inner.items())
    return str(node["_target_"]).rpartition(".")[2] + of + (f" ({settings})" if settings else "")
