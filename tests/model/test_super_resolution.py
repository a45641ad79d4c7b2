from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from carrara import keyed_random
from carrara.autoencoder.identity import Identity
from carrara.diffusion.parameterization import EDM
from carrara.diffusion.schedule import EDM as EDMSchedule
from carrara.errors import UserError
from carrara.model.super_resolution import SuperResolutionModel
from carrara.network.conditioning import Conditioning
from carrara.network.resize import enlarge, shrink
from carrara.sampling import check_likelihood
from tests.tiny import MUON, awake, batch, objective, text, unet


class Seen(nn.Module):
    """Keeps what it is told, and answers with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.conditionings: list[Conditioning] = []

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        self.conditionings.append(conditioning)
        return torch.zeros_like(x)


def model(**changes: Any) -> SuperResolutionModel:
    settings: dict[str, Any] = {
        "factor": 2, "max_augmentation": 0.5, "network": unet(picture_channels=3), "conditioner": text(),
        "autoencoder": Identity(), "objective": objective(), "caption_dropout": 0.5, "stratified": True,
        "optimizer": MUON, "warmup_steps": 0, "cooldown": 0.0, "max_steps": 10, "seed": 3,
    }  # fmt: skip
    return SuperResolutionModel(**settings | changes)


def told(rows: dict[str, Any], u: Tensor | None = None, **changes: Any) -> Conditioning:
    network = Seen()
    model(network=network, **changes).loss(rows, u)
    (conditioning,) = network.conditionings
    return conditioning


def test_the_network_is_told_the_small_picture_with_keyed_noise_and_how_much():
    rows = batch(range(6))
    conditioning = told(rows)
    assert conditioning.picture is not None and conditioning.picture_noise is not None
    s = conditioning.picture_noise[:, None, None, None]
    small = shrink(rows["images"].float() / 127.5 - 1, 2)
    eps = keyed_random.normal(3, rows["positions"], "augmentation_noise", (3, 4, 4))
    torch.testing.assert_close(conditioning.picture, enlarge((1 - s) * small + s * eps, 2))  # the flow schedule's
    few = told(batch([4, 5]))
    assert few.picture is not None and torch.equal(few.picture, conditioning.picture[4:])


def test_the_small_picture_is_scaled_as_what_is_denoised():
    """The noise of EDM at s = 1 is 80 times as wide as a picture."""
    edm = EDM(0.5)
    rows = batch(range(64))
    conditioning = told(rows, objective=objective(EDMSchedule(), edm), max_augmentation=1.0)
    assert conditioning.picture is not None and conditioning.picture_noise is not None
    s = conditioning.picture_noise.double()[:, None, None, None]
    small = shrink(rows["images"].float() / 127.5 - 1, 2)
    eps = keyed_random.normal(3, rows["positions"], "augmentation_noise", (3, 4, 4))
    wanted = (small + 80 * s**7 * eps) / (0.25 + (80 * s**7) ** 2).sqrt()
    torch.testing.assert_close(conditioning.picture, enlarge(wanted.float(), 2), atol=1e-4, rtol=1e-4)


def test_the_noise_is_spread_over_what_was_asked_for():
    noise = told(batch(range(400))).picture_noise
    assert noise is not None and stats.kstest(noise.numpy() / 0.5, "uniform").pvalue > 0.01


def test_captions_are_dropped_and_pictures_never():
    rows = batch(range(40))
    conditioning, all_dropped = told(rows), told(rows, caption_dropout=1.0)
    lengths, empty = conditioning.mask.sum(1), all_dropped.mask.sum(1)
    assert 5 < (lengths == empty[0]).sum() < 35
    assert conditioning.picture is not None and all_dropped.picture is not None
    assert torch.equal(conditioning.picture, all_dropped.picture)


def test_validation_sees_captions_and_the_same_noise_every_time():
    rows, u = batch(range(8)), torch.linspace(0.1, 0.9, 8)
    first, again = told(rows, u), told(rows, u)
    assert first.picture is not None and again.picture is not None
    assert torch.equal(first.picture, again.picture) and (first.mask.sum(1) > 2).all()


def test_the_picture_and_its_noise_change_the_answer_and_get_gradients():
    network = awake(unet(picture_channels=3))
    x, time = torch.randn(2, 3, 8, 8), torch.tensor([100.0, 500.0])
    plain = Conditioning(torch.randn(2, 3, 8), torch.ones(2, 3, dtype=torch.bool), torch.randn(2, 8))
    picture, noise = torch.randn(2, 3, 8, 8, requires_grad=True), torch.tensor([0.1, 0.2])
    answer = network(x, time, plain.with_picture(picture, noise))
    assert not torch.allclose(answer, network(x, time, plain.with_picture(picture, noise + 0.5)), atol=1e-4)
    answer.square().sum().backward()
    assert picture.grad is not None and picture.grad.any()
    with pytest.raises(ValueError, match=r"network\.picture_channels"):
        network(x, time, plain)


@pytest.mark.parametrize("most", [0.0, 1.1])
def test_impossible_noise_is_refused(most):
    with pytest.raises(ValueError, match=r"model\.max_augmentation"):
        model(max_augmentation=most)


def test_it_has_no_likelihood_of_pixels():
    with pytest.raises(UserError, match="imagen is no diffusion of pixels"):
        check_likelihood({"name": "imagen"}, model(), 4)
