"""Schedules that are tables of betas, as in DDPM and Stable Diffusion."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from carrara.diffusion.schedule import VariancePreserving


class Discrete(VariancePreserving):
    """A table of betas, i = 1..T, as in DDPM (Ho et al. 2020): index i is t = i / T, and i = 0 is clean.

    Between two indices log alpha_bar is linear in t, so any time has a noise level and the table's are exact. If the
    last beta is 1, alpha is linear in t on the last step, down to 0. Raises ValueError unless `betas` is a list of
    numbers in (0, 1], of which only the last is 1.
    """

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all() or (betas[:-1] == 1).any():
            raise ValueError(f"betas must be a list of numbers in (0, 1], only the last 1, but they are {betas}")
        self.num_steps = len(betas)
        self.t_min = 1 / self.num_steps
        self.terminal_snr_is_zero = bool(betas[-1] == 1)
        table = torch.cat([betas.new_zeros(1), torch.log1p(-betas).cumsum(0)])
        self._tables = {table.device: table}  # log alpha_bar at i = 0..T

    def table(self, device: torch.device) -> Tensor:
        """log alpha_bar at i = 0..T, float64; copied to a device once, since a copy makes the host wait."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        return self._tables[device]

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        table = self.table(t.device)
        index = t.double() * self.num_steps
        # i / T is rounded to t's dtype: an index within that rounding of a whole number is meant to be it.
        whole = index.round()
        index = torch.where((index - whole).abs() <= torch.finfo(t.dtype).eps * self.num_steps, whole, index)
        upper = index.ceil().long().clamp(1, self.num_steps)
        lower = table[upper - 1]
        fraction = index - (upper - 1)
        to_zero = lower + 2 * torch.log1p(-fraction)  # alpha falls evenly to 0
        return torch.where(table[upper].isinf(), to_zero, lower + fraction * (table[upper] - lower))

    def t_from_log_alpha_bar(self, log_alpha_bar: Tensor) -> Tensor:
        table = self.table(log_alpha_bar.device)
        upper = torch.searchsorted(-table, -log_alpha_bar.contiguous()).clamp(1, self.num_steps)
        lower = table[upper - 1]
        to_zero = -((log_alpha_bar - lower) / 2).expm1()
        fraction = torch.where(table[upper].isinf(), to_zero, (log_alpha_bar - lower) / (table[upper] - lower))
        return (upper - 1 + fraction) / self.num_steps

    def times(self, num_steps: int) -> Tensor:
        """Even steps, each moved to the table's nearest index; ValueError if the table has fewer."""
        if num_steps > self.num_steps:
            raise ValueError(f"num_steps is {num_steps}, but the schedule's table has {self.num_steps} steps")
        return (super().times(num_steps) * self.num_steps).round() / self.num_steps


class Linear(Discrete):
    """DDPM's table: beta rises evenly from `beta_start` to `beta_end` (Ho et al. 2020, section 4)."""

    def __init__(self, beta_start: float = 1e-4, beta_end: float = 0.02, num_steps: int = 1000) -> None:
        super().__init__(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64))


class ScaledLinear(Discrete):
    """Stable Diffusion's table: the square root of beta rises evenly (Rombach et al. 2022)."""

    def __init__(self, beta_start: float = 0.00085, beta_end: float = 0.012, num_steps: int = 1000) -> None:
        super().__init__(torch.linspace(beta_start**0.5, beta_end**0.5, num_steps, dtype=torch.float64) ** 2)


class CosineTable(Discrete):
    """The cosine curve as a table of betas, each at most `max_beta` (Nichol & Dhariwal 2021, section 3.2)."""

    def __init__(self, num_steps: int = 1000, max_beta: float = 0.999, s: float = 0.008) -> None:
        t = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        alpha_bar = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
        super().__init__((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))


class ZeroTerminalSNR(Discrete):
    """A table whose alpha is shifted and scaled: the last is 0, the first stays (Lin et al. 2023, Algorithm 1)."""

    def __init__(self, table: Discrete) -> None:
        if not isinstance(table, Discrete):
            raise ValueError(
                f"what is rescaled to a zero terminal SNR must be a table of betas, not {type(table).__name__}"
            )
        alpha = (table.table(torch.device("cpu"))[1:] / 2).exp()
        first, last = alpha[0].item(), alpha[-1].item()
        if len(alpha) < 2:
            raise ValueError("a table of one step cannot keep its first alpha and end at 0")
        alpha = torch.cat([alpha.new_ones(1), (alpha - last) * first / (first - last)])
        super().__init__(1 - (alpha[1:] / alpha[:-1]) ** 2)
