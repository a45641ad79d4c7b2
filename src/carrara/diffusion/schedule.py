"""Noise schedules: how much picture and how much noise there is in x_t = alpha(t) x0 + sigma(t) eps."""

import math
from abc import ABC, abstractmethod
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
    """alpha and sigma over t in [0, 1]: t = 0 is the clean picture, alpha 1 and sigma 0, and t = 1 the most noise.

    Every function of t takes a float32 or float64 tensor of any shape and returns one of its shape, dtype and
    device. Samplers start at t = 1 from `prior_scale * eps`.
    """

    terminal_snr_is_zero: bool = False  # alpha(1) = 0: x_1 holds nothing of x0
    t_min: float = 1e-3  # the last noisy time of a spacing in noise levels, which cannot go on to sigma = 0
    t_least: float = 1e-5  # that a model is trained at: at 0 there is no noise to learn from

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


class Cosine(VariancePreserving):
    """alpha_bar = (cos h / cos h_0)^2 with h = (t + s) / (1 + s) pi / 2 (Nichol & Dhariwal 2021, eq. 17).

    The curve would reach alpha_bar = 0 at t = 1, so the paper clips the betas of its table of 1000 at 0.999.
    Here, in continuous time, -d log alpha_bar / dt is clipped at `max_rate`, by default that beta's rate.
    """

    def __init__(self, s: float = 0.008, max_rate: float = 1000 * math.log(1000)) -> None:
        if s <= 0 or max_rate <= 0:
            raise ValueError(f"s and max_rate must be positive, but they are {s} and {max_rate}")
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


class Sigmoid(VariancePreserving):
    """alpha_bar falls as a sigmoid does from x = start to x = end (Jabri et al. 2022; Chen 2023, Algorithm 1).

    alpha_bar = (sigmoid(-x / tau) - sigmoid(-end / tau)) / (sigmoid(-start / tau) - sigmoid(-end / tau)) with
    x = start + (end - start) t, which is 0 at t = 1.
    """

    terminal_snr_is_zero = True

    def __init__(self, start: float = -3.0, end: float = 3.0, tau: float = 1.0) -> None:
        if not (start < end and tau > 0):
            raise ValueError(f"start must be below end and tau positive, but they are {start}, {end} and {tau}")
        # Differences of sigmoids are products of hyperbolic functions; in logarithms nothing cancels or overflows.
        self._half_span = (end - start) / tau / 2
        self._ratio = _log_cosh(start / tau / 2) - _log_cosh(end / tau / 2)

    def logsnr(self, t: Tensor) -> Tensor:
        return self._logsnr(t.double()).to(t.dtype)

    def log_alpha_bar(self, t: Tensor) -> Tensor:
        return logsigmoid(self._logsnr(t.double()))

    def t_from_log_alpha_bar(self, log_alpha_bar: Tensor) -> Tensor:
        noise_to_signal = ((-log_alpha_bar.expm1()).log() - log_alpha_bar).clamp(max=1e9) + self._ratio
        zero = torch.zeros_like(noise_to_signal)
        upper = torch.logaddexp(noise_to_signal + self._half_span, zero)
        return (upper - torch.logaddexp(noise_to_signal - self._half_span, zero)) / (2 * self._half_span)

    def _logsnr(self, t: Tensor) -> Tensor:
        return _log_sinh(self._half_span * (1 - t)) - _log_sinh(self._half_span * t) + self._ratio


def _log_sinh(x: Tensor) -> Tensor:
    """log sinh x for x >= 0."""
    return x + (-(-2 * x).expm1()).log() - math.log(2)


def _log_cosh(x: float) -> float:
    return abs(x) + math.log1p(math.exp(-2 * abs(x))) - math.log(2)


class Flow(NoiseSchedule):
    """The straight line x_s = (1 - s) x0 + s eps of rectified flow (Liu et al. 2022; Lipman et al. 2022).

    With a `shift`, s = shift t / (1 + (shift - 1) t): more of the way at high noise, as pictures of more pixels need,
    whose neighbours tell more of each other (Esser et al. 2024, eq. 23: shift = sqrt(pixels / pixels before)).
    The network is told s, so a model may be sampled with another shift than it was trained with.
    """

    terminal_snr_is_zero = True

    def __init__(self, shift: float = 1.0) -> None:
        if shift <= 0:
            raise ValueError(f"shift must be positive, but is {shift}")
        self.shift = shift

    def alpha(self, t: Tensor) -> Tensor:
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def logsnr(self, t: Tensor) -> Tensor:
        return 2 * (torch.log1p(-t) - t.log() - math.log(self.shift))

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(-logsnr / 2 - math.log(self.shift))

    def c_noise(self, t: Tensor) -> Tensor:
        return 1000 * self.sigma(t)


class AdditiveNoise(NoiseSchedule):
    """alpha = 1: noise is added to the picture, and nothing of it taken away."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def times(self, num_steps: int) -> Tensor:
        """Even steps from 1 to `t_min`, and one to 0: below, sigma is smaller than any that matters."""
        inner = torch.linspace(1, self.t_min, num_steps, dtype=torch.float64)
        return torch.cat([inner, inner.new_zeros(1)])


class EDM(AdditiveNoise):
    """alpha = 1, sigma = sigma_max t^rho (Karras et al. 2022).

    sigma^(1/rho) is linear in t, so that even steps in t are the paper's (eq. 5). The paper trains at log-normal sigma
    (`time_sampling.LogNormal`). It tells the network ln(sigma) / 4; here it is told 1000 t, as with every schedule.
    """

    def __init__(self, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> None:
        if not (0 < sigma_min < sigma_max and rho > 0):
            raise ValueError(f"0 < sigma_min < sigma_max and 0 < rho, but they are {sigma_min}, {sigma_max} and {rho}")
        self.sigma_max = sigma_max
        self.rho = rho
        self.t_min = self.t_least = (sigma_min / sigma_max) ** (1 / rho)

    def sigma(self, t: Tensor) -> Tensor:
        return (self.sigma_max * t.double() ** self.rho).to(t.dtype)

    def logsnr(self, t: Tensor) -> Tensor:
        return (-2 * (math.log(self.sigma_max) + self.rho * t.double().log())).to(t.dtype)

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        log_t = (-logsnr.double() / 2 - math.log(self.sigma_max)) / self.rho
        return log_t.exp().clamp(max=1).to(logsnr.dtype)


class VarianceExploding(AdditiveNoise):
    """alpha = 1, sigma^2 = sigma_min^2 ((sigma_max / sigma_min)^(2t) - 1) (Song et al. 2021, eq. 29 and 30).

    The kernel of the paper's variance-exploding SDE. Above t_min, where sigma = sigma_min, sigma is as good as
    geometric in t; `spacing.LogSNR` takes exactly geometric levels, as NCSN does (Song & Ermon 2019, section 3.2).
    """

    def __init__(self, sigma_min: float = 0.01, sigma_max: float = 50.0) -> None:
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"0 < sigma_min < sigma_max, but they are {sigma_min} and {sigma_max}")
        self.log_sigma_min = math.log(sigma_min)
        self._rate = 2 * math.log(sigma_max / sigma_min)
        self.t_min = self.t_least = math.log(2) / self._rate

    def sigma(self, t: Tensor) -> Tensor:
        return (math.exp(self.log_sigma_min) * (self._rate * t.double()).expm1().sqrt()).to(t.dtype)

    def logsnr(self, t: Tensor) -> Tensor:
        return (-2 * self.log_sigma_min - (self._rate * t.double()).expm1().log()).to(t.dtype)

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        ratio = (-logsnr.double() - 2 * self.log_sigma_min).exp()  # (sigma / sigma_min)^2
        return (ratio.log1p() / self._rate).clamp(max=1).to(logsnr.dtype)
