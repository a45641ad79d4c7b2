import math
from typing import Any

import pytest
import torch

from carrara.callback.perplexity import Perplexity
from tests.tiny import CAPTIONS, batches, language_model, language_model_model, setting, trainer

MASK = 3
LONG = [" ".join(CAPTIONS[k:] + CAPTIONS[:k]) for k in range(len(CAPTIONS))]


def of(captions: list[str], first: int = 0) -> dict[str, Any]:
    """No pictures: they are not looked at."""
    return {"captions": captions, "positions": torch.arange(first, first + len(captions))}


def chosen(model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The true ids, which of them are predicted, and what the network reads."""
    ids, mask = model.language_model.tokenizer(batch["captions"])
    choice = model._choose(batch, model.language_model.targets(ids, mask))
    return ids, choice, model._corrupt(batch, ids, choice)


@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_training_beats_counting(objective, tmp_path):
    model = language_model_model(objective, optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2), max_steps=80)
    before = perplexity(model)
    trainer(tmp_path, max_steps=80).fit(model.train(), batches(80, size=16))
    after = perplexity(model)
    assert before > 100  # of 300 tokens
    assert after < 0.5 * unigram(model)
    # "a", a size, a colour, a shape: the sizes and shapes are 2, the colours 4, and one who knows that has …
    tokens = 5 if objective == "causal" else 4  # … and predicts the end, too
    assert after == pytest.approx(math.exp(math.log(2 * 4 * 2) / tokens), rel=0.2)


@torch.no_grad()
def perplexity(model: Any) -> float:
    return Perplexity(1000, 32)(model.eval(), setting(256))["val/perplexity"]


@torch.no_grad()
def unigram(model: Any) -> float:
    return Perplexity(1000, 32)(model.eval(), setting(256))["val/unigram_perplexity"]


def test_fifteen_percent_are_chosen_and_most_of_them_hidden():
    lm = language_model("masked", max_length=100)
    model = language_model_model("masked", language_model=lm)
    batch = of(LONG * 50)
    ids, choice, corrupted = chosen(model, batch)
    words = ids > MASK
    assert (choice <= words).all()
    share = choice.sum() / words.sum()
    assert share == pytest.approx(0.15, abs=0.01)  # rounded in each caption
    assert torch.equal(corrupted[~choice], ids[~choice])
    assert ((corrupted == MASK) & choice).sum() / choice.sum() == pytest.approx(0.8, abs=0.02)
    kept = (corrupted == ids) & choice
    replaced = choice & (corrupted != MASK) & ~kept
    assert kept.sum() / choice.sum() == pytest.approx(0.1, abs=0.02)
    assert replaced.sum() / choice.sum() == pytest.approx(0.1, abs=0.02)
    assert corrupted[replaced].min() > MASK
    assert corrupted[replaced].max() < lm.tokenizer.backend.get_vocab_size()


def test_every_word_is_chosen_as_often():
    model = language_model_model("masked")
    _, choice, _ = chosen(model, of(["a big red disc"] * 4000))
    counts = choice.sum(0)[1:5] / 4000
    assert (counts - 0.25).abs().max() < 0.03


def test_every_caption_with_a_word_has_one_that_is_predicted():
    model = language_model_model("masked")
    _, choice, _ = chosen(model, of(["a", "", "a big red disc", "big disc"]))
    assert choice.sum(1).tolist() == [1, 0, 1, 1]
    assert model.loss(of(["", ""]))["loss"] == 0


def test_what_is_hidden_depends_on_the_position_alone():
    model = language_model_model("masked")
    some = ["a big red disc", "a small blue cube"]
    together = of([*some, " ".join(CAPTIONS)])
    ids, choice, corrupted = chosen(model, of(some))
    _, longer, corrupted_longer = chosen(model, together)
    length = ids.shape[1]
    assert longer.shape[1] > length
    assert torch.equal(longer[:2, :length], choice) and not longer[:2, length:].any()
    assert torch.equal(corrupted_longer[:2, :length], corrupted)
    _, second, _ = chosen(model, of(some[1:], first=1))
    assert torch.equal(second[0, : second.shape[1]], choice[1, : second.shape[1]])
    draws = {tuple(chosen(model, of(some, first=k))[1][0].tolist()) for k in range(0, 64, 2)}
    assert len(draws) > 3
    again = language_model_model("masked", seed=1)
    assert any(
        not torch.equal(chosen(again, of(some, first=k))[1], chosen(model, of(some, first=k))[1]) for k in range(8)
    )


@torch.no_grad()
def test_the_causal_loss_is_that_of_transformers():
    model = language_model_model("causal", language_model=language_model("causal", max_length=100)).eval()
    some = [*CAPTIONS, "a disc", "a big red disc above a small blue cube"]
    ids, mask = model.language_model.tokenizer(some)
    assert len(set(mask.sum(1).tolist())) > 2
    torch.testing.assert_close(model.loss(of(some))["loss"], theirs(model, ids, mask, ids.masked_fill(~mask, -100)))


def theirs(model: Any, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The mean of what each caption loses by itself."""
    rows = zip(ids[:, None], mask.long()[:, None], labels[:, None], strict=True)
    network = model.language_model.network
    return torch.stack([network(one, attention_mask=of, labels=true).loss for one, of, true in rows]).mean()


@torch.no_grad()
def test_the_masked_loss_is_that_of_transformers():
    model = language_model_model("masked", language_model=language_model("masked", max_length=100)).eval()
    some = [*LONG[:3], *CAPTIONS]
    ids, choice, corrupted = chosen(model, of(some))
    assert len(set(choice.sum(1).tolist())) > 1
    _, mask = model.language_model.tokenizer(some)
    expected = theirs(model, corrupted, mask, ids.masked_fill(~choice, -100))
    torch.testing.assert_close(model.loss(of(some))["loss"], expected)


def test_validation_is_the_same_every_time():
    model = language_model_model("masked").eval()
    first, again = (model.loss(of(CAPTIONS), torch.rand(len(CAPTIONS)))["loss"] for _ in range(2))
    assert torch.equal(first, again)


def test_what_is_exported_is_the_language_model():
    model = language_model_model("causal")
    assert model.exported is model.language_model and model.hot == [model.language_model.network.transformer]
