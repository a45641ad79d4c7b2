"""LoRA: a frozen network with small additions that are trained (Hu et al. 2022), by `peft`.

`peft` is imported where it is used: that takes seconds.
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from carrara.network.attention import Attention

_PROJECTIONS = ("query", "key", "value", "out")


def add_lora(network: nn.Module, rank: int, alpha: float, targets: Sequence[str]) -> None:
    """Freezes the network, and adds alpha / rank · B A to projections of its attention; B is 0 at first.

    Args:
        rank: of the additions: A is (rank, in) and B (out, rank).
        targets: of query, key, value and out, those that get one.

    Raises:
        ValueError: no such projection, or a network without attention.
    """
    import peft

    unknown = sorted(set(targets) - set(_PROJECTIONS))
    if unknown or not targets:
        raise ValueError(f"model.lora.targets={list(targets)}: some of {', '.join(_PROJECTIONS)}")
    if rank < 1:
        raise ValueError(f"model.lora.rank={rank}: from 1 on")
    names = [
        f"{name}.{target}"
        for name, module in network.named_modules()
        if isinstance(module, Attention)
        for target in targets
    ]
    if not names:
        raise ValueError("model.lora: this network has no attention to add to")
    network.requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), network)


def load_base(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Fills a network that may have additions with weights of one that has none; the additions stay as they are."""
    added = {name for name, _ in _added(network)}
    own = {key: value for key, value in network.state_dict().items() if ".lora_" in key}
    for key, value in state.items():
        layer, _, parameter = key.rpartition(".")
        own[f"{layer}.base_layer.{parameter}" if layer in added else key] = value
    network.load_state_dict(own)


def additions(network: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """A (rank, in) and alpha / rank · B (out, rank) of each layer that has an addition, by its name."""
    return {
        name: (layer.lora_A["default"].weight, layer.scaling["default"] * layer.lora_B["default"].weight)
        for name, layer in _added(network)
    }


@torch.no_grad()
def merged(network: nn.Module) -> nn.Module:
    """A copy with the additions in its weights, as if there had never been any."""
    copy = deepcopy(network)
    for name, layer in list(_added(copy)):
        layer.merge()
        parent, _, own = name.rpartition(".")
        setattr(copy.get_submodule(parent), own, layer.get_base_layer())
    return copy


def _added(network: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in network.named_modules():
        if hasattr(module, "lora_A"):
            yield name, module
