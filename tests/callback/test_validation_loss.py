import numpy as np
import pytest
import torch

from carrara.callback.validation_loss import ValidationLoss
from carrara.metric.mean import Mean
from tests.tiny import autoencoder_model, awake, diffusion_model, evaluator_model, setting


def model():
    made = diffusion_model(caption_dropout=1.0).eval()
    awake(made.predictor)
    return made


@torch.no_grad()
def test_it_is_the_same_every_time():
    score, one = ValidationLoss(num_images=6, batch_size=4), model()
    first = score(one, setting(12))
    torch.manual_seed(99)
    assert score(one, setting(12)) == first
    assert first.keys() == {"val/loss", "val_seen/loss"}
    assert first["val/loss"] != first["val_seen/loss"]


@torch.no_grad()
def test_it_does_not_depend_on_the_number_of_ranks(monkeypatch):
    """Ranks' sums are added up; here what each would send is caught and added."""
    score, one = ValidationLoss(num_images=100, batch_size=3), model()
    alone = score(one, setting(32))
    sums: dict[int, tuple[float, float]] = {}
    asked = 0

    def compute(self: Mean) -> torch.Tensor:
        nonlocal asked
        total, count = sums.get(asked, (0.0, 0.0))
        sums[asked] = total + float(self.total), count + float(self.count)
        asked += 1
        return torch.zeros(())

    monkeypatch.setattr(Mean, "compute", compute)
    for rank in range(3):
        asked = 0
        score(one, setting(32, rank, 3))
    assert asked == 2
    together = [total / count for total, count in sums.values()]
    assert together == pytest.approx(list(alone.values()), rel=1e-6)
    assert [count for _, count in sums.values()] == [16, 16]


@torch.no_grad()
def test_times_are_spread_evenly(monkeypatch):
    one, seen = model(), []

    def loss(batch: dict, u: torch.Tensor) -> dict[str, torch.Tensor]:
        seen.append(u)
        return {"loss": torch.zeros(())}

    monkeypatch.setattr(one, "loss", loss)
    ValidationLoss(num_images=1000, batch_size=50)(one, setting(1000))
    u = torch.cat(seen[:10]).double().numpy()
    assert len(u) == 500 and u.min() > 0 and u.max() < 1
    gaps = np.diff(np.sort(u))
    assert gaps.max() < 4 / 500  # random times would leave gaps of 7 / 500


@torch.no_grad()
def test_every_part_of_the_loss_is_logged_on_every_rank():
    """Also by a rank that has no chunk: the others wait for its share."""
    one = autoencoder_model().eval()
    names = {f"{prefix}{name}" for prefix in ("val/", "val_seen/") for name in one.loss_names}
    score = ValidationLoss(num_images=4, batch_size=4)
    for rank in range(2):
        assert score(one, setting(12, rank, 2)).keys() == names


@torch.no_grad()
def test_the_evaluator_has_one_too():
    scores = ValidationLoss(num_images=8, batch_size=8)(evaluator_model().eval(), setting(16))
    assert 0 < scores["val/loss"] < 10
