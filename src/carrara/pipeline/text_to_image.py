"""Captions to pictures: conditioner, noise predictor, sampler, decoder."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from carrara import keyed_random
from carrara.autoencoder.base import Autoencoder
from carrara.diffusion.guidance import Guidance, autoguidance, classifier_free
from carrara.diffusion.objective import Objective, Predict
from carrara.diffusion.sampler import OnStep, Sampler
from carrara.diffusion.thresholding import Thresholding, Unbounded
from carrara.model.diffusion import DiffusionModel
from carrara.pipeline.source import Source


class TextToImage:
    """Latent noise → steps → decode once.

    Args:
        network: the noise predictor.
        conditioner: captions -> Conditioning.
        autoencoder: decodes the latents.
        objective: the schedule and parameterization the network was trained with.
        resolution: of the pictures.
    """

    def __init__(
        self,
        network: nn.Module,
        conditioner: nn.Module,
        autoencoder: Autoencoder,
        objective: Objective,
        resolution: int,
    ):
        self.network = network
        self.conditioner = conditioner
        self.autoencoder = autoencoder
        self.objective = objective
        self.resolution = resolution

    @classmethod
    def of(cls, model: DiffusionModel, resolution: int) -> "TextToImage":
        """The pipeline of a model in training, with the weights it has now."""
        predictor = model.predictor
        return cls(predictor.network, predictor.conditioner, model.autoencoder, model.objective, resolution)

    @torch.no_grad()
    def __call__(
        self,
        captions: list[str],
        indices: Sequence[int],
        seed: int,
        sampling: "Sampling",
        on_step: OnStep | None = None,
        source: Source | None = None,
    ) -> Tensor:
        """One picture a caption, (B, 3, R, R) in [−1, 1].

        Args:
            captions: B texts; "" is the unconditional picture.
            indices: B numbers; picture k of a seed is the same whatever else is in the batch.
            seed: of the noise.
            sampling: how to get from noise to the latent.
            on_step: told (step, t, latent, estimate of the clean latent) after every step.
            source: a picture to start from instead of noise alone.
        """
        device = next(self.network.parameters()).device
        positions = torch.as_tensor(list(indices))  # noise is drawn on the CPU: the same on every device
        shape = self.autoencoder.latent_shape(self.resolution, self.resolution)
        draws = iter(range(2**31))

        def noise() -> Tensor:
            return keyed_random.normal(seed, positions, f"generation/{next(draws)}", shape).to(device)

        denoise = sampling.thresholding.denoiser(self.objective.denoiser(self._guided(captions, sampling)))
        schedule, times = self.objective.schedule, sampling.times
        if source is None:
            z = sampling.sampler(denoise, schedule.prior_scale * noise(), schedule, times, noise, on_step)
            return self.decode(z)
        times = source.rest_of(times)
        z0 = self.autoencoder.encode(source.image.to(device)[None]).float().expand(len(captions), *shape)
        z = self.objective.add_noise(z0, noise(), times[0])
        z = sampling.sampler(source.keeping(denoise, z0), z, schedule, times, noise, on_step)
        return source.paste(self.decode(z))

    def _guided(self, captions: list[str], sampling: "Sampling") -> Predict:
        texts, weak = self.conditioner(captions), sampling.weak
        positive = self.objective.predict(self.network, texts)
        if weak is None:
            nothing = self.conditioner([""] * len(captions))
            pair = classifier_free(self.objective, self.network, texts, nothing)
        else:
            pair = autoguidance(positive, weak.objective.predict(weak.network, weak.conditioner(captions)))
        return sampling.guidance.guided(positive, pair)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, R, R) in [−1, 1] from latents."""
        return self.autoencoder.decode(z).float().clamp(-1, 1)


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
    weak: TextToImage | None = None

    @property
    def num_steps(self) -> int:
        return len(self.times) - 1


class Watch:
    """An `on_step` that keeps decoded pictures on their way out of the noise.

    Args:
        pipeline: decodes.
        num_steps: that it will see.
        num_frames: how many steps to keep, spread evenly, the last always among them.
        num_samples: how many of the batch, from its first.

    Attributes:
        frames: (num_samples, 3, R, R) of each kept step: the latent as it is then, decoded.
        estimates: the same of x0_hat, what the network thinks it will become.
        times: t of each.
    """

    def __init__(self, pipeline: TextToImage, num_steps: int, num_frames: int, num_samples: int):
        self.pipeline = pipeline
        count = min(num_frames, num_steps)
        self.kept = {round((k + 1) * num_steps / count) - 1 for k in range(count)}
        self.num_samples = num_samples
        self.frames: list[Tensor] = []
        self.estimates: list[Tensor] = []
        self.times: list[float] = []

    def __call__(self, step: int, t: Tensor, x: Tensor, x0_hat: Tensor) -> None:
        if step in self.kept:
            self.frames.append(self.pipeline.decode(x[: self.num_samples]))
            self.estimates.append(self.pipeline.decode(x0_hat[: self.num_samples]))
            self.times.append(float(t))
