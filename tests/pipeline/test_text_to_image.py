from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from carrara.conditioner.text import Unconditional
from carrara.diffusion.guidance import Guidance
from carrara.diffusion.langevin import AnnealedLangevin, PredictorCorrector
from carrara.diffusion.multistep import DPMSolverPP2M, UniPC
from carrara.diffusion.objective import Objective
from carrara.diffusion.sampler import Ancestral, Euler, Heun, Sampler
from carrara.diffusion.thresholding import Dynamic
from carrara.network.conditioning import Conditioning
from carrara.pipeline.base import OnStep, Watch
from carrara.pipeline.denoising import Sampling
from carrara.pipeline.text_to_image import TextToImage
from tests.tiny import CAPTIONS, awake, diffusion_model, epsilon_objective, kl, sampling

SAMPLERS = [
    Ancestral(), Ancestral(variance="beta"), Euler(), Heun(), Heun(s_churn=3), DPMSolverPP2M(), DPMSolverPP2M(True),
    UniPC(), AnnealedLangevin(3), PredictorCorrector(),
]  # fmt: skip


def pipeline(**changes: Any) -> TextToImage:
    torch.manual_seed(0)
    model = diffusion_model(**changes).eval()
    awake(model.predictor)
    return TextToImage(model, 8, sampling())


def make(
    made: TextToImage, captions: list[str], indices: Sequence[int], how: Sampling, on_step: OnStep | None = None
) -> Tensor:
    return replace(made, sampling=how)(captions, indices, 0, on_step)


def pictures(
    made: TextToImage,
    indices: list[int],
    sampler: Sampler | None = None,
    seed: int = 0,
    on_step: Any = None,
    **how: Any,
) -> Tensor:
    captions = [CAPTIONS[k % len(CAPTIONS)] for k in indices]
    return replace(made, sampling=sampling(sampler, **how))(captions, indices, seed, on_step)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_is_the_same_at_any_batch_size(sampler):
    made = pipeline()
    whole = pictures(made, list(range(8)), sampler)
    ones = torch.cat([pictures(made, [k], sampler) for k in range(8)])
    threes = torch.cat([pictures(made, list(range(k, min(k + 3, 8))), sampler) for k in range(0, 8, 3)])
    torch.testing.assert_close(ones, whole, atol=1e-4, rtol=0)
    torch.testing.assert_close(threes, whole, atol=1e-4, rtol=0)
    assert whole.shape == (8, 3, 8, 8) and whole.abs().max() <= 1


def test_a_seed_is_a_picture():
    made = pipeline()
    first = pictures(made, [0, 1])
    torch.manual_seed(99)
    assert torch.equal(pictures(made, [0, 1]), first)
    assert not torch.allclose(pictures(made, [0, 1], seed=1), first, atol=0.01)
    assert not torch.allclose(pictures(made, [16, 17]), first, atol=0.01)  # the same captions, other numbers


def test_the_global_generator_is_left_alone():
    made = pipeline()
    before = torch.get_rng_state()
    pictures(made, [0])
    assert torch.equal(torch.get_rng_state(), before)


class Calls(nn.Module):
    """Counts the samples of each call of a network."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.sizes, self.texts = network, [], []  # type: ignore[var-annotated]

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        self.sizes.append(len(x))
        self.texts.append(conditioning)
        return self.network(x, time, conditioning)


def counted(made: TextToImage) -> Calls:
    predictor = made.model.predictor
    predictor.network = Calls(predictor.network)
    return predictor.network


@pytest.mark.parametrize("sampler", [Ancestral(), Euler(), DPMSolverPP2M()])
def test_the_network_is_called_once_a_step_and_guidance_doubles_the_batch(sampler):
    for scale, size in ((1.0, 3), (2.0, 6)):
        calls = counted(made := pipeline())
        pictures(made, [0, 1, 2], sampler, scale=scale, num_steps=5)
        assert calls.sizes == [size] * 5


def test_scale_one_is_the_conditional_picture_alone():
    """Also the limit of guidance: both halves, of which the unconditional one cancels."""
    made = pipeline()
    alone = pictures(made, [0, 1], scale=1.0)
    torch.testing.assert_close(pictures(made, [0, 1], scale=1 + 1e-6), alone, atol=1e-4, rtol=0)
    assert not torch.allclose(pictures(made, [0, 1], scale=4.0), alone, atol=1e-3)


def test_scale_zero_is_the_picture_of_the_empty_caption():
    made = pipeline()
    empty = make(made, ["", ""], [0, 1], sampling(scale=1.0))
    torch.testing.assert_close(pictures(made, [0, 1], scale=0.0), empty, atol=1e-4, rtol=0)


def test_the_caption_changes_the_picture():
    made = pipeline()
    a, b = (make(made, [c], [0], sampling(Euler(), 1.0)) for c in ("a big red disc", "a small blue cube"))
    assert (a - b).abs().max() > 1e-3


def test_latents_are_decoded_once(monkeypatch):
    made = pipeline(autoencoder=kl(downsampling=4))
    decoded = []
    decode = made.model.autoencoder.decode

    def watched(z: Tensor) -> Tensor:
        decoded.append(tuple(z.shape))
        return decode(z)

    monkeypatch.setattr(made.model.autoencoder, "decode", watched)
    assert pictures(made, [0, 1]).shape == (2, 3, 8, 8)
    assert decoded == [(2, 4, 2, 2)]


def test_it_makes_pictures_without_captions():
    made = pipeline(conditioner=Unconditional(8))
    how = sampling(Euler(), 1.0, 3)
    assert torch.equal(make(made, ["", ""], [0, 1], how), make(made, ["what", "ever"], [0, 1], how))


def test_no_gradient_is_kept():
    assert not pictures(pipeline(), [0]).requires_grad


def test_guidance_acts_within_its_interval_only():
    calls = counted(made := pipeline())
    times = torch.linspace(1, 0, 11, dtype=torch.float64)
    make(made, ["a", "b"], [0, 1], Sampling(Euler(), times, Guidance(3.0, interval=(0.35, 0.75))))
    assert calls.sizes == [2, 2, 2, 4, 4, 4, 4, 2, 2, 2]  # at t = 1, 0.9, ..., 0.1


def test_a_weaker_model_guides_instead_of_the_empty_caption():
    made, weak = pipeline(), pipeline()
    calls, weak_calls = counted(made), counted(weak)
    same = make(made, ["a", "b"], [0, 1], sampling(Euler(), 3.0, weak=weak.model))
    assert calls.sizes == weak_calls.sizes == [2] * 4  # and no second half
    # equally good: they do not differ, and nothing is led away from
    torch.testing.assert_close(same, make(made, ["a", "b"], [0, 1], sampling(Euler(), 1.0)), atol=1e-5, rtol=0)
    for parameter in weak.model.predictor.network.parameters():
        parameter.data *= 0.9
    assert not torch.allclose(make(made, ["a", "b"], [0, 1], sampling(Euler(), 3.0, weak=weak.model)), same, atol=1e-3)


def test_thresholded_estimates_are_what_the_sampler_goes_to():
    made, estimates = pipeline(), []
    how = sampling(Euler(), 30.0, thresholding=Dynamic())
    make(made, ["a", "b"], [0, 1], how, lambda step, t, x, x0_hat: estimates.append(x0_hat))
    assert max(estimate.abs().max().item() for estimate in estimates) <= 1


# --- the intermediate results ---


@pytest.mark.parametrize(
    ("num_steps", "num_frames", "kept"),
    [
        (10, 5, [1, 3, 5, 7, 9]),
        (10, 10, list(range(10))),
        (10, 1, [9]),
        (12, 10, None),
        (5, 10, [0, 1, 2, 3, 4]),
        (1, 10, [0]),
        (30, 7, None),
    ],
)
def test_frames_are_spread_evenly_and_the_last_step_is_among_them(num_steps, num_frames, kept):
    made = replace(pipeline(), sampling=sampling(Euler(), num_steps=num_steps))
    watch = Watch(made, num_frames, num_samples=1)
    last = made(CAPTIONS[:2], [0, 1], 0, watch)
    assert len(watch.frames) == len(watch.estimates) == len(watch.times) == min(num_frames, num_steps)
    assert torch.equal(watch.frames[-1], last[:1]) and watch.times[-1] == 0
    gaps = [b - a for a, b in zip([-1, *sorted(watch.kept)], sorted(watch.kept), strict=False)]
    assert max(gaps) - min(gaps) <= 1
    assert kept is None or sorted(watch.kept) == kept


class Gray(nn.Module):
    """The exact noise predictor of pictures of one level everywhere, which is N(0.2, 0.3²); captions say nothing."""

    def __init__(self, steps: Objective) -> None:
        super().__init__()
        self.steps, self.weight = steps, nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, time: Tensor, conditioning: Conditioning) -> Tensor:
        t = time / 1000
        alpha, sigma = (f(t)[:, None, None, None] for f in (self.steps.schedule.alpha, self.steps.schedule.sigma))
        pixels = x[0].numel() / sigma**2
        precision = 1 / 0.3**2 + alpha**2 * pixels
        level = (0.2 / 0.3**2 + alpha * pixels * x.mean((1, 2, 3), keepdim=True)) / precision
        return (x - alpha * level) / sigma


@pytest.mark.parametrize("sampler", [Euler(), DPMSolverPP2M(), Ancestral()])
def test_estimates_come_nearer_to_the_picture_step_by_step(sampler):
    steps = epsilon_objective()
    model = diffusion_model(network=Gray(steps), objective=steps)
    made = TextToImage(model, 8, sampling(sampler, 1.0, 40))
    watch = Watch(made, 10, num_samples=64)
    final = made([""] * 64, range(64), 0, watch)
    errors = [float((estimate - final).square().mean()) for estimate in watch.estimates]
    assert stats.spearmanr(range(10), errors).statistic <= -0.9
    assert errors[0] > 0.05 > 1e-4 > errors[-1]
    levels = final.mean((1, 2, 3))
    assert float(levels.mean()) == pytest.approx(0.2, abs=0.1) and float(levels.std()) == pytest.approx(0.3, abs=0.08)
