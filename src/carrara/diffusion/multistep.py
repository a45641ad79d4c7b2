"""Samplers that remember: high order from one call a step, with the estimates of the steps before."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from carrara.diffusion.sampler import Denoise, Noise, Sampler, Steps
from carrara.diffusion.schedule import Level, NoiseSchedule


class DPMSolverPP2M(Sampler):
    """DPM-Solver++(2M): second order from one call a step and the last one's (Lu et al. 2022, Algorithm 2).

    The first step and the last, to sigma = 0, are of first order. A step from alpha = 0 or to sigma = 0 is
    infinitely long in lambda = log(alpha / sigma), and its limit is taken.

    With `stochastic` it solves the diffusion's SDE instead of the ODE (ib., SDE-DPM-Solver++(2M)): the noise of a
    step is fresh, so that an early step that decided wrongly can be taken back. Without the second order that is
    `Ancestral`.
    """

    def __init__(self, stochastic: bool = False) -> None:
        self.stochastic = stochastic
        self.draws_noise = stochastic

    def steps(self, denoise: Denoise, x: Tensor, schedule: NoiseSchedule, levels: list[Level], noise: Noise) -> Steps:
        before, h_before = None, math.inf
        for now, then in pairwise(levels):
            x0_hat = denoise(x, now.t)
            h = (then.logsnr - now.logsnr) / 2
            ahead = x0_hat
            if before is not None and math.isfinite(h):
                ahead = x0_hat + h / (2 * h_before) * (x0_hat - before)
            kept, span = (math.exp(-h), 2 * h) if self.stochastic else (1.0, h)
            x = kept * then.sigma / now.sigma * x - then.alpha * math.expm1(-span) * ahead
            if self.stochastic and then.sigma > 0:
                x = x + then.sigma * math.sqrt(-math.expm1(-span)) * noise()
            before, h_before = x0_hat, h
            yield x, x0_hat


class UniPC(Sampler):
    """UniPC-p on x0_hat with B(h) = exp(h) - 1 (Zhao et al. 2023, Algorithms 5 to 8): order p + 1, one call a step.

    Each step's estimate first corrects x at its own level (UniC), then predicts the next (UniP). As with the
    DPM-Solver the first steps, for want of estimates, and the last are of lower order, and a step of infinite length
    in lambda = log(alpha / sigma) is of first order and not corrected.

    Args:
        order: p, 1 to 3; 2 is the authors' choice with guidance.
    """

    def __init__(self, order: int = 2) -> None:
        if order not in (1, 2, 3):
            raise ValueError(f"order must be 1, 2 or 3, but is {order}")
        self.order = order

    def steps(self, denoise: Denoise, x: Tensor, schedule: NoiseSchedule, levels: list[Level], noise: Noise) -> Steps:
        known: list[tuple[float, Tensor]] = []  # logsnr and x0_hat of the steps before, the newest last
        start = x
        for k, (now, then) in enumerate(pairwise(levels)):
            x0_hat = denoise(x, now.t)
            if known and math.isfinite(known[-1][0]):
                x = self._step(start, levels[k - 1], now, known, x0_hat)
            known = [one for one in known if math.isfinite(one[0])] + [(now.logsnr, x0_hat)]
            left = len(levels) - 1 - k if levels[-1].sigma == 0 else self.order
            known = known[-min(self.order, left) :]
            start = x
            x = self._step(start, now, then, known, None)
            yield x, x0_hat

    def _step(
        self, x: Tensor, now: Level, then: Level, known: list[tuple[float, Tensor]], ahead: Tensor | None
    ) -> Tensor:
        """From x at `now` to `then`; with the estimate `ahead`, made there, it is the corrector, else the predictor."""
        h = (then.logsnr - now.logsnr) / 2
        _, x0_hat = known[-1]
        # places of the other estimates, in steps from now, and their differences from now's estimate
        places = [(logsnr - now.logsnr) / 2 / h for logsnr, _ in known[:-1]]
        differences = [other - x0_hat for _, other in known[:-1]]
        if ahead is not None:
            places.append(1.0)
            differences.append(ahead - x0_hat)
        x = then.sigma / now.sigma * x - then.alpha * math.expm1(-h) * x0_hat
        for weight, difference in zip(_weights(places, h), differences, strict=True):
            x = x - then.alpha * math.expm1(-h) * weight * difference
        return x


def _weights(places: list[float], h: float) -> list[float]:
    """How much of each difference a step of length h takes (ib., eq. 5): exact for polynomials through the places.

    One place makes one half, the limit for small h, which keeps the order.
    """
    if not places or not math.isfinite(h):
        return [0.0] * len(places)
    if len(places) == 1:
        return [0.5 / places[0]]
    moments, phi, factorial = [], math.expm1(-h) / -h - 1, 1.0  # phi_k(-h) h^k, made of phi_1
    for k in range(1, len(places) + 1):
        moments.append(phi * factorial / math.expm1(-h))
        factorial *= k + 1
        phi = phi / -h - 1 / factorial
    places_now = torch.tensor(places, dtype=torch.float64)
    powers = torch.stack([places_now**k for k in range(1, len(places) + 1)])
    return torch.linalg.solve(powers, torch.tensor(moments, dtype=torch.float64)).tolist()
