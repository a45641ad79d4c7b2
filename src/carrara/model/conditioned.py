"""A network and what tells it the captions: trained, saved and exported together."""

from typing import Any

from torch import Tensor, nn

from carrara.conditioner.base import Conditioner
from carrara.network.caption_mean import CaptionMean
from carrara.network.conditioning import Conditioning


class Conditioned(nn.Module):
    """Network and conditioner of a model that makes pictures.

    Args:
        network: is called with the conditioner's answer.
        conditioner: captions -> Conditioning.
    """

    network: nn.Module
    conditioner: nn.Module

    def __init__(self, network: nn.Module, conditioner: nn.Module):
        super().__init__()
        self.network = network
        self.conditioner = conditioner

    def conditioning(self, batch: dict[str, Any], drop: Tensor) -> Conditioning:
        """Of a batch's captions, or as their cache has it; of the empty caption where `drop` (B,) says so."""
        if "tokens" in batch:
            encoded = Conditioning(batch["tokens"], batch["mask"], batch["pooled"])
            if not drop.any():
                return encoded
            return encoded.where(drop, self.conditioner([""] * len(drop)))
        captions = ["" if d else caption for d, caption in zip(drop.tolist(), batch["captions"], strict=True)]
        return self.conditioner(captions)


def caption_mean(channels: int, conditioner: Conditioner, weight: float) -> CaptionMean | None:
    """What a text learns from beside a model, with this weight; None with a weight of 0, or if the text is frozen."""
    learns = any(parameter.requires_grad for parameter in conditioner.parameters())
    return CaptionMean(channels, conditioner.width) if weight and learns else None
