"""Training a noise predictor in the latent space of a frozen auto-encoder (identity: in pixels)."""

from typing import Any

from torch import Tensor, nn

from carrara.autoencoder.base import Autoencoder
from carrara.conditioner.base import Conditioner
from carrara.diffusion.objective import Objective
from carrara.errors import UserError
from carrara.model.base import OptimizerFactory
from carrara.model.conditioned import Conditioned, caption_mean
from carrara.model.denoising import DenoisingModel
from carrara.network.conditioning import Conditioning
from carrara.network.lora import add_lora, load_base, merged


class DiffusionModel(DenoisingModel):
    """Latent diffusion (Rombach et al. 2022).

    Minimises the objective, and with a `caption_mean_weight` also the error of `CaptionMean`, from which the text
    learns the order of its objects much sooner (`experiments/README.md`). "loss" is the objective's value alone.

    Args:
        autoencoder: frozen.
        caption_mean_weight: of that error; with 0, or a frozen conditioner, there is none.
        network, conditioner, objective, caption_dropout, stratified: see `DenoisingModel`.
        lora: `rank`, `alpha` and `targets` of `add_lora`: additions to the network, which are all that is trained then.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.
    """

    takes_latents = True
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
        if lora is not None:
            conditioner.requires_grad_(False)
            add_lora(network, **lora)
        super().__init__(
            network, conditioner, objective, caption_dropout, stratified,
            optimizer, warmup_steps, cooldown, max_steps, seed,
        )  # fmt: skip
        self.lora = lora
        self.base = ""  # SHA-256 of the weights it begins with
        autoencoder.requires_grad_(False)
        self.autoencoder = autoencoder.eval()
        self.caption_mean_weight = caption_mean_weight
        self.caption_mean = caption_mean(autoencoder.latent_channels, conditioner, caption_mean_weight)

    @property
    def exported(self) -> nn.Module:
        if self.lora is None:
            return super().exported
        return Conditioned(merged(self.predictor.network), self.predictor.conditioner)

    def begin_with(self, network: dict[str, Tensor], conditioner: dict[str, Tensor] | None, sha256: str) -> None:
        """Takes trained weights to begin with, of the network and perhaps of the conditioner.

        Args:
            sha256: of the file they come from.
        """
        load_base(self.predictor.network, network)
        if conditioner is not None:
            self.predictor.conditioner.load_state_dict(conditioner)
        self.base = sha256

    def clean(self, batch: dict[str, Any]) -> Tensor:
        return self.latents(batch, self.autoencoder)

    def beside(self, denoising: Tensor, conditioning: Conditioning, x0: Tensor) -> dict[str, Tensor]:
        if self.caption_mean is None:
            return super().beside(denoising, conditioning, x0)
        return self.caption_mean.beside(denoising, self.caption_mean_weight, conditioning, x0)

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
