import math

import pytest
import torch

from tests.tiny import Stream, batch, evaluator_model, trainer


def test_both_towers_and_the_temperature_are_trained(tmp_path):
    model = evaluator_model()
    model.loss(batch(range(4)))["loss"].backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle <= {name for name in idle if name.endswith("key.bias")}


def test_it_learns_to_match_a_batch(tmp_path):
    model = evaluator_model(optimizer=lambda groups: torch.optim.AdamW(groups, lr=3e-3))
    first = model.loss(batch(range(8)))["loss"].item()
    trainer(tmp_path, max_steps=40).fit(model, Stream([batch(range(8))] * 40))
    assert model.loss(batch(range(8)))["loss"].item() < 0.3 * first


def test_the_temperature_is_kept_at_a_hundredth_and_comes_back_from_there(tmp_path):
    """Captions that do not fit their pictures ask for a higher one."""
    model = evaluator_model(optimizer=lambda groups: torch.optim.SGD(groups, lr=1e-5))
    model.evaluator.log_temperature.data.fill_(math.log(0.001))
    wrong = {**batch(range(8)), "captions": batch(range(8))["captions"][::-1]}
    trainer(tmp_path, max_steps=2).fit(model, Stream([wrong] * 2))
    assert 0.01 < model.evaluator.log_temperature.exp() < 0.0105


def test_the_loss_of_two_ranks_is_the_global_batchs(monkeypatch):
    """Every rank's loss sees all rows; here the other rank's come from a stand-in for the gather."""
    model, whole = evaluator_model(), batch(range(8))
    wanted = model.loss(whole)["loss"]
    wanted.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    halves = [batch(range(4)), batch(range(4, 8))]
    total: list[torch.Tensor] = []
    for rank in range(2):
        model.zero_grad()

        def gather(x: torch.Tensor, rank: int = rank) -> torch.Tensor:
            """What an all-gather with gradients gives: here only this rank's rows carry them."""
            other = halves[1 - rank]
            is_text = gather.calls % 2 == 1  # type: ignore[attr-defined]
            gather.calls += 1  # type: ignore[attr-defined]
            with torch.no_grad():
                rows = (
                    model.evaluator.embed_texts(other["captions"])
                    if is_text
                    else model.evaluator.embed_images(model.images(other))
                )
            return torch.cat([x, rows] if rank == 0 else [rows, x])

        gather.calls = 0  # type: ignore[attr-defined]
        monkeypatch.setattr(model, "_gathered", gather)
        monkeypatch.setattr(model, "_trainer", type("TwoRanks", (), {"world_size": 2})())
        loss = model.loss(halves[rank])["loss"]
        torch.testing.assert_close(loss, wanted)
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        total = grads if not total else [a + b for a, b in zip(total, grads, strict=True)]
    for name, a, b in zip([n for n, _ in model.named_parameters()], total, gradients, strict=True):
        factor = 2 if name.endswith("log_temperature") else 1  # every rank has the whole of that one
        torch.testing.assert_close(a, factor * b, atol=1e-5, rtol=1e-3)


def test_validation_is_not_gathered(monkeypatch):
    model = evaluator_model().eval()
    monkeypatch.setattr(model, "_trainer", type("TwoRanks", (), {"world_size": 2})())
    monkeypatch.setattr(model, "_gathered", lambda x: pytest.fail("ranks have different numbers of chunks"))
    assert model.loss(batch(range(4)))["loss"].isfinite()


def test_what_is_exported_is_the_evaluator():
    model = evaluator_model()
    assert model.exported is model.evaluator and model.kind == "evaluator"
