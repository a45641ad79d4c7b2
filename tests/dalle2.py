"""Tiny models of DALL-E 2 that its tests share."""

from typing import Any

import torch

from carrara.conditioner.image_embedding import ImageEmbedding
from carrara.diffusion.parameterization import X0
from carrara.diffusion.sampler import Euler
from carrara.evaluator.clip import CLIP
from carrara.model.autoregressive_prior import AutoregressivePriorModel
from carrara.model.prior import PriorModel
from carrara.model.unclip import UnCLIPModel
from carrara.network.embedding_transformer import EmbeddingTransformer
from carrara.network.prior_transformer import PriorTransformer
from carrara.pipeline.autoregressive_prior import AutoregressivePrior
from carrara.pipeline.prior import Prior
from carrara.pipeline.unclip import UnCLIP
from tests.tiny import MUON, RESOLUTION, awake, clip, kl, objective, sampling, text, unet

WIDTH = 16  # of embeddings

COMPONENTS, BUCKETS = 6, 8

_TRAINED: dict[str, Any] = {
    "optimizer": MUON, "warmup_steps": 0, "cooldown": 0.0, "max_steps": 10, "seed": 0,
}  # fmt: skip


def prior_model(shared: CLIP | None = None, **changes: Any) -> PriorModel:
    settings: dict[str, Any] = {
        "clip": shared or clip(), "network": PriorTransformer(WIDTH, 8, 16, 1, 2), "conditioner": text(),
        "objective": objective(parameterization=X0()), "caption_dropout": 0.5, "stratified": True,
    }  # fmt: skip
    return PriorModel(**_TRAINED | settings | changes)


def embedding_transformer(**changes: Any) -> EmbeddingTransformer:
    settings: dict[str, Any] = {
        "embedding_width": WIDTH, "context_width": 8, "num_components": COMPONENTS, "num_buckets": BUCKETS,
        "width": 16, "depth": 1, "heads": 2, "expansion": 2.667,
    }  # fmt: skip
    return EmbeddingTransformer(**settings | changes)


def autoregressive_prior_model(shared: CLIP | None = None, **changes: Any) -> AutoregressivePriorModel:
    """Its components are those of pictures of noise."""
    settings: dict[str, Any] = {
        "clip": shared or clip(), "network": embedding_transformer(), "conditioner": text(), "caption_dropout": 0.5,
    }  # fmt: skip
    model = AutoregressivePriorModel(**_TRAINED | settings | changes)
    images = torch.rand(64, 3, RESOLUTION, RESOLUTION, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model.network.tokens.measure(model.embeddings(images))
    return model


def autoregressive_prior(shared: CLIP | None = None, **changes: Any) -> AutoregressivePrior:
    model = autoregressive_prior_model(shared).eval()
    awake(model.generator)
    settings: dict[str, Any] = {
        "candidates": 2, "temperature": 1.0, "top_k": None, "top_p": None, "guidance_scale": 1.0
    }  # fmt: skip
    return AutoregressivePrior(**{"model": model} | settings | changes)


def unclip_model(shared: CLIP | None = None, **changes: Any) -> UnCLIPModel:
    settings: dict[str, Any] = {
        "clip": shared or clip(), "network": unet(in_channels=4, resolution=2, channels=[8], attention=[True]),
        "conditioner": ImageEmbedding(WIDTH, 8), "autoencoder": kl(downsampling=4), "objective": objective(),
        "embedding_dropout": 0.5, "stratified": True,
    }  # fmt: skip
    return UnCLIPModel(**_TRAINED | settings | changes)


def unclip(autoregressive: bool = False) -> UnCLIP:
    torch.manual_seed(0)
    shared = clip().eval()
    diffusion, decoder = Prior(prior_model(shared).eval(), 2, sampling(Euler(), 1.0, 3)), unclip_model(shared).eval()
    awake(decoder.predictor)
    prior = autoregressive_prior(shared) if autoregressive else diffusion
    return UnCLIP(decoder, prior, 8, sampling(Euler(), 2.0, 3))
