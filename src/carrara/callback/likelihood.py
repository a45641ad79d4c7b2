"""Bits per dimension of held-out pictures under a pixel model."""

import math

import torch
from torch import Tensor

from carrara import keyed_random
from carrara.callback.score import Setting
from carrara.diffusion.likelihood import discretized_gaussian, ode_log_likelihood, ode_times, variational_bound
from carrara.metric.mean import Mean
from carrara.model.base import Model
from carrara.model.diffusion import DiffusionModel

_NAMES = ("bound", "prior", "steps", "decoder", "ode")


class Likelihood:
    """Logs `val/bits_per_dim/…`: `bound` with its terms `prior`, `steps` and `decoder`, and `ode`.

    The model is told the captions, and is not guided. It computes in float32, whatever the autocast.

    Args:
        num_steps: of the bound's sampler (ancestral, with the forward step's variance) and of the ODE.
        seed: of the noise, the dequantisation and the probes.
        num_images: held-out pictures; all if there are fewer.
        batch_size: pictures in a chunk.
    """

    def __init__(self, num_steps: int, seed: int, num_images: int, batch_size: int):
        self.num_steps, self.seed = num_steps, seed
        self.num_images, self.batch_size = num_images, batch_size

    def __call__(self, model: Model, setting: Setting) -> dict[str, float]:
        """The scores of a diffusion of pixels."""
        assert isinstance(model, DiffusionModel) and model.autoencoder.is_identity
        means = {name: Mean().to(setting.device) for name in _NAMES}
        indices = setting.validation.held_out[: self.num_images]
        for chunk in setting.chunks(indices, self.batch_size):
            batch = setting.validation.take(chunk)
            images, positions = batch["images"].to(setting.device), batch["positions"].to(setting.device)
            for name, bits in self._bits(model, images, positions, batch["captions"]).items():
                means[name].update(bits.mean(), len(chunk))
        return {f"val/bits_per_dim/{name}": float(mean.compute()) for name, mean in means.items()}

    def _bits(self, model: DiffusionModel, images: Tensor, positions: Tensor, captions: list[str]) -> dict[str, Tensor]:
        """Of each picture, (B,); images uint8 (B, 3, R, R)."""
        shape, per_dim = images.shape[1:], 1 / (math.log(2) * images[0].numel())
        with torch.no_grad():
            conditioning = model.predictor.conditioner(captions)
        schedule = model.objective.schedule
        denoise = model.objective.denoiser(model.objective.predict(model.predictor.network, conditioning))
        step = iter(range(2**31))

        def noise() -> Tensor:
            return keyed_random.normal(self.seed, positions, f"likelihood/{next(step)}", shape)

        with torch.no_grad():
            bound = variational_bound(
                denoise, images.float() / 127.5 - 1, schedule, schedule.times(self.num_steps), noise,
                discretized_gaussian, variance="beta",
            )  # fmt: skip
        # a level of 256 spread over the 1/127.5 that is its share of [−1, 1] (uniform dequantisation)
        within = keyed_random.uniform(self.seed, positions, "likelihood/dequantisation", shape)
        x = (images.float() + within - 0.5) / 127.5 - 1
        probe = keyed_random.normal(self.seed, positions, "likelihood/probe", shape).sign()
        log_density = ode_log_likelihood(denoise, x, schedule, ode_times(schedule, self.num_steps), probe)
        terms = {"bound": bound.total, "prior": bound.prior, "steps": bound.steps, "decoder": bound.decoder}
        bits = {name: nats * per_dim for name, nats in terms.items()}
        return bits | {"ode": -log_density * per_dim + math.log2(127.5)}
