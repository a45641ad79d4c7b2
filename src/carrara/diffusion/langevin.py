"""Samplers that follow the score with noise: Langevin dynamics at one noise level after another."""

import math
from itertools import pairwise

from torch import Tensor

from carrara.diffusion.sampler import Ancestral, Denoise, Noise, Sampler, Steps
from carrara.diffusion.schedule import Level, NoiseSchedule


def langevin_step(x: Tensor, x0_hat: Tensor, level: Level, step_size: float, noise: Noise) -> Tensor:
    """x + step/2 score + sqrt(step) noise with step = step_size sigma^2 and score = (alpha x0_hat - x) / sigma^2."""
    return x + step_size / 2 * (level.alpha * x0_hat - x) + math.sqrt(step_size) * level.sigma * noise()


class AnnealedLangevin(Sampler):
    """Langevin dynamics at each level in turn, from the noisiest (Song & Ermon 2019, Algorithm 1).

    While x is mostly noise it goes on to the next level as it is, afterwards x / alpha does (the same where alpha is 1,
    as in the paper), and from the last level it goes to x0_hat. So `num_steps` levels take num_steps *
    num_updates calls and one more. What is left of the levels' noise falls with num_steps * num_updates * step_size: a
    Gaussian is 11 % too wide where that is 100, 5 % where it is 240, 1 % where it is 2000.

    Args:
        num_updates: T, steps at each level.
        step_size: epsilon / sigma_L^2, the step in units of the level's variance; the paper's 2e-5 / 0.01^2 is 0.2.
    """

    draws_noise = True

    def __init__(self, num_updates: int = 100, step_size: float = 0.2) -> None:
        if num_updates < 1 or not 0 < step_size < 2:
            raise ValueError(
                f"num_updates must be at least 1 and step_size in (0, 2), but they are {num_updates} and {step_size}"
            )
        self.num_updates = num_updates
        self.step_size = step_size

    def steps(self, denoise: Denoise, x: Tensor, schedule: NoiseSchedule, levels: list[Level], noise: Noise) -> Steps:
        for now, then in pairwise(levels):
            for _ in range(self.num_updates):
                x0_hat = denoise(x, now.t)
                x = langevin_step(x, x0_hat, now, self.step_size, noise)
            if then.sigma == 0:
                x = x0_hat = denoise(x, now.t)
            else:
                x = x * (then.alpha / now.alpha if now.logsnr > 0 else 1.0)
            yield x, x0_hat


class PredictorCorrector(Sampler):
    """An ancestral step to the next level, then Langevin steps there (Song et al. 2021, Algorithm 2).

    The paper's step 2 (snr |noise| / |score|)^2 has the norms of the batch; with their expectations instead, it is
    2 snr^2 sigma^2, and no sample depends on another.

    Args:
        num_corrections: M, Langevin steps at each level; none at the last, sigma = 0.
        snr: r, the ratio of the lengths of a step along the score and of its noise.
    """

    draws_noise = True

    def __init__(self, num_corrections: int = 1, snr: float = 0.16) -> None:
        if num_corrections < 0 or not 0 < snr < 0.7:
            raise ValueError(
                f"num_corrections must not be negative and snr in (0, 0.7), but they are {num_corrections} and {snr}"
            )
        self.num_corrections = num_corrections
        self.step_size = 4 * snr**2  # the paper's Langevin step is twice as long as `langevin_step`'s
        self.predictor = Ancestral()

    def steps(self, denoise: Denoise, x: Tensor, schedule: NoiseSchedule, levels: list[Level], noise: Noise) -> Steps:
        for now, then in pairwise(levels):
            x0_hat = denoise(x, now.t)
            x = self.predictor.step(x, x0_hat, now, then, noise)
            for _ in range(self.num_corrections if then.sigma > 0 else 0):
                x = langevin_step(x, denoise(x, then.t), then, self.step_size, noise)
            yield x, x0_hat
