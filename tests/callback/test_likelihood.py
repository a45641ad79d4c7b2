import math
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from carrara.callback.likelihood import Likelihood
from carrara.callback.score import Setting
from carrara.data.validation import ValidationSet
from carrara.errors import UserError
from carrara.model.diffusion import DiffusionModel
from tests.tiny import awake, diffusion_model, epsilon_objective, setting

STD = 0.25


class SeenAlone:
    """Stands for a `ValidationSet` that `held_out` refuses."""

    @property
    def held_out(self) -> None:
        raise UserError("all 4 samples to validate on are seen")


def test_seen_pictures_are_not_what_is_held_out():
    one = replace(setting(), validation=cast(ValidationSet, SeenAlone()))
    with pytest.raises(UserError, match="all 4 samples"):
        Likelihood(num_steps=2, seed=0, num_images=4, batch_size=2)(model(), one)


class Independent(nn.Module):
    """The exact noise predictor of pixels that are N(0, STD^2), each by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule = epsilon_objective().schedule
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, c_noise: Tensor, conditioning: object) -> Tensor:
        t = c_noise.double() / 1000
        alpha, sigma = (f(t)[:, None, None, None] for f in (self.schedule.alpha, self.schedule.sigma))
        return (x * sigma / (alpha**2 * STD**2 + sigma**2)).float()


def model(network: nn.Module | None = None) -> DiffusionModel:
    changes: dict[str, Any] = {} if network is None else {"network": network}
    made = diffusion_model(objective=epsilon_objective(), **changes).eval()
    awake(made.predictor)
    return made


def normal_pictures(count: int) -> Setting:
    """Whose pixels are drawn from N(0, STD^2) and rounded to their level."""
    one = setting(count)
    take = one.validation.take

    def drawn(indices):
        batch = take(indices)
        levels = (torch.randn(batch["images"].shape) * STD + 1) * 127.5
        return batch | {"images": levels.round().clamp(0, 255).to(torch.uint8)}

    one.validation.take = drawn  # type: ignore[method-assign]
    return one


@torch.no_grad()
def test_an_exact_model_has_the_entropy_of_its_pixels():
    """H of N(0, STD^2) in levels of 1/127.5, in bits; the bound is a little above, the ODE's likelihood is it."""
    entropy = math.log2(STD * math.sqrt(2 * math.pi * math.e)) + math.log2(127.5)
    scores = Likelihood(1000, seed=0, num_images=40, batch_size=16)(model(Independent()), normal_pictures(80))
    assert scores.keys() == {f"val/bits_per_dim/{name}" for name in ("bound", "prior", "steps", "decoder", "ode")}
    assert scores["val/bits_per_dim/ode"] == pytest.approx(entropy, abs=0.02)
    assert -0.01 < scores["val/bits_per_dim/bound"] - entropy < 0.1
    parts = sum(scores[f"val/bits_per_dim/{name}"] for name in ("prior", "steps", "decoder"))
    assert parts == pytest.approx(scores["val/bits_per_dim/bound"])


def test_it_is_the_same_every_time_and_for_any_chunks():
    one = model()
    with torch.no_grad():
        first = Likelihood(8, seed=0, num_images=6, batch_size=4)(one, setting(12))
        torch.manual_seed(99)
        again = Likelihood(8, seed=0, num_images=6, batch_size=3)(one, setting(12))
        other = Likelihood(8, seed=1, num_images=6, batch_size=3)(one, setting(12))
    for name, value in first.items():
        assert again[name] == pytest.approx(value, rel=1e-4)
    assert other["val/bits_per_dim/ode"] != first["val/bits_per_dim/ode"]
