"""Captions to embeddings, one component after the other."""

from dataclasses import dataclass

import torch
from torch import Tensor

from carrara.model.autoregressive_prior import AutoregressivePriorModel
from carrara.pipeline.embedding_prior import EmbeddingPrior
from carrara.pipeline.token_draw import TokenDraw


@dataclass(frozen=True)
class AutoregressivePrior(EmbeddingPrior):
    """Caption → tokens of embeddings → embeddings.

    Attributes:
        model, candidates: see `EmbeddingPrior`.
        temperature, top_k, top_p, guidance_scale: see `TokenDraw`.
    """

    model: AutoregressivePriorModel
    temperature: float
    top_k: int | None
    top_p: float | None
    guidance_scale: float

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.draw  # refuses what is impossible

    @property
    def draw(self) -> TokenDraw:
        return TokenDraw(self.temperature, self.top_k, self.top_p, self.guidance_scale)

    def found(self, captions: list[str], numbers: Tensor, seed: int) -> Tensor:
        network, told = self.model.network, self.model.told(captions)
        if self.draw.guided:
            told = told.cat(self.model.told([""] * len(captions)))
        choosers = [self.draw.chooser(seed, numbers, f"prior/{k}") for k in range(self.candidates)]
        return torch.stack([network.tokens.dequantise(network.sample(told, choose)) for choose in choosers])
