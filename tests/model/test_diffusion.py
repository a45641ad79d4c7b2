from typing import Any

import pytest
import torch
from torch import Tensor, nn

from carrara.conditioner.text import Unconditional
from carrara.diffusion.objective import Objective
from carrara.diffusion.parameterization import Epsilon
from carrara.diffusion.schedule_table import Linear
from carrara.diffusion.time_sampling import Uniform
from carrara.diffusion.weighting import Unweighted
from carrara.model.diffusion import DiffusionModel
from carrara.network.conditioning import Conditioning
from tests.tiny import awake, batch, diffusion_model, epsilon_objective, kl, unet


class Recorder(nn.Module):
    """A network that predicts zero and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.asked: list[tuple[Tensor, Tensor, Conditioning]] = []

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        self.asked.append((x.detach(), time, conditioning))
        return self.weight * x


class Captions(nn.Module):
    """A conditioner that remembers captions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def forward(self, captions: list[str]) -> Conditioning:
        self.seen += captions
        ones = torch.ones(len(captions), 1, 8)
        return Conditioning(ones, ones[..., 0].bool(), ones[:, 0])


def recorded(**changes: Any) -> tuple[DiffusionModel, Recorder, Captions]:
    network, captions = Recorder(), Captions()
    return diffusion_model(network=network, conditioner=captions, **changes), network, captions


def test_the_zero_predictor_scores_one_for_epsilon():
    model = diffusion_model(objective=epsilon_objective())  # its last layer is zero at first
    loss = model.loss(batch(range(400)))["loss"]
    assert loss.item() == pytest.approx(1, abs=0.02)


def test_captions_are_dropped_as_often_as_asked():
    model, _, captions = recorded(caption_dropout=0.25)
    for k in range(4):
        model.loss(batch(range(500 * k, 500 * (k + 1))))
    assert captions.seen.count("") / 2000 == pytest.approx(0.25, abs=0.04)


@pytest.mark.parametrize(("share", "dropped"), [(0.0, 0), (1.0, 50)])
def test_dropout_may_be_all_or_nothing(share, dropped):
    model, _, captions = recorded(caption_dropout=share)
    model.loss(batch(range(50)))
    assert captions.seen.count("") == dropped


def test_validation_drops_no_caption():
    model, _, captions = recorded(caption_dropout=1.0)
    model.loss(batch(range(8)), torch.rand(8))
    assert captions.seen == batch(range(8))["captions"]


def test_what_a_sample_is_trained_on_depends_on_its_position_alone():
    model = diffusion_model(caption_dropout=0.5)
    awake(model.predictor)

    def losses(positions: list[int]) -> dict[int, float]:
        """Of each sample, within one batch."""
        found: dict[int, float] = {}
        per_sample = model.objective.loss

        def keep(*inputs: Any) -> Tensor:
            values = per_sample(*inputs)
            found.update(zip(positions, values.tolist(), strict=True))
            return values

        model.objective.loss = keep  # type: ignore[assignment, method-assign]
        with torch.no_grad():
            model.loss(batch(positions))
        model.objective.loss = per_sample  # type: ignore[method-assign]
        return found

    together = losses([3, 4, 5, 6, 7, 8])
    apart = losses([8, 100, 3]) | losses([5]) | losses([7, 6, 4, 2])
    for k, value in together.items():
        assert apart[k] == pytest.approx(value, rel=1e-4)
    assert len({round(value, 4) for value in together.values()}) == 6


def test_every_visit_has_fresh_times_and_noise():
    """The same picture at another place of the stream, as in the next epoch, is another training pair."""
    model, network, _ = recorded()
    first = batch([0, 1])
    for positions in ([0, 1], [1000, 1001], [0, 1]):
        model.loss({**first, "positions": torch.tensor(positions)})
    (x1, t1, _), (x2, t2, _), (x3, t3, _) = network.asked
    assert torch.equal(x1, x3) and torch.equal(t1, t3)
    assert not torch.equal(x1, x2) and not torch.equal(t1, t2)
    assert t1[0] != t1[1]


def test_times_are_spread_over_a_batch_or_drawn_each_by_itself():
    """Sixteen even times fall into sixteen slots; sixteen independent ones hardly ever do."""
    slots = []
    for stratified in (True, False):
        model, network, _ = recorded(stratified=stratified)
        model.loss(batch(range(64, 80)))
        times = network.asked[0][1] / 1000
        slots.append(len((times * 8).floor().unique()))
        spread = model.objective.time_sampling(model.spread(batch(range(64, 80)), "time"), model.objective.schedule)
        assert torch.allclose(times, spread) == stratified
    assert slots[0] == 8


def test_times_of_a_table_are_uniform_and_reach_both_ends():
    """Algorithm 1: t ~ U{1 … T}, the first and the last included."""
    steps = Objective(Linear(num_steps=20), Epsilon(), Uniform(num_steps=20), Unweighted())
    model, network, _ = recorded(objective=steps)
    for k in range(4):
        model.loss(batch(range(500 * k, 500 * (k + 1))))
    times = torch.cat([time for _, time, _ in network.asked])
    values, counts = times.unique(return_counts=True)
    assert len(values) == 20
    assert counts.min() > 60 and counts.max() < 150  # 100 each


def test_the_noisy_picture_is_made_in_one_shot():
    model, network, _ = recorded(objective=epsilon_objective())
    one = batch(range(5))
    model.loss(one)
    x_t, _, _ = network.asked[0]
    t = model.objective.time_sampling(model.spread(one, "time"), model.objective.schedule)
    alpha, sigma = (f(t)[:, None, None, None] for f in (model.objective.schedule.alpha, model.objective.schedule.sigma))
    wanted = alpha * model.images(one) + sigma * model.normal(one, "noise", (3, 8, 8))
    torch.testing.assert_close(x_t, wanted)


def test_the_frozen_auto_encoder_makes_the_latents_and_gets_no_gradient():
    autoencoder = kl(downsampling=4)
    autoencoder.set_statistics(torch.zeros(4), torch.full((4,), 0.1))
    model = diffusion_model(autoencoder, network=(network := Recorder()))
    model.loss(batch(range(3)))["loss"].backward()
    assert network.asked[0][0].shape == (3, 4, 2, 2)
    assert all(p.grad is None and not p.requires_grad for p in model.autoencoder.parameters())
    assert model.autoencoder.latent_std[0] == pytest.approx(0.1)


@pytest.mark.parametrize("num_steps", [10, 1000])
def test_one_network_serves_all_steps(num_steps):
    times = Objective(Linear(num_steps=num_steps), Epsilon(), Uniform(), Unweighted())
    model = diffusion_model(objective=times)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in diffusion_model().parameters())


def test_unconditional_training_needs_no_captions():
    model = diffusion_model(conditioner=Unconditional(8))
    one = batch(range(4))
    one["captions"] = [""] * 4
    model.loss(one)["loss"].backward()
    assert model.loss(one)["loss"].isfinite()


def test_the_loss_is_in_float32_under_autocast():
    model = diffusion_model()
    with torch.autocast("cpu", torch.bfloat16):
        assert model.loss(batch(range(2)))["loss"].dtype == torch.float32


def test_the_caption_mean_adds_its_gradient_and_nothing_else():
    """The loss's value, validation and what is exported stay as they are without it."""
    one, u = batch(range(6)), torch.rand(6)
    plain, both = diffusion_model(), diffusion_model(caption_mean_weight=0.5)
    awake(plain.predictor)
    both.predictor.load_state_dict(plain.predictor.state_dict())
    assert both.exported.state_dict().keys() == plain.exported.state_dict().keys()
    assert both.loss(one, u).keys() == {"loss"} == set(both.loss_names)
    torch.testing.assert_close(both.loss(one, u), plain.loss(one, u))

    without, losses = plain.loss(one)["loss"], both.loss(one)
    torch.testing.assert_close(losses["loss"], without)
    words, words_of_both = (
        model.predictor.get_parameter("conditioner.transformer.tokens.weight") for model in (plain, both)
    )
    [wanted] = torch.autograd.grad(without, words)
    [extra] = torch.autograd.grad(losses["caption_mean"], words_of_both, retain_graph=True)
    [found] = torch.autograd.grad(losses["loss"], words_of_both)
    assert extra.any()
    torch.testing.assert_close(found, wanted + 0.5 * extra)


# --- a trained one ---


class Colours:
    """One colour a picture, said by its caption, and noise on its right half, whose share only the time tells."""

    names = ("red", "green", "blue", "white")
    values = torch.tensor([[180, 80, 80], [80, 180, 80], [80, 80, 180], [180, 180, 180]])

    @classmethod
    def batch(cls, positions: range) -> dict[str, Any]:
        kinds = torch.tensor([k * 7 // 3 % 4 for k in positions])
        images = cls.values[kinds][:, :, None, None].float().repeat(1, 1, 8, 8)
        for image, k in zip(images, positions, strict=True):
            image[..., 4:] += 38 * torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(k))
        images = images.clamp(0, 255).to(torch.uint8)
        captions = [f"a big {cls.names[k]} cube" for k in kinds.tolist()]
        return {"images": images, "captions": captions, "positions": torch.tensor(list(positions))}


@pytest.fixture(scope="module")
def trained() -> DiffusionModel:
    torch.manual_seed(0)
    model = diffusion_model(network=unet(channels=[16, 16], attention=[False, True]))
    optimizer = torch.optim.AdamW(model.predictor.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=200)
    for k in range(200):
        optimizer.zero_grad()
        model.loss(Colours.batch(range(16 * k, 16 * k + 16)))["loss"].backward()
        optimizer.step()
        scheduler.step()
    return model.eval()


def held_out_loss(model: DiffusionModel, **told: Any) -> float:
    one = Colours.batch(range(10**6, 10**6 + 256)) | told
    u = (torch.arange(256) + 0.5) / 256
    with torch.no_grad():
        return model.loss(one, u)["loss"].item()


def test_training_beats_the_best_scalar(trained):
    """c(t)·x_t, with c(t) chosen afterwards for each t, is what a network that cannot see would do."""
    one = Colours.batch(range(10**6, 10**6 + 256))
    u = (torch.arange(256) + 0.5) / 256
    x0, eps = trained.images(one), trained.normal(one, "noise", (3, 8, 8))
    x_t = trained.objective.add_noise(x0, eps, trained.objective.time_sampling(u, trained.objective.schedule))
    x, target = x_t.reshape(16, -1), (eps - x0).reshape(16, -1)
    c = (x * target).sum(1, keepdim=True) / x.square().sum(1, keepdim=True)
    best_scalar = (target - c * x).square().mean().item()
    assert held_out_loss(trained) < 0.5 * best_scalar


def test_matching_captions_beat_shuffled_ones(trained):
    shuffled = Colours.batch(range(10**6 + 1, 10**6 + 257))["captions"]
    assert shuffled != Colours.batch(range(10**6, 10**6 + 256))["captions"]
    assert held_out_loss(trained) < 0.95 * held_out_loss(trained, captions=shuffled)


def test_the_true_time_beats_a_shuffled_one(trained):
    true = held_out_loss(trained)
    network = trained.predictor.network
    shuffle = torch.randperm(256)
    handle = network.register_forward_pre_hook(lambda _, inputs: (inputs[0], inputs[1][shuffle], inputs[2]))
    try:
        assert true < 0.9 * held_out_loss(trained)
    finally:
        handle.remove()
