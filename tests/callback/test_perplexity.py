import math

import pytest
import torch

from carrara.callback.perplexity import Perplexity
from tests.tiny import CAPTIONS, language_model_model, setting


@torch.no_grad()
@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_a_model_that_knows_nothing_chooses_from_all_tokens(objective):
    model = language_model_model(objective).eval()
    for parameter in model.language_model.network.parameters():
        parameter.zero_()
    scores = Perplexity(num_captions=5, batch_size=2)(model, setting(12))
    for prefix in ("val/", "val_seen/"):
        assert scores[f"{prefix}perplexity"] == pytest.approx(300)
        assert 1 < scores[f"{prefix}unigram_perplexity"] < 100
        assert scores[f"{prefix}num_captions"] == 5
    assert len(scores) == 6


@torch.no_grad()
def test_counting_is_judged_on_the_same_tokens():
    model = language_model_model("causal").eval()
    scores = Perplexity(num_captions=100, batch_size=3)(model, setting(2 * len(CAPTIONS)))
    ids, mask = model.language_model.tokenizer(CAPTIONS[::2])
    tokens = ids[:, 1:][mask[:, 1:]]
    everything = model.language_model.tokenizer(CAPTIONS)[0][:, 1:]
    counts = torch.bincount(everything[everything != 0], minlength=300) + 1.0
    nats = -(counts / counts.sum())[tokens].log().mean()
    assert scores["val/unigram_perplexity"] == pytest.approx(math.exp(nats), rel=1e-5)
    mean = model.loss({"captions": CAPTIONS[::2], "positions": torch.arange(len(CAPTIONS[::2]))})["loss"]
    assert scores["val/perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)  # all have the same length


@torch.no_grad()
def test_ranks_share_the_captions_out():
    """What two ranks sum up is what one does; the metric's own test adds them."""
    model = language_model_model("masked").eval()
    score = Perplexity(num_captions=8, batch_size=2)
    whole = math.log(score(model, setting(16))["val/perplexity"])
    halves = [math.log(score(model, setting(16, rank, 2))["val/perplexity"]) for rank in (0, 1)]
    assert sum(halves) / 2 == pytest.approx(whole)  # each has as many tokens
