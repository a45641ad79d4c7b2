"""Training a noise predictor in the latent space of a frozen auto-encoder (identity: in pixels)."""

from typing import Any

import torch
from torch import Tensor, nn

from carrara.autoencoder.base import Autoencoder
from carrara.conditioner.base import Conditioner
from carrara.diffusion.objective import Objective
from carrara.errors import UserError
from carrara.model.base import Model, OptimizerFactory
from carrara.network.caption_mean import CaptionMean
from carrara.network.conditioning import Conditioning
from carrara.network.lora import add_lora, load_base, merged


class DiffusionModel(Model):
    """Latent diffusion (Rombach et al. 2022), trained by DDPM's Algorithm 1 with any schedule, target and times.

    Minimises the objective, and with a `caption_mean_weight` also the error of `CaptionMean`, from which the text
    learns the order of its objects much sooner (`experiments/README.md`). "loss" is the objective's value alone.

    Args:
        network: the noise predictor, network(x, time, conditioning) -> like x.
        conditioner: captions -> Conditioning, trained along unless it is frozen.
        autoencoder: frozen.
        objective: from clean latents to a loss.
        caption_dropout: probability of training on the empty caption (classifier-free guidance).
        stratified: spread the times of a batch evenly over their distribution (Kingma et al. 2021, appendix I.1)
            instead of drawing each by itself.
        caption_mean_weight: of that error; 0 builds no `CaptionMean`.
        lora: `rank`, `alpha` and `targets` of `add_lora`: additions to the network, which are all that is trained then.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    kind = "noise_predictor"
    autoencoder: Autoencoder

    def __init__(
        self,
        network: nn.Module,
        conditioner: Conditioner,
        autoencoder: Autoencoder,
        objective: Objective,
        caption_dropout: float,
        stratified: bool,
        caption_mean_weight: float,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        cooldown: float,
        max_steps: int,
        seed: int,
        lora: dict[str, Any] | None = None,
    ):
        super().__init__(optimizer, warmup_steps, cooldown, max_steps, seed)
        if lora is not None:
            if caption_mean_weight:
                raise ValueError(
                    "model.caption_mean_weight must be 0 with model.lora, which leaves captions as they are"
                )
            conditioner.requires_grad_(False)
            add_lora(network, **lora)
        self.lora = lora
        self.base = ""  # SHA-256 of the weights it begins with
        self.predictor = NoisePredictor(network, conditioner)
        autoencoder.requires_grad_(False)
        self.autoencoder = autoencoder.eval()
        self.objective = objective
        self.caption_dropout = caption_dropout
        self.stratified = stratified
        self.caption_mean_weight = caption_mean_weight
        self.caption_mean = CaptionMean(autoencoder.latent_channels, conditioner.width) if caption_mean_weight else None

    @property
    def exported(self) -> nn.Module:
        if self.lora is None:
            return self.predictor
        return NoisePredictor(merged(self.predictor.network), self.predictor.conditioner)

    @property
    def hot(self) -> list[nn.Module]:
        return [self.predictor.network]

    def begin_with(self, network: dict[str, Tensor], conditioner: dict[str, Tensor] | None, sha256: str) -> None:
        """Takes trained weights to begin with, of the network and perhaps of the conditioner.

        Args:
            sha256: of the file they come from.
        """
        load_base(self.predictor.network, network)
        if conditioner is not None:
            self.predictor.conditioner.load_state_dict(conditioner)
        self.base = sha256

    def loss(self, batch: dict[str, Any], u: Tensor | None = None) -> dict[str, Tensor]:
        x0 = self._clean_latents(batch)
        training = u is None
        drop = torch.zeros_like(batch["positions"], dtype=torch.bool)
        if u is None:  # times and drops keyed by the position in the stream
            u = self.spread(batch, "time") if self.stratified else self.uniform(batch, "time")
            drop = self.uniform(batch, "caption_dropout") < self.caption_dropout
        conditioning = self._conditioning(batch, drop)
        eps = self.normal(batch, "noise", tuple(x0.shape[1:]))

        predict = self.objective.predict(self.predictor.network, conditioning)
        denoising = self.objective.loss(predict, x0, eps, u).mean()
        if self.caption_mean is None or not training:
            return {"loss": denoising}
        error = self.caption_mean.squared_error(conditioning, x0).mean()
        # its gradient without its value: the loss means the same with and without it, in training and validation
        loss = denoising + self.caption_mean_weight * (error - error.detach())
        return {"loss": loss, "caption_mean": error}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.lora is not None:  # what they were added to is not in it
            checkpoint["base"] = self.base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.lora is not None and checkpoint["base"] != self.base:
            raise UserError(
                f"the additions of model.lora were trained on other weights (SHA-256 {checkpoint['base'][:12]}…) than "
                f"those that start.network names ({self.base[:12]}…): put them back"
            )
        super().on_load_checkpoint(checkpoint)

    @torch.no_grad()
    def _clean_latents(self, batch: dict[str, Any]) -> Tensor:
        """A sample of the posterior, (B, C, h, w) float32, of the pictures or as their cache has it."""
        if "latent_mean" in batch:
            noise = self.normal(batch, "posterior", tuple(batch["latent_mean"].shape[1:]))
            return batch["latent_mean"] + batch["latent_std"] * noise
        images = self.images(batch)
        shape = self.autoencoder.latent_shape(*images.shape[-2:])
        return self.autoencoder.encode(images, self.normal(batch, "posterior", shape)).float()

    def _conditioning(self, batch: dict[str, Any], drop: Tensor) -> Conditioning:
        """Of the captions, or as their cache has it; of the empty caption where `drop` (B,) says so."""
        if "tokens" in batch:
            encoded = Conditioning(batch["tokens"], batch["mask"], batch["pooled"])
            return encoded.where(drop, self.predictor.conditioner([""] * len(drop)))
        captions = ["" if d else caption for d, caption in zip(drop.tolist(), batch["captions"], strict=True)]
        return self.predictor.conditioner(captions)


class NoisePredictor(nn.Module):
    """Network and conditioner, which are trained, saved and exported together."""

    network: nn.Module
    conditioner: nn.Module

    def __init__(self, network: nn.Module, conditioner: nn.Module):
        super().__init__()
        self.network = network
        self.conditioner = conditioner
