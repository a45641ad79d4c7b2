"""Training a transformer to continue captions with the tokens of their pictures."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from carrara.autoencoder.discrete import Discrete
from carrara.model.base import Model, OptimizerFactory, share
from carrara.model.token_loss import mean_by_caption
from carrara.network.autoregressive import TextImageTransformer


class Predictions(NamedTuple):
    """What is said of a batch's tokens.

    Attributes:
        image, text: logits (N, K) float32 and the true tokens (N,) int64.
        words: (B, L) bool, which of the captions' tokens the text's are.
    """

    image: tuple[Tensor, Tensor]
    text: tuple[Tensor, Tensor]
    words: Tensor


class AutoregressiveModel(Model):
    """Minimises the cross-entropy of image and text tokens, each by itself averaged, in nats.

    Ramesh et al. 2021, section 2.2, where the weights are 7/8 and 1/8. Of the text the words and the end are predicted,
    not the start and the padding, and nothing of a caption that was dropped, which adds 0. Words are averaged caption
    by caption, where the paper averages over those of a batch: see `mean_by_caption`.

    Args:
        network: of caption and picture in one sequence.
        autoencoder: frozen.
        image_weight, text_weight: of the two cross-entropies.
        caption_dropout: probability of training on the empty caption, for guidance.
        optimizer, warmup_steps, cooldown, max_steps, seed: see `Model`.

    Raises:
        ValueError: the auto-encoder has no tokens, or other ones than the network.
    """

    kind = "network"
    autoencoder: Discrete

    def __init__(
        self,
        network: TextImageTransformer,
        autoencoder: nn.Module,
        image_weight: float,
        text_weight: float,
        caption_dropout: float,
        optimizer: OptimizerFactory,
        warmup_steps: int,
        cooldown: float,
        max_steps: int,
        seed: int,
    ):
        super().__init__(optimizer, warmup_steps, cooldown, max_steps, seed)
        if not isinstance(autoencoder, Discrete):
            raise ValueError("the auto-encoder has no tokens: take a discrete one, autoencoder=vq or gumbel")
        if autoencoder.num_codes != network.num_codes:
            raise ValueError(
                f"network.num_codes={network.num_codes}, but the auto-encoder has {autoencoder.num_codes} codes: "
                f"pass autoencoder.num_codes={autoencoder.num_codes}"
            )
        self.network = network
        autoencoder.requires_grad_(False)
        self.autoencoder = autoencoder.eval()
        self.image_weight = image_weight
        self.text_weight = text_weight
        self.caption_dropout = share("caption_dropout", caption_dropout)

    @property
    def hot(self) -> list[nn.Module]:
        return [self.network]

    @property
    def loss_names(self) -> tuple[str, ...]:
        return ("loss", "image_nll", "text_nll")

    def loss(self, batch: dict[str, Any], u: Tensor | None = None) -> dict[str, Tensor]:
        """The loss; `u` has no times to replace, but with it no caption is dropped."""
        drop = torch.zeros_like(batch["positions"], dtype=torch.bool)
        if u is None:
            drop = self.uniform(batch, "caption_dropout") < self.caption_dropout
        image, text, words = self.predictions(batch, drop)
        image_nll, text_nll = F.cross_entropy(*image), mean_by_caption(*text, words)
        loss = self.image_weight * image_nll + self.text_weight * text_nll
        return {"loss": loss, "image_nll": image_nll, "text_nll": text_nll}

    def predictions(self, batch: dict[str, Any], drop: Tensor) -> Predictions:
        """What is said of all tokens of a batch.

        Args:
            batch: of B samples.
            drop: (B,) bool, whose caption is empty and of which no text is predicted.
        """
        captions = ["" if d else caption for d, caption in zip(drop.tolist(), batch["captions"], strict=True)]
        ids, mask = self.network.read(captions)
        with torch.no_grad():
            images = self.images(batch)
            tokens = self.autoencoder.tokens(images)
        _, *grid = self.autoencoder.latent_shape(*images.shape[-2:])
        text_logits, image_logits = self.network(ids, mask, tokens, tuple(grid))
        words = (mask & ~drop.to(mask.device)[:, None])[:, 1:]
        text = text_logits[words].float(), ids[:, 1:][words]
        return Predictions((image_logits.flatten(0, 1).float(), tokens.flatten()), text, words)
