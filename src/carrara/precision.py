"""What the machine has, and which floating-point precision it is good at."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from carrara.errors import UserError


def check_machine(trainer: Mapping[str, Any]) -> None:
    """The machine has what the `trainer` node asks for.

    Raises:
        UserError: too few GPUs, or a precision that is theirs alone.
    """
    there = torch.cuda.device_count()
    on_gpu = trainer["accelerator"] == "gpu" or (trainer["accelerator"] == "auto" and there > 0)
    if on_gpu and trainer["devices"] > there:
        raise UserError(f"trainer.devices={trainer['devices']}, but this machine has {there} GPUs")
    if trainer["precision"] == "16-mixed" and not on_gpu:
        raise UserError("trainer.precision=16-mixed is of GPUs alone: take auto, bf16-mixed or 32-true")


def choose_precision(setting: str, accelerator: str) -> tuple[str, str]:
    """Lightning's name of the precision, and why.

    `auto` takes bfloat16 autocast where the device multiplies bfloat16 in hardware, else float32.

    Args:
        setting: `trainer.precision`.
        accelerator: `trainer.accelerator`.
    """
    if setting != "auto":
        return setting, "trainer.precision"
    if accelerator in ("auto", "gpu") and torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bf16-mixed", f"{torch.cuda.get_device_name()} has bfloat16"
        return "32-true", f"{torch.cuda.get_device_name()} has no bfloat16"
    if accelerator in ("auto", "cpu"):
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return "bf16-mixed", "the CPU has bfloat16 instructions"
        return "32-true", "the CPU has no bfloat16 instructions"
    return "32-true", f"not known to be faster otherwise on {accelerator}"


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def local_device(accelerator: str) -> torch.device:
    """This rank's device under `trainer.accelerator`."""
    if accelerator in ("auto", "gpu") and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device
    return torch.device("cpu")


def set_arithmetic() -> None:
    """How every command computes: float32 products on a GPU may be shortened to TF32, denormal numbers are zero."""
    torch.set_flush_denormal(True)
    torch.set_float32_matmul_precision("high")
