"""Tiny models of DALL-E 2 that its tests share."""

from typing import Any

import torch

from carrara.conditioner.image_embedding import ImageEmbedding
from carrara.diffusion.parameterization import X0
from carrara.diffusion.sampler import Euler
from carrara.evaluator.clip import CLIP
from carrara.model.prior import PriorModel
from carrara.model.unclip import UnCLIPModel
from carrara.network.prior_transformer import PriorTransformer
from carrara.pipeline.prior import Prior
from carrara.pipeline.unclip import UnCLIP
from tests.tiny import MUON, awake, clip, kl, objective, sampling, text, unet

WIDTH = 16  # of embeddings

_TRAINED: dict[str, Any] = {
    "stratified": True, "optimizer": MUON, "warmup_steps": 0, "cooldown": 0.0, "max_steps": 10, "seed": 0,
}  # fmt: skip


def prior_model(shared: CLIP | None = None, **changes: Any) -> PriorModel:
    settings: dict[str, Any] = {
        "clip": shared or clip(), "network": PriorTransformer(WIDTH, 8, 16, 1, 2), "conditioner": text(),
        "objective": objective(parameterization=X0()), "caption_dropout": 0.5,
    }  # fmt: skip
    return PriorModel(**_TRAINED | settings | changes)


def unclip_model(shared: CLIP | None = None, **changes: Any) -> UnCLIPModel:
    settings: dict[str, Any] = {
        "clip": shared or clip(), "network": unet(in_channels=4, resolution=2, channels=[8], attention=[True]),
        "conditioner": ImageEmbedding(WIDTH, 8), "autoencoder": kl(downsampling=4), "objective": objective(),
        "embedding_dropout": 0.5,
    }  # fmt: skip
    return UnCLIPModel(**_TRAINED | settings | changes)


def unclip(candidates: int = 2) -> UnCLIP:
    torch.manual_seed(0)
    shared = clip().eval()
    prior, decoder = prior_model(shared).eval(), unclip_model(shared).eval()
    awake(decoder.predictor)
    return UnCLIP(decoder, Prior(prior, sampling(Euler(), 1.0, 3), candidates), 8, sampling(Euler(), 2.0, 3))
