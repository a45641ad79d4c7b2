"""Tiny models, batches and runs that several folders of tests share."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import lightning
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from carrara.autoencoder.base import Autoencoder
from carrara.autoencoder.gumbel import Gumbel
from carrara.autoencoder.identity import Identity
from carrara.autoencoder.kl import KL
from carrara.autoencoder.vq import VQ
from carrara.callback.score import Setting
from carrara.classifier.cnn import CNN
from carrara.conditioner.text import Text
from carrara.corruption.noise import Gaussian
from carrara.data.validation import ValidationSet
from carrara.diffusion.guidance import Guidance
from carrara.diffusion.objective import Objective
from carrara.diffusion.parameterization import Epsilon, Flow, Parameterization
from carrara.diffusion.sampler import Ancestral, Sampler
from carrara.diffusion.schedule import Flow as FlowSchedule
from carrara.diffusion.schedule import NoiseSchedule
from carrara.diffusion.schedule_table import Linear
from carrara.diffusion.time_sampling import Uniform
from carrara.diffusion.weighting import Unweighted
from carrara.evaluator.clip import CLIP
from carrara.language_model.transformer import LanguageModel
from carrara.model.autoencoder import AutoencoderModel
from carrara.model.autoregressive import AutoregressiveModel
from carrara.model.classifier import ClassifierModel
from carrara.model.diffusion import DiffusionModel
from carrara.model.evaluator import EvaluatorModel
from carrara.model.flow import FlowModel
from carrara.model.gan import GANModel
from carrara.model.language_model import LanguageModelModel
from carrara.model.optimizer import Muon, sgd
from carrara.model.restoration import RestorationModel
from carrara.model.vae import VAEModel
from carrara.network.autoregressive import TextImageTransformer
from carrara.network.discriminator import Discriminator
from carrara.network.dit import DiT
from carrara.network.drunet import DRUNet
from carrara.network.generator import Generator
from carrara.network.pyramid import Pyramid
from carrara.network.tarflow import FlowBlock, TarFlow
from carrara.network.tokenizer import Tokenizer
from carrara.network.unet import UNet
from carrara.network.variational import Variational
from carrara.pipeline.denoising import Sampling

COLORS = ["red", "green", "blue", "white"]
CAPTIONS = [f"a {size} {color} {shape}" for size in ("big", "small") for color in COLORS for shape in ("disc", "cube")]
RESOLUTION = 8
MUON = partial(Muon, lr=1e-3, momentum=0.95, betas=(0.9, 0.99), weight_decay=0.01)
SGD = partial(sgd, lr=1e-2)


def batch(positions: Iterable[int], resolution: int = RESOLUTION) -> dict[str, Any]:
    """A batch as the loader yields it; a sample depends on its position alone."""
    rows = list(positions)
    images = [
        torch.randint(0, 256, (3, resolution, resolution), generator=torch.Generator().manual_seed(k)) for k in rows
    ]
    return {
        "images": torch.stack(images).to(torch.uint8),
        "captions": [CAPTIONS[k % len(CAPTIONS)] for k in rows],
        "positions": torch.tensor(rows),
        "keys": [str(k) for k in rows],
        "skipped": {},
    }


class Stream:
    """Batches in a row, as a loader; a list would be taken for several loaders.

    As with the project's loader, `len` is that of the whole run, also if this is only the rest of it.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], done: int = 0):
        self.rows, self.done = list(rows), done

    def __len__(self) -> int:
        return self.done + len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)


def batches(stop: int, start: int = 0, size: int = 4, resolution: int = RESOLUTION) -> Stream:
    """The stream's batches start ... stop - 1."""
    return Stream((batch(range(k * size, (k + 1) * size), resolution) for k in range(start, stop)), start)


def train_tokenizers(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, Tokenizer):
            part.train_on(CAPTIONS)


def awake(module: nn.Module) -> nn.Module:
    """Fill the layers that are zero at first, behind which nothing of the rest is seen."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return module


def unet(**changes: Any) -> UNet:
    settings: dict[str, Any] = {
        "in_channels": 3,
        "resolution": RESOLUTION,
        "channels": [8, 16],
        "attention": [False, True],
        "num_blocks": 1,
        "depth": 1,
        "heads": 2,
        "expansion": 2,
        "context_width": 8,
        "pooled_width": 8,
        "qk_norm": True,
        "learned_positions": True,
    }
    return UNet(**settings | changes)


def drunet(**changes: Any) -> DRUNet:
    settings: dict[str, Any] = {"channels": [8, 16], "num_blocks": 1, "residual": True}
    return DRUNet(**settings | changes)


def dit(**changes: Any) -> DiT:
    settings: dict[str, Any] = {
        "in_channels": 3,
        "patch": 2,
        "width": 16,
        "depth": 2,
        "heads": 2,
        "expansion": 2.667,
        "context_width": 8,
        "pooled_width": 8,
        "text": "cross",
    }
    return DiT(**settings | changes)


def tarflow(**changes: Any) -> TarFlow:
    settings: dict[str, Any] = {
        "in_channels": 3,
        "patch": 2,
        "width": 16,
        "num_blocks": 2,
        "depth": 1,
        "heads": 2,
        "expansion": 2.667,
        "context_width": 8,
        "pooled_width": 8,
    }
    return TarFlow(**settings | changes)


def shift_and_scale(network: TarFlow) -> Tensor:
    """What a flow's only block subtracts from all patches, then the log of what it divides them by: a bias, to fill."""
    (block,) = network.blocks
    assert isinstance(block, FlowBlock)
    bias = block.project_out.bias
    assert isinstance(bias, Tensor)
    return bias


def text() -> Text:
    conditioner = Text(vocab_size=300, max_length=12, width=8, depth=1, heads=2)
    train_tokenizers(conditioner)
    return conditioner


def kl(**changes: Any) -> KL:
    settings: dict[str, Any] = {
        "latent_channels": 4,
        "downsampling": 4,
        "channels": [8, 16],
        "num_blocks": 1,
        "patch": 2,
        "kl_weight": 1e-3,
    }
    return KL(**settings | changes)


def vq(**changes: Any) -> VQ:
    settings: dict[str, Any] = {
        "num_codes": 16,
        "latent_channels": 4,
        "downsampling": 4,
        "channels": [8, 16],
        "num_blocks": 1,
        "patch": 2,
        "commitment_weight": 0.25,
        "decay": 0.9,
        "restart_below": 0.05,
    }
    return VQ(**settings | changes)


def gumbel(**changes: Any) -> Gumbel:
    settings: dict[str, Any] = {
        "num_codes": 16,
        "latent_channels": 4,
        "downsampling": 4,
        "channels": [8, 16],
        "num_blocks": 1,
        "patch": 2,
        "kl_weight": 1e-2,
        "temperature": 0.1,
        "anneal_steps": 10,
    }
    return Gumbel(**settings | changes)


def clip(resolution: int = RESOLUTION) -> CLIP:
    evaluator = CLIP(
        resolution=resolution,
        patch=4,
        image_width=16,
        image_depth=1,
        vocab_size=300,
        max_length=12,
        text_width=16,
        text_depth=1,
        heads=2,
        embedding_width=16,
    )
    train_tokenizers(evaluator)
    return evaluator


def objective(schedule: NoiseSchedule | None = None, parameterization: Parameterization | None = None) -> Objective:
    return Objective(schedule or FlowSchedule(), parameterization or Flow(), Uniform(), Unweighted())


def sampling(sampler: Sampler | None = None, scale: float = 2.0, num_steps: int = 4, **changes: Any) -> Sampling:
    times = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return Sampling(sampler or Ancestral(), times, Guidance(scale), **changes)


def epsilon_objective() -> Objective:
    return objective(Linear(), Epsilon())


def diffusion_model(autoencoder: Autoencoder | None = None, **changes: Any) -> DiffusionModel:
    autoencoder = autoencoder or Identity()
    settings: dict[str, Any] = {
        "network": unet(in_channels=autoencoder.latent_channels, resolution=RESOLUTION // autoencoder.downsampling),
        "conditioner": text(),
        "autoencoder": autoencoder,
        "objective": objective(),
        "caption_dropout": 0.1,
        "stratified": True,
        "caption_mean_weight": 0.0,
        "optimizer": MUON,
        "warmup_steps": 0,
        "cooldown": 0.0,
        "max_steps": 100,
        "seed": 0,
    }
    return DiffusionModel(**settings | changes)


def text_image_transformer(**changes: Any) -> TextImageTransformer:
    settings: dict[str, Any] = {
        "vocab_size": 300,
        "max_length": 8,
        "num_codes": 16,
        "width": 16,
        "depth": 2,
        "heads": 2,
        "expansion": 2.667,
    }
    network = TextImageTransformer(**settings | changes)
    train_tokenizers(network)
    return network


def autoregressive_model(**changes: Any) -> AutoregressiveModel:
    settings: dict[str, Any] = {
        "network": text_image_transformer(),
        "autoencoder": vq(downsampling=2, patch=1),
        "image_weight": 0.875,
        "text_weight": 0.125,
        "caption_dropout": 0.1,
        "optimizer": MUON,
        "warmup_steps": 0,
        "cooldown": 0.0,
        "max_steps": 100,
        "seed": 0,
    }
    return AutoregressiveModel(**settings | changes)


def flow_model(**changes: Any) -> FlowModel:
    settings: dict[str, Any] = {
        "network": tarflow(),
        "conditioner": text(),
        "autoencoder": Identity(),
        "noise_std": 0.05,
        "caption_dropout": 0.1,
        "caption_mean_weight": 0.0,
        "optimizer": MUON,
        "warmup_steps": 0,
        "cooldown": 0.0,
        "max_steps": 100,
        "seed": 0,
    }
    return FlowModel(**settings | changes)


def autoencoder_model(**changes: Any) -> AutoencoderModel:
    settings: dict[str, Any] = {
        "autoencoder": kl(),
        "perceptual": None,
        "perceptual_weight": 0.1,
        "adversarial_weight": 0.0,
        "adversarial_start": 0,
        "optimizer": MUON,
        "warmup_steps": 0,
        "cooldown": 0.0,
        "max_steps": 100,
        "seed": 0,
    }
    return AutoencoderModel(**settings | changes)


def evaluator_model(**changes: Any) -> EvaluatorModel:
    settings: dict[str, Any] = {
        "evaluator": clip(),
        "optimizer": MUON,
        "warmup_steps": 0,
        "cooldown": 0.0,
        "max_steps": 100,
        "seed": 0,
    }
    return EvaluatorModel(**settings | changes)


def classifier_model(labels: Sequence[str], channels: Sequence[int] = (8, 16), **changes: Any) -> ClassifierModel:
    classifier = CNN(channels, num_classes=len(set(labels)))
    classifier.labels.train_on(labels)
    settings: dict[str, Any] = {
        "classifier": classifier,
        "optimizer": MUON,
        "warmup_steps": 0,
        "cooldown": 0.0,
        "max_steps": 100,
        "seed": 0,
    }
    return ClassifierModel(**settings | changes)


def pyramid(**changes: Any) -> Pyramid:
    settings: dict[str, Any] = {
        "in_channels": 3,
        "resolution": RESOLUTION,
        "patch": 2,
        "channels": [8, 16],
        "attention": [False, True],
        "num_blocks": 1,
        "group_width": 8,
        "depth": 1,
        "heads": 2,
        "context_width": 8,
    }
    return Pyramid(**settings | changes)


def gan_model(**changes: Any) -> GANModel:
    settings: dict[str, Any] = {
        "network": Generator(pyramid(), noise_width=4, pooled_width=8),
        "conditioner": text(),
        "discriminator": Discriminator(pyramid(), pooled_width=8),
        "autoencoder": Identity(),
        "gradient_penalty": 0.5,
        "penalty_share": 1.0,
        "caption_mean_weight": 0.0,
        "player_betas": (0.5, 0.99),
        "text_learning_rate": 0.01,
        "optimizer": MUON,
        "warmup_steps": 0,
        "cooldown": 0.0,
        "max_steps": 100,
        "seed": 0,
    }
    return GANModel(**settings | changes)


def latent_gan_model(autoencoder: Autoencoder) -> GANModel:
    """One whose latents are 4 × 2 × 2."""
    shape = pyramid(in_channels=4, resolution=2, patch=1, channels=[8], attention=[True])
    return gan_model(network=Generator(shape, 4, 8), discriminator=Discriminator(shape, 8), autoencoder=autoencoder)


def vae_model(**changes: Any) -> VAEModel:
    settings: dict[str, Any] = {
        "network": Variational(pyramid(), noise_width=4, pooled_width=8),
        "conditioner": text(),
        "caption_mean_weight": 0.0,
        "optimizer": MUON,
        "warmup_steps": 0,
        "cooldown": 0.0,
        "max_steps": 100,
        "seed": 0,
    }
    return VAEModel(**settings | changes)


def language_model(objective: str, max_length: int = 12) -> LanguageModel:
    model = LanguageModel(objective, vocab_size=300, max_length=max_length, width=16, depth=2, heads=2)
    model.tokenizer.train_on(CAPTIONS)
    model.unigram.train_on(CAPTIONS)
    return model


def language_model_model(objective: str, **changes: Any) -> LanguageModelModel:
    settings: dict[str, Any] = {
        "language_model": language_model(objective),
        "optimizer": MUON,
        "warmup_steps": 0,
        "cooldown": 0.0,
        "max_steps": 100,
        "seed": 0,
    }
    return LanguageModelModel(**settings | changes)


def restoration_model(**changes: Any) -> RestorationModel:
    settings: dict[str, Any] = {
        "network": drunet(),
        "corruption": Gaussian(0.3, 0),
        "target": "noisy",
        "versions": "two",
        "optimizer": MUON,
        "warmup_steps": 0,
        "cooldown": 0.0,
        "max_steps": 100,
        "seed": 0,
    }
    return RestorationModel(**settings | changes)


def trainer(folder: Path, *callbacks: lightning.Callback, max_steps: int, **changes: Any) -> lightning.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "max_steps": max_steps,
        "max_epochs": -1,
        "callbacks": list(callbacks),
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "default_root_dir": folder,
    }
    return lightning.Trainer(**settings | changes)


class Validation:
    """Stands for a `ValidationSet`: held-out and seen samples in alternation."""

    def __init__(self, count: int, resolution: int = RESOLUTION):
        self.resolution = resolution
        self.held_out = np.arange(0, count, 2)
        self.splits = {"held_out": self.held_out, "seen": np.arange(1, count, 2)}

    def take(self, indices: NDArray[np.int64]) -> dict[str, Any]:
        return batch(indices.tolist(), self.resolution)


def setting(count: int = 12, rank: int = 0, world: int = 1, samples_dir: Path | None = None) -> Setting:
    validation = cast(ValidationSet, Validation(count))
    return Setting(validation, rank, world, torch.device("cpu"), nullcontext, samples_dir, 1)


def weights(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the state."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor], names: Sequence[str] | None = None) -> bool:
    """Whether two states are the same bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in names or a)
