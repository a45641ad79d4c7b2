"""Captions to pictures by the inverse of a normalizing flow."""

from collections.abc import Sequence

import torch
from torch import Tensor

from carrara.model.flow import FlowModel, log_likelihood
from carrara.network.conditioning import Conditioning
from carrara.network.layers import exact
from carrara.network.tarflow import Guide, TarFlow
from carrara.pipeline.base import OnStep
from carrara.pipeline.denoising import Draws


class FlowToImage:
    """Noise → each block's inverse, patch by patch → what the noise of training added is taken away → decode once.

    It computes in float32, whatever the autocast: a patch is made of patches that are made, and errors add up.

    Args:
        model: the trained flow.
        resolution: of the pictures.
        guidance_scale: the shift and log-scale of every patch are extrapolated from those of the empty caption to those
            of the caption (Zhai et al. 2024, section 2.6, whose w is guidance_scale − 1), and beyond; 1 is off.
        temperature: the noise's standard deviation.
    """

    def __init__(self, model: FlowModel, resolution: int, guidance_scale: float, temperature: float):
        if not temperature > 0:
            raise ValueError(f"pipeline.temperature must be above 0, but is {temperature}")
        self.model = model
        self.resolution = resolution
        self.guidance_scale = guidance_scale
        self.temperature = temperature

    @property
    def network(self) -> TarFlow:
        network = self.model.generator.network
        assert isinstance(network, TarFlow)
        return network

    @property
    def num_steps(self) -> int:
        return len(self.network.blocks) + (self.model.noise_std is not None)

    @torch.no_grad()
    def __call__(self, captions: list[str], indices: Sequence[int], seed: int, on_step: OnStep | None = None) -> Tensor:
        """One picture a caption, (B, 3, R, R) in [−1, 1].

        Args:
            captions: B texts; "" is the unconditional picture.
            indices: B numbers; picture k of a seed is the same whatever else is in the batch.
            seed: of the noise.
            on_step: told (step, t, x, x) after every block, and once more when the noise is taken away.
        """
        device = self.model.device
        shape = self.model.autoencoder.latent_shape(self.resolution, self.resolution)
        noise = Draws(seed, torch.as_tensor(list(indices))).of_shape(shape, device)()

        def tell(step: int, x: Tensor) -> None:
            if on_step is not None:
                on_step(step, torch.tensor(1 - (step + 1) / self.num_steps), x, x)

        with exact(noise):
            texts = self.model.generator.conditioner(captions)
            steps = self.network.inverse_steps(self.temperature * noise, *self._guided(texts))
            for step, x in enumerate(steps):
                tell(step, x)
            if self.model.noise_std is not None:
                x = x + self.model.noise_std**2 * self.score(x, texts)
                tell(self.num_steps - 1, x)
        return self.decode(x)

    def _guided(self, texts: Conditioning) -> tuple[Conditioning, Guide | None]:
        if self.guidance_scale == 1:
            return texts, None
        nothing = self.model.generator.conditioner([""] * len(texts.mask))

        def guide(parameters: Tensor) -> Tensor:
            positive, negative = parameters.chunk(2)
            return negative + self.guidance_scale * (positive - negative)

        return texts.cat(nothing), guide

    @torch.enable_grad()
    def score(self, x: Tensor, texts: Conditioning) -> Tensor:
        """∇ log p(x | caption), (B, C, h, w); x + noise_std² of it is what x was without noise (section 2.5)."""
        x = x.detach().requires_grad_()
        [gradient] = torch.autograd.grad(log_likelihood(*self.network(x, texts)).sum(), x)
        return gradient

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, R, R) in [−1, 1] from latents."""
        return self.model.autoencoder.decode(z).float().clamp(-1, 1)
