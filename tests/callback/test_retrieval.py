import torch

from carrara.callback.retrieval import Retrieval
from tests.tiny import evaluator_model, setting


@torch.no_grad()
def test_recall_has_its_names_and_counts_distinct_captions():
    model = evaluator_model().eval()
    scores = Retrieval(num_captions=4, batch_size=3)(model, setting(40))
    for prefix in ("val/", "val_seen/"):
        assert scores[f"{prefix}num_captions"] == 4
        assert 0 <= scores[f"{prefix}recall_at_1"] <= scores[f"{prefix}recall_at_5"] == 1
    assert len(scores) == 6


@torch.no_grad()
def test_an_evaluator_that_knows_the_answers_finds_them(monkeypatch):
    model = evaluator_model().eval()
    seen: list[torch.Tensor] = []

    def images(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.randn(len(x), 16))
        return seen[-1]

    monkeypatch.setattr(model.evaluator, "embed_images", images)
    monkeypatch.setattr(model.evaluator, "embed_texts", lambda captions: seen[-1])
    scores = Retrieval(num_captions=4, batch_size=3)(model, setting(40))
    assert scores["val/recall_at_1"] == 1
    monkeypatch.setattr(model.evaluator, "embed_texts", lambda captions: -seen[-1])
    assert Retrieval(num_captions=4, batch_size=3)(model, setting(40))["val/recall_at_1"] == 0
