"""What the LightningModules share: optimizer, learning rate, keyed randomness, what is saved and exported."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import lightning
import torch
from torch import Tensor, nn

from carrara import keyed_random
from carrara.autoencoder.base import Autoencoder
from carrara.model.optimizer import parameter_groups, warmup_cooldown
from carrara.network.by_reference import ByReference

OptimizerFactory = Callable[[list[dict]], torch.optim.Optimizer]


def share(name: str, value: float) -> float:
    """A setting that is a share or a probability.

    Raises:
        ValueError: it does not lie in [0, 1].
    """
    if not 0 <= value <= 1:
        raise ValueError(f"model.{name}={value} must lie between 0 and 1")
    return value


class Model(lightning.LightningModule):
    """One trainable part.

    Args:
        optimizer: makes the optimizer of parameter groups (a `_partial_` config).
        warmup_steps: optimizer steps over which the learning rate rises.
        cooldown: share of all steps over which it falls to zero at the end.
        max_steps: optimizer steps of the run.
        seed: of everything drawn per sample; see `carrara.keyed_random`.
    """

    kind: ClassVar[str]  # of the component it exports
    takes_latents: ClassVar[bool] = False  # learns from a batch that has its pictures' latents and not the pictures

    def __init__(self, optimizer: OptimizerFactory, warmup_steps: int, cooldown: float, max_steps: int, seed: int):
        super().__init__()
        self.optimizer_factory = optimizer
        if warmup_steps < 0:
            raise ValueError(f"model.warmup_steps={warmup_steps} must be 0 or more")
        self.warmup_steps = warmup_steps
        self.cooldown = share("cooldown", cooldown)
        self.max_steps = max_steps
        self.seed = seed

    @property
    def exported(self) -> nn.Module:
        """The module that becomes the component: the attribute that its kind names."""
        module = getattr(self, self.kind)
        assert isinstance(module, nn.Module)
        return module

    @property
    def hot(self) -> list[nn.Module]:
        """The modules most of the time is spent in, which `trainer.compile` compiles."""
        raise NotImplementedError

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The names that `loss` returns for validation."""
        return ("loss",)

    def loss(self, batch: dict[str, Any], u: Tensor | None = None) -> dict[str, Tensor]:
        """Named scalar losses of a batch; "loss" is the one to minimise.

        Args:
            batch: as the loader yields it.
            u: (B,) uniforms that replace the keyed ones where a loss has times, so that validation can spread
                them evenly.
        """
        raise NotImplementedError

    def finish(self, batches: Iterable[Tensor]) -> None:
        """Measure on training images (B, 3, R, R) in [−1, 1] what the exported part carries besides its weights."""

    def write_exported(self, folder: Path) -> None:
        """Write into the component's folder what it holds besides the weights of the exported part."""

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        losses = self.loss(batch)
        # the gradient of a loss that is not finite is NaN in every parameter, and so, once it is shared, on every rank
        loss = losses["loss"]
        return losses | {"loss": loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)}

    def parameter_groups(self) -> list[dict]:
        """What the optimizer steps; a group's own settings go before the optimizer's."""
        return parameter_groups(self)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_factory(self.parameter_groups())
        factor = warmup_cooldown(self.warmup_steps, self.max_steps, self.cooldown)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def images(self, batch: dict[str, Any]) -> Tensor:
        """The batch's images (B, 3, R, R) in [−1, 1]."""
        return batch["images"].to(torch.float32) / 127.5 - 1.0

    @torch.no_grad()
    def latents(self, batch: dict[str, Any], autoencoder: Autoencoder) -> Tensor:
        """A sample of the posterior, (B, C, h, w) float32, of the pictures or as their cache has it."""
        if "latent_mean" in batch:
            noise = self.normal(batch, "posterior", tuple(batch["latent_mean"].shape[1:]))
            return batch["latent_mean"] + batch["latent_std"] * noise
        images = self.images(batch)
        shape = autoencoder.latent_shape(*images.shape[-2:])
        return autoencoder.encode(images, self.normal(batch, "posterior", shape)).float()

    def uniform(self, batch: dict[str, Any], purpose: str) -> Tensor:
        """(B,) uniforms keyed by the samples' positions in the stream."""
        return keyed_random.uniform(self.seed, batch["positions"], purpose)

    def spread(self, batch: dict[str, Any], purpose: str) -> Tensor:
        """(B,) uniforms keyed by the samples' positions in the stream, evenly spread over each batch."""
        return keyed_random.spread(self.seed, batch["positions"], purpose)

    def normal(self, batch: dict[str, Any], purpose: str, shape: tuple[int, ...]) -> Tensor:
        """(B, *shape) standard normal noise keyed by the samples' positions in the stream."""
        return keyed_random.normal(self.seed, batch["positions"], purpose, shape)

    # A frozen part is somebody else's: it is neither trained nor saved.

    def _frozen(self) -> dict[str, nn.Module]:
        """The modules, at any depth, that have parameters and none to train; by name."""
        frozen = {}
        for name, module in self.named_modules():
            parameters = list(module.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                frozen[name] = module
        return frozen

    def _frozen_keys(self) -> set[str]:
        """Keys of frozen parts, except for the references to weights that lie elsewhere: resuming compares them."""
        frozen = tuple(f"{name}." for name in self._frozen())
        references = tuple(f"{name}." for name, module in self.named_modules() if isinstance(module, ByReference))
        return {key for key in self.state_dict() if key.startswith(frozen) and not key.startswith(references)}

    def train(self, mode: bool = True) -> "Model":
        super().train(mode)
        for module in self._frozen().values():
            module.eval()
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for key in self._frozen_keys():
            del checkpoint["state_dict"][key]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = self.state_dict()
        checkpoint["state_dict"] = checkpoint["state_dict"] | {key: own[key] for key in self._frozen_keys()}
