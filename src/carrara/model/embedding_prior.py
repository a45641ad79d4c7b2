"""What DALL-E 2's two priors share: the CLIP whose embeddings they make, and what they are told."""

from typing import Any

from torch import Tensor

from carrara.evaluator.clip import CLIP
from carrara.model.base import Model
from carrara.model.conditioned import Conditioned
from carrara.network.conditioning import Conditioning


class EmbeddingPriorModel(Model):
    """From a caption to the embedding that CLIP would give its picture (Ramesh et al. 2022, "unCLIP", section 2.2).

    The network is told the caption's tokens, and CLIP's embedding of it as the pooled vector. What is exported is a
    `Conditioned`.

    Attributes:
        clip: frozen; never the evaluator, which would judge itself.
    """

    clip: CLIP

    def keep(self, clip: CLIP) -> None:
        """Take the CLIP, as it is."""
        clip.requires_grad_(False)
        self.clip = clip.eval()

    def embeddings(self, images: Tensor) -> Tensor:
        """images (B, 3, R, R) in [−1, 1] -> what is to be generated (B, E), of mean square 1."""
        return self.clip.image_directions(images)

    def conditioning(self, batch: dict[str, Any], drop: Tensor) -> Conditioning:
        """What the network is told; of the empty caption where `drop` (B,) says so."""
        return self.told(["" if d else caption for d, caption in zip(drop.tolist(), batch["captions"], strict=True)])

    def told(self, captions: list[str]) -> Conditioning:
        """What the network is told of captions."""
        conditioned = self.exported
        assert isinstance(conditioned, Conditioned)
        texts = conditioned.conditioner(captions)
        return Conditioning(texts.tokens, texts.mask, self.clip.text_directions(captions))
