"""The additions of LoRA alone, as `load_lora_weights` of `diffusers` reads them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import nn

from carrara.network.lora import additions
from carrara.published.names import inverse
from carrara.published.unet import PART, modules

_FILE = "pytorch_lora_weights.safetensors"


def write_adapter(folder: Path, network: nn.Module, node: Mapping[str, Any]) -> None:
    """Writes the additions of a U-Net into a new folder; alpha is in B, so that it is the rank there.

    Args:
        node: of the network.
    """
    names = inverse(modules(node))
    state = {}
    for name, (a, b) in additions(network).items():
        for part, matrix in (("lora_A", a), ("lora_B", b)):
            state[f"{PART}.{names[name]}.{part}.weight"] = matrix.detach().cpu().contiguous()
    folder.mkdir()
    safetensors.torch.save_file(state, folder / _FILE, metadata={"format": "pt"})
