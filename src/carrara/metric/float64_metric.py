"""The base of every metric here: float64 states that stay float64 and are summed or gathered over ranks."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors


class Float64Metric(Metric):
    """A `torchmetrics.Metric` whose states are float64, never saved, and reduced over ranks before any score.

    float32 sums cost a Fréchet distance 1.7 % at 768 dimensions, and `module.to(torch.bfloat16)` or
    `set_dtype` would convert the states of a plain Metric: here only their device can change.

    Never update a state in place: `reset` under `torch.inference_mode` leaves inference tensors behind.
    """

    full_state_update: bool | None = False
    is_differentiable: bool | None = False

    def __init__(self) -> None:
        super().__init__()
        self._empty: dict[str, Tensor] = {}

    def add_sum(self, name: str, *shape: int) -> None:
        """Declare a float64 state of `shape` that is summed over ranks."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum", persistent=False)

    def add_samples(self, name: str, *shape: int, dtype: torch.dtype = torch.float64) -> None:
        """Declare a list state of (batch, *shape) tensors that is concatenated over ranks."""
        self.add_state(name, [], dist_reduce_fx="cat", persistent=False)
        self._empty[name] = torch.empty(0, *shape, dtype=dtype)

    def samples(self, name: str) -> Tensor:
        """All of a list state as one (n, *shape) tensor: this rank's, or every rank's inside `compute`."""
        state = getattr(self, name)
        return state if isinstance(state, Tensor) else torch.cat([self._empty[name].to(self.device), *state])

    def _sync_dist(
        self, dist_sync_fn: Callable[..., Any] = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        # A rank without samples would send a 1-D float32 tensor, which does not fit the others'.
        for name, empty in self._empty.items():
            getattr(self, name).append(empty.to(self.device))
        super()._sync_dist(dist_sync_fn, process_group)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = ()) -> torch.nn.Module:
        def move(tensor: Tensor) -> Tensor:
            return tensor.to(fn(tensor.new_empty(0)).device)

        return super()._apply(move, exclude_state)


def sort_by_index(index: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Each of `values` (n, ...) in the order of the sample indices `index` (n,) int64.

    Gathered samples come in the order of ranks; sorted, the same samples give the same bits however many
    ranks there were. Raises ValueError when a sample was counted twice, as a padding sampler does.
    """
    ordered, order = index.sort()
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(twice):
        raise ValueError(f"sample {int(twice[0])} was counted twice: each sample must be given to one rank, once")
    return tuple(value[order] for value in values)
