"""From noise to latents with a trained noise predictor: the part that all pipelines of diffusion share."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count

import torch
from torch import Tensor

from carrara import keyed_random
from carrara.diffusion.guidance import Guidance, Pair, autoguidance, classifier_free
from carrara.diffusion.sampler import Sampler
from carrara.diffusion.thresholding import Thresholding, Unbounded
from carrara.model.denoising import DenoisingModel
from carrara.network.conditioning import Conditioning
from carrara.pipeline.base import OnStep
from carrara.pipeline.source import Source


@dataclass(frozen=True)
class Sampling:
    """How to get from noise to a latent.

    Attributes:
        times: (num_steps + 1,), of `carrara.diffusion.spacing`.
        weak: a weaker model of the same latents, schedule and target, for autoguidance; None guides by the empty
            caption.
    """

    sampler: Sampler
    times: Tensor
    guidance: Guidance
    thresholding: Thresholding = field(default_factory=Unbounded)
    weak: DenoisingModel | None = None

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1


@dataclass(frozen=True)
class Draws:
    """Standard normal noise of some pictures, drawn on the CPU, where it is the same for every device and batch.

    Attributes:
        seed: of all pictures.
        positions: (B,) their numbers.
        purpose: tells draws for different things apart.
    """

    seed: int
    positions: Tensor
    purpose: str = "generation"

    def of_shape(self, shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
        """What draws (B, *shape), anew at every call."""
        calls = count()

        def draw() -> Tensor:
            return keyed_random.normal(self.seed, self.positions, f"{self.purpose}/{next(calls)}", shape).to(device)

        return draw


@torch.no_grad()
def texts(model: DenoisingModel, captions: list[str], sampling: Sampling) -> tuple[Conditioning, Conditioning]:
    """Captions as the model is told them, and what guidance leads away from; see `denoised`."""
    conditioner, weak = model.predictor.conditioner, sampling.weak
    negative = conditioner([""] * len(captions)) if weak is None else weak.predictor.conditioner(captions)
    return conditioner(captions), negative


@torch.no_grad()
def denoised(
    model: DenoisingModel,
    positive: Conditioning,
    negative: Conditioning,
    shape: tuple[int, ...],
    draws: Draws,
    sampling: Sampling,
    on_step: OnStep | None = None,
    source: tuple[Source, Tensor] | None = None,
) -> Tensor:
    """Latents (B, *shape), float32.

    Args:
        positive: what B pictures are to show.
        negative: what guidance leads away from, as a rule the empty caption; or what the weak model is told.
        shape: of a latent.
        draws: their noise.
        sampling: how.
        on_step: told (step, t, latents, estimate of the clean latents) after every step.
        source: a picture to start from instead of noise alone, and its latent *shape.
    """
    objective, network, schedule = model.objective, model.predictor.network, model.objective.schedule
    noise = draws.of_shape(shape, positive.tokens.device)
    predict, weak = objective.predict(network, positive), sampling.weak
    pair: Pair
    if weak is None:
        pair = classifier_free(objective, network, positive, negative)
    else:
        pair = autoguidance(predict, weak.objective.predict(weak.predictor.network, negative))
    denoise = sampling.thresholding.denoiser(objective.denoiser(sampling.guidance.guided(predict, pair)))
    times = sampling.times
    if source is None:
        z = schedule.prior_scale * noise()
    else:
        picture, latent = source
        times = picture.rest_of(times)
        z0 = latent.expand(len(draws.positions), *shape)
        z = objective.add_noise(z0, noise(), times[0])
        denoise = picture.keeping(denoise, z0)
    return sampling.sampler(denoise, z, schedule, times, noise, on_step)
