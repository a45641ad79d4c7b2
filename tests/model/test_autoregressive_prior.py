import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from carrara.model.autoregressive_prior import AutoregressivePriorModel
from tests.dalle2 import BUCKETS, COMPONENTS, autoregressive_prior_model
from tests.tiny import CAPTIONS, awake, batch


def by_hand(model: AutoregressivePriorModel, captions: list[str]) -> Tensor:
    """Mean negative log-probability (B,) of each embedding's tokens, one after the other and row by row."""
    rows = batch(range(len(captions)))
    tokens = model.network.tokens.quantise(model.clip.image_directions(rows["images"].float() / 127.5 - 1))
    nats = torch.zeros(len(captions))
    for row in range(len(captions)):
        told = model.told([captions[row]])
        for place in range(COMPONENTS):
            known = F.pad(tokens[row : row + 1, :place], (0, COMPONENTS - place))  # what follows is not known
            nats[row] -= model.network(known, told)[0, place].log_softmax(0)[tokens[row, place]] / COMPONENTS
    return nats


@torch.no_grad()
def test_the_loss_is_that_of_each_token_given_those_before():
    model = autoregressive_prior_model().eval()
    rows = batch(range(4))
    assert model.loss(rows)["loss"].item() == pytest.approx(
        math.log(BUCKETS), abs=1e-6
    )  # of a model that knows nothing
    awake(model.generator)
    assert model.loss(rows, torch.zeros(4))["loss"].item() == pytest.approx(
        by_hand(model, rows["captions"]).mean().item(), abs=1e-5
    )
    dropped = autoregressive_prior_model(model.clip, network=model.network,
        conditioner=model.generator.conditioner, caption_dropout=1.0).eval()  # fmt: skip
    assert dropped.loss(rows)["loss"].item() == pytest.approx(by_hand(model, [""] * 4).mean().item(), abs=1e-5)


def test_drops_are_keyed_by_the_position_and_validation_has_none():
    model = autoregressive_prior_model(caption_dropout=0.5)
    awake(model.generator)
    model.eval()
    asked: list[list[str]] = []
    model.generator.conditioner.register_forward_hook(lambda _, given, out: asked.append(given[0]))
    model.loss(batch(range(8)))
    model.loss(batch([5, 3]))
    model.loss(batch(range(8)), torch.zeros(8))
    assert 0 < asked[0].count("") < 8 and asked[1] == [asked[0][5], asked[0][3]]
    assert asked[2] == CAPTIONS[:8]


def test_the_most_that_tokens_can_say_is_told_in_validation():
    model, rows = autoregressive_prior_model(), batch(range(4))
    x = model.clip.image_directions(rows["images"].float() / 127.5 - 1)
    back = model.network.tokens.dequantise(model.network.tokens.quantise(x))
    losses = model.loss(rows, torch.zeros(4))
    assert tuple(losses) == model.loss_names
    torch.testing.assert_close(losses["quantised_cosine"], F.cosine_similarity(back, x).mean())
    assert tuple(model.loss(rows)) == ("loss",)


def test_clip_is_neither_trained_nor_saved_and_the_components_are_saved():
    model = autoregressive_prior_model()
    awake(model.generator)
    model.loss(batch(range(4)))["loss"].backward()
    assert all(p.grad is None and not p.requires_grad for p in model.clip.parameters())
    assert all(p.grad is not None for p in model.generator.parameters())
    checkpoint = {"state_dict": model.state_dict()}
    model.on_save_checkpoint(checkpoint)
    assert not [key for key in checkpoint["state_dict"] if key.startswith("clip.")]
    assert "generator.network.tokens.components" in checkpoint["state_dict"]
    assert "network.tokens.components" in model.exported.state_dict()
