"""Learning to restore from noisy pictures alone: against least squares, medians and brute force."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carrara import keyed_random
from carrara.build import exported_config
from carrara.component import load_component, save_component
from carrara.corruption.base import Corruption, as_stored
from carrara.corruption.noise import Gaussian, Poisson
from carrara.corruption.text import Text
from carrara.model.restoration import RestorationModel, masked_pixels, restored, without
from tests.tiny import awake, batch, drunet, restoration_model


class Linear(nn.Module):
    """The same linear map of the three channels at every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)


class Constant(nn.Module):
    """One value for every pixel, whatever is shown; what was shown is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(()))
        self.shown = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.shown = x.detach().clone()
        return torch.zeros_like(x) + self.value


class Shown(nn.Module):
    """What it is shown."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def pictures(values: Tensor) -> dict[str, Any]:
    """A batch of pictures in [−1, 1]."""
    images = ((values + 1) * 127.5).round().to(torch.uint8)
    names = [f"0.tar/{k}" for k in range(len(images))]
    return {"images": images, "keys": names, "positions": torch.arange(len(images)), "captions": names}


def correlated(count: int) -> dict[str, Any]:
    """Pixels whose channels are correlated, far enough from black and white that nothing is cut off."""
    mix = torch.tensor([[0.9, 0.3, 0.0], [0.1, 0.5, 0.4], [0.0, 0.1, 0.6]])
    values = torch.einsum("ij,bjhw->bihw", mix, 2 * torch.rand(count, 3, 4, 4) - 1)
    return pictures((0.35 * values).clamp(-0.45, 0.45))


def minimised(target: str, one: dict[str, Any], corruption: Corruption) -> Tensor:
    """The map (3, 3) that the loss is least for."""
    network = Linear()
    model = restoration_model(network=network, target=target, corruption=corruption)
    optimizer = torch.optim.LBFGS(network.parameters(), max_iter=40, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model.loss(one)["loss"]
        loss.backward()
        return loss

    optimizer.step(closure)
    return network.map.weight.detach()[:, :, 0, 0]


def test_noisy_targets_have_the_minimiser_of_clean_ones():
    """Least squares in closed form: W = C (C + sigma² I)⁻¹, with C the channels' covariance."""
    sigma, one = 0.15, correlated(3000)
    pixels = (one["images"].double() / 127.5 - 1).permute(1, 0, 2, 3).flatten(1)
    covariance = torch.cov(pixels)
    expected = covariance @ torch.linalg.inv(covariance + sigma**2 * torch.eye(3))
    corruption = Gaussian(sigma, 0)
    noisy, clean = (minimised(target, one, corruption).double() for target in ("noisy", "clean"))
    torch.testing.assert_close(clean, expected, rtol=0, atol=0.01)
    torch.testing.assert_close(noisy, expected, rtol=0, atol=0.015)
    assert (expected - torch.eye(3)).abs().max() > 0.2  # which is what the version itself as target would give


@pytest.mark.parametrize("target", ["noisy", "clean", "self"])
@pytest.mark.parametrize("corruption", [Gaussian(0.4, 0), Poisson(10.0, 0), Text(0.3, 0)], ids=["n", "p", "t"])
@pytest.mark.parametrize("value", [0, 8])  # black, and what is brighter than the colours' mean
@torch.no_grad()
def test_the_best_constant_is_the_clean_value(corruption, target, value):
    """Even of black, where noise that is cut off would have another mean, and under text of any colour."""
    candidates = torch.linspace(-1, 1, 11)
    one = pictures(candidates[value].expand(20, 3, 16, 16))
    network = Constant()
    model = restoration_model(network=network, corruption=corruption, target=target)
    losses = []
    for candidate in candidates:
        network.value.fill_(candidate)
        losses.append(model.loss(one)["loss"])
    assert torch.stack(losses).argmin() == value


@pytest.mark.parametrize("target", ["noisy", "self"])
@torch.no_grad()
def test_colours_of_text_pull_answers_to_grey_less_and_less(target, monkeypatch):
    """Of the one answer to pictures of levels that are uniform in [0.2, 1]: 0.6 is the clean ones' median, and of noisy
    ones a is where 0.7 (2 (a − 0.2) / 0.8 − 1) + 0.3 a is 0, for 30 % under text; half-way there, + 0.15 a."""
    levels = torch.linspace(0.2, 1, 201)[torch.randperm(201)]
    one, network = pictures(levels[:, None, None, None].expand(-1, 3, 32, 32)), Constant()
    text = Text(0.26, 0)  # and what the last string adds
    model = restoration_model(network=network, corruption=text, target=target)
    candidates = torch.linspace(0.4, 0.7, 16)
    best = []
    for step, training in ((0, True), (model.max_steps // 2, True), (model.max_steps, True), (0, False)):
        monkeypatch.setattr(RestorationModel, "global_step", step)
        model.train(training)
        losses = []
        for candidate in candidates:
            network.value.fill_(candidate)
            losses.append(model.loss(one)["loss"])
        best.append(candidates[torch.stack(losses).argmin()].item())
    assert best == pytest.approx([0.512, 0.553, 0.6, 0.6], abs=0.02)


@torch.no_grad()
def test_the_loss_is_the_distance_from_the_other_version():
    """A toss of the position says which is shown; in validation it is the one that noisy shards hold."""
    corruption = Gaussian(0.3, 4)
    model = restoration_model(corruption=corruption)
    awake(model)
    one = batch(range(16))
    clean = one["images"].float() / 127.5 - 1
    a, b = (corruption(clean, one["keys"], version) for version in (0, 1))
    swapped = (model.uniform(one, "version") > 0.5)[:, None, None, None]
    assert swapped.any() and not swapped.all()
    shown, other = torch.where(swapped, b, a), torch.where(swapped, a, b)
    answer = restored(model.restoration, as_stored(shown))
    torch.testing.assert_close(model.loss(one)["loss"], (answer - other).square().mean())
    model.target = "clean"
    torch.testing.assert_close(model.loss(one)["loss"], (answer - clean).square().mean())
    still = restored(model.restoration, as_stored(a))
    torch.testing.assert_close(model.eval().loss(one)["loss"], (still - clean).square().mean())
    model.train()
    model.corruption = Text(0.3, 4)
    a, b = (model.corruption(clean, one["keys"], version) for version in (0, 1))
    answer = restored(model.restoration, as_stored(torch.where(swapped, b, a)))
    torch.testing.assert_close(model.loss(one)["loss"], (answer - clean).abs().mean())


@pytest.mark.parametrize("target", ["noisy", "clean", "self"])
@torch.no_grad()
def test_what_a_picture_adds_to_the_loss_depends_on_no_other(target):
    """Of 6 × 6 pixels, 1 to 4 of which are masked."""
    model = restoration_model(network=Linear(), target=target)
    alone = torch.stack([model.loss(batch([k], 6))["loss"] for k in range(8)])
    torch.testing.assert_close(alone.mean(), model.loss(batch(range(8), 6))["loss"])


def test_only_the_version_that_is_shown_is_made_where_the_other_is_no_target():
    drawn: list[int] = []

    class Counted(Gaussian):
        def corrupt(self, images: Tensor, positions: Tensor, purpose: str) -> Tensor:
            drawn.append(len(images))
            return super().corrupt(images, positions, purpose)

    for target, count in (("noisy", 32), ("clean", 16), ("self", 16)):
        drawn.clear()
        restoration_model(network=Linear(), target=target, corruption=Counted(0.3, 0)).loss(batch(range(16)))
        assert sum(drawn) == count


@torch.no_grad()
def test_a_picture_has_two_versions_and_no_more():
    model = restoration_model(network=Constant())
    one = batch([0])
    seen = [model.loss(one | {"positions": torch.tensor([visit])})["loss"] for visit in range(20)]
    assert len({float(loss) for loss in seen}) == 2  # one of them shown and the other the target, or the other way
    assert float(model.loss(one | {"keys": ["a"]})["loss"]) not in {float(loss) for loss in seen}
    model.target = "self"
    masked = {float(model.loss(one | {"positions": torch.tensor([visit])})["loss"]) for visit in range(20)}
    assert len(masked) > 2  # elsewhere at each visit


@pytest.mark.parametrize("target", ["noisy", "clean"])
@torch.no_grad()
def test_two_new_versions_at_every_visit_and_the_same_in_validation(target):
    """Noise that is 0.3 wide shows in the loss of a network that answers what it is shown: 2 · 0.09 from the target."""
    model = restoration_model(network=Shown(), target=target, versions="new")
    grey = pictures(torch.zeros(1, 3, 64, 64))
    visits = [grey | {"positions": torch.tensor([visit])} for visit in range(20)]
    losses = torch.stack([model.loss(one)["loss"] for one in visits])
    assert len(set(losses.tolist())) == 20
    torch.testing.assert_close(losses.mean(), torch.tensor(0.18 if target == "noisy" else 0.09), rtol=0.02, atol=0)
    assert torch.equal(model.loss(visits[3])["loss"], losses[3])  # a visit that is trained on again after resuming
    two = restoration_model(network=Shown(), target=target)
    for one in visits[:2]:
        assert torch.equal(model.eval().loss(one)["loss"], two.eval().loss(one)["loss"])


class Given(Corruption):
    """Noise that a test chooses, of the pictures of `batch`."""

    def __init__(self, noise: Tensor):
        super().__init__(0)
        positions = keyed_random.positions_of([str(k) for k in range(len(noise))])
        self.noise = dict(zip(positions.tolist(), noise, strict=True))

    def corrupt(self, images: Tensor, positions: Tensor, purpose: str) -> Tensor:
        return images + torch.stack([self.noise[position] for position in positions.tolist()])


@torch.no_grad()
def test_what_is_masked_is_not_seen_and_nothing_else_is_asked_for():
    one, network = batch(range(16)), Constant()
    noise = torch.randn(16, 3, 8, 8)
    model = restoration_model(network=network, target="self", corruption=Given(noise))
    mask = masked_pixels(model.uniform(one, "mask"), 8, 8)
    loss = model.loss(one)["loss"]
    shown = network.shown
    version = one["images"].float() / 127.5 - 1 + noise
    torch.testing.assert_close(loss, version.square()[mask.expand_as(version)].mean())
    model.corruption = Given(torch.where(mask, 5.0, noise))
    other = model.loss(one)["loss"]
    assert torch.equal(network.shown, shown) and other > loss
    assert torch.equal(shown[~mask.expand_as(shown)], as_stored(version)[~mask.expand_as(shown)])
    model.corruption = Given(torch.where(mask, noise, 5.0))
    torch.testing.assert_close(model.loss(one)["loss"], loss)
    assert not torch.equal(network.shown, shown)


def test_masks_take_every_pixel_in_turn():
    masks = masked_pixels((torch.arange(16) + 0.5) / 16, 9, 6)
    assert torch.equal(masks.sum(0), torch.ones(1, 9, 6, dtype=torch.long))


def test_a_masked_pixel_is_filled_from_around_it():
    images = torch.randn(2, 3, 6, 5)
    mask = masked_pixels(torch.tensor([0.01, 0.99]), 6, 5)
    filled = without(mask, images)
    expected = images.clone()
    for b, _, i, j in mask.nonzero().tolist():
        total, weight = torch.zeros(3), 0.0
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                if (di, dj) != (0, 0) and 0 <= i + di < 6 and 0 <= j + dj < 5:
                    w = 1.0 / (abs(di) + abs(dj))
                    total, weight = total + w * images[b, :, i + di, j + dj], weight + w
        expected[b, :, i, j] = total / weight
    torch.testing.assert_close(filled, expected)


def test_what_is_exported_restores_as_the_model_does(tmp_path):
    model = restoration_model()
    awake(model)
    node = {"_target_": "carrara.network.drunet.DRUNet", "channels": [8, 16], "num_blocks": 1, "residual": True}
    save_component(
        tmp_path / "part", model.kind, exported_config({"network": node}, model.kind), model.exported,
        {"fingerprint": "", "data": {}, "scores": {}},
    )  # fmt: skip
    loaded, _ = load_component(tmp_path / "part", "restoration")
    noisy = torch.rand(2, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        assert torch.equal(restored(loaded, noisy), restored(model.restoration.eval(), noisy))


def test_a_network_that_adds_to_its_pixels_cannot_be_trained_blind():
    with pytest.raises(ValueError, match=r"model\.target=self goes with network\.residual=false"):
        restoration_model(target="self", network=drunet())
    restoration_model(target="self", network=drunet(residual=False))
