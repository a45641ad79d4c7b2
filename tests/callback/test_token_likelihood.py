import math

import pytest
import torch

from carrara.callback.token_likelihood import TokenLikelihood
from tests.tiny import CAPTIONS, autoregressive_model, awake, batch, setting


@torch.no_grad()
def test_a_model_that_knows_nothing_has_as_many_bits_as_there_are_choices():
    scores = TokenLikelihood(num_images=5, batch_size=2)(autoregressive_model().eval(), setting(12))
    for split in ("val", "val_seen"):
        for name, choices in (("image", 16), ("text", 300)):
            key = f"{split}/bits_per_token/{name}"
            assert scores[key] == pytest.approx(math.log2(choices))
            assert scores[f"{key}_uniform"] == math.log2(choices)
            assert 0 < scores[f"{key}_unigram"] < math.log2(choices)
    assert len(scores) == 12


@torch.no_grad()
def test_bits_are_those_of_every_token_and_counting_is_on_the_same():
    model = autoregressive_model(caption_dropout=1.0).eval()  # and nothing is dropped here
    awake(model.network)
    scores = TokenLikelihood(num_images=100, batch_size=3)(model, setting(2 * len(CAPTIONS)))
    of = batch(range(0, 2 * len(CAPTIONS), 2))
    losses = model.loss(of, torch.rand(len(CAPTIONS)))
    for name in ("image", "text"):
        nats = float(losses[f"{name}_nll"])
        assert scores[f"val/bits_per_token/{name}"] == pytest.approx(nats / math.log(2), rel=1e-5)
    ids, mask = model.network.read(of["captions"])
    for name, tokens in (
        ("image", model.autoencoder.tokens(model.images(of)).flatten()),
        ("text", ids[:, 1:][mask[:, 1:]]),
    ):
        shares = tokens.bincount().double() / len(tokens)
        entropy = -(shares[shares > 0] * shares[shares > 0].log2()).sum()
        assert scores[f"val/bits_per_token/{name}_unigram"] == pytest.approx(float(entropy), rel=1e-6)
