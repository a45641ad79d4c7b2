"""Noise schedules: how much picture and how much noise there is in x_t = alpha(t) x0 + sigma(t) eps."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


class Level(NamedTuple):
    """One time of a schedule, its coefficients Python floats: no dtype to promote, no device to wait for."""

    t: Tensor  # 0-dim, float64, on the CPU
    alpha: float
    sigma: float
    logsnr: float  # -inf where alpha is 0, inf where sigma is 0


class NoiseSchedule(ABC):
    """alpha and sigma over t in [0, 1], 0 the least noise and 1 the most.

    Every function of t takes a float32 or float64 tensor of any shape and returns one of its shape, dtype and
    device. Samplers start at t = 1 from `prior_scale * eps`.
    """

    variance_preserving: bool = False  # alpha^2 + sigma^2 = 1
    terminal_snr_is_zero: bool = False  # alpha(1) = 0: x_1 holds nothing of x0

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """The coefficient of x0, in [0, 1]."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """The coefficient of eps, >= 0."""

    @abstractmethod
    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        """The inverse of `logsnr`, clamped to [0, 1]."""

    def logsnr(self, t: Tensor) -> Tensor:
        """2 log(alpha / sigma), strictly falling in t; inf where sigma is 0, -inf where alpha is 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def c_noise(self, t: Tensor) -> Tensor:
        """What the network receives as its time, in [0, 1000]."""
        return 1000 * t

    def times(self, num_steps: int) -> Tensor:
        """The times of `num_steps` even steps from 1 to 0: float64, (num_steps + 1,)."""
        if num_steps < 1:
            raise ValueError(f"num_steps is {num_steps}, but a sampler makes at least one step")
        return torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)

    def levels(self, times: Tensor) -> list[Level]:
        """The coefficients at times of shape (N,), computed in float64."""
        times = times.detach().to("cpu", torch.float64)
        columns = (self.alpha(times).tolist(), self.sigma(times).tolist(), self.logsnr(times).tolist())
        return [Level(t, *row) for t, *row in zip(times, *columns, strict=True)]

    @property
    def prior_scale(self) -> float:
        """sigma(1), the standard deviation of the noise a sampler starts from."""
        return self.sigma(torch.ones((), dtype=torch.float64)).item()


class VariancePreserving(NoiseSchedule):
    """A schedule given by alpha_bar = alpha^2 = 1 - sigma^2, kept as its logarithm, exact at both ends."""

    variance_preserving = True

    @abstractmethod
    def log_alpha_bar(self, t: Tensor) -> Tensor:
        """log alpha_bar in float64 whatever the dtype of t; 0 at t = 0."""

    @abstractmethod
    def t_from_log_alpha_bar(self, log_alpha_bar: Tensor) -> Tensor:
        """The inverse of `log_alpha_bar`, float64 to float64."""

    def alpha(self, t: Tensor) -> Tensor:
        return (self.log_alpha_bar(t) / 2).exp().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return (-self.log_alpha_bar(t).expm1()).sqrt().to(t.dtype)

    def logsnr(self, t: Tensor) -> Tensor:
        log_alpha_bar = self.log_alpha_bar(t)
        return (log_alpha_bar - (-log_alpha_bar.expm1()).log()).to(t.dtype)

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        # alpha_bar = SNR / (1 + SNR)
        return self.t_from_log_alpha_bar(logsigmoid(logsnr.double())).clamp(0, 1).to(logsnr.dtype)


class Discrete(VariancePreserving):
    """A table of betas, i = 1..T, as in DDPM (Ho et al. 2020): index i is t = i / T, and i = 0 is clean.

    Between two indices log alpha_bar is linear in t, so any time has a noise level and the table's are exact.
    Raises ValueError unless `betas` is a list of numbers in (0, 1].
    """

    def __init__(self, betas: Sequence[float] | Tensor) -> None:
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(f"betas must be a list of numbers in (0, 1], but they are {betas}")
        self.num_steps = len(betas)
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
        return table[upper - 1] + (index - (upper - 1)) * (table[upper] - table[upper - 1])

    def t_from_log_alpha_bar(self, log_alpha_bar: Tensor) -> Tensor:
        table = self.table(log_alpha_bar.device)
        upper = torch.searchsorted(-table, -log_alpha_bar.contiguous()).clamp(1, self.num_steps)
        fraction = (log_alpha_bar - table[upper - 1]) / (table[upper] - table[upper - 1])
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


class CosineTable(Discrete):
    """The cosine curve as a table of betas, each at most `max_beta` (Nichol & Dhariwal 2021, section 3.2)."""

    def __init__(self, num_steps: int = 1000, max_beta: float = 0.999, s: float = 0.008) -> None:
        t = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        alpha_bar = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
        super().__init__((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))


class Cosine(VariancePreserving):
    """alpha_bar = (cos h / cos h_0)^2 with h = (t + s) / (1 + s) pi / 2 (Nichol & Dhariwal 2021, eq. 17).

    The curve would reach alpha_bar = 0 at t = 1, so the paper clips the betas of its table of 1000 at 0.999.
    Here, in continuous time, -d log alpha_bar / dt is clipped at `max_rate`, by default that beta's rate.
    """

    def __init__(self, s: float = 0.008, max_rate: float = 1000 * math.log(1000)) -> None:
        self.s = s
        self.max_rate = max_rate
        self._turn = math.pi / 2 / (1 + s)  # dh / dt; the rate is 2 tan(h) dh / dt
        self._clip_t = math.atan(max_rate / 2 / self._turn) / self._turn - s
        self._clip_log_alpha_bar = self._unclipped(torch.tensor(self._clip_t, dtype=torch.float64)).item()

    def _unclipped(self, t: Tensor) -> Tensor:
        # sin^2(h) - sin^2(h_0) as a product: exactly 0 at t = 0, where a quotient of cosines cancels
        sigma_squared = torch.sin(self._turn * (t + 2 * self.s)) * torch.sin(self._turn * t)
        return torch.log1p(-sigma_squared / math.cos(self._turn * self.s) ** 2)

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        t = t.double()
        return self._unclipped(t.clamp(max=self._clip_t)) - self.max_rate * (t - self._clip_t).clamp(min=0)

    def t_from_log_alpha_bar(self, log_alpha_bar: Tensor) -> Tensor:
        clip = self._clip_log_alpha_bar
        cos_h = math.cos(self._turn * self.s) * (log_alpha_bar.clamp(min=clip) / 2).exp()
        clipped_t = torch.acos(cos_h) / self._turn - self.s
        return clipped_t + (clip - log_alpha_bar).clamp(min=0) / self.max_rate


class Flow(NoiseSchedule):
    """The straight line x_t = (1 - t) x0 + t eps of rectified flow (Liu et al. 2022; Lipman et al. 2022)."""

    terminal_snr_is_zero = True

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def logsnr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - t.log())

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(-logsnr / 2)
