"""What the ranks of a run tell one another."""

from typing import TypeVar

import lightning
import torch

T = TypeVar("T")


def gather(trainer: lightning.Trainer, value: T) -> list[T]:
    """`value` of every rank, in their order. All call it; a value is pickled among them, and nowhere else."""
    if trainer.world_size == 1:
        return [value]
    values: list[T] = [value] * trainer.world_size
    torch.distributed.all_gather_object(values, value)
    return values


def largest(trainer: lightning.Trainer, value: int) -> int:
    """The largest of the ranks' numbers. All call it."""
    if trainer.world_size == 1:
        return value
    number = torch.tensor(value, device=trainer.strategy.root_device)
    torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
    return int(number)
