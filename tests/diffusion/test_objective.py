from typing import Any

import pytest
import torch

from carrara.diffusion import parameterization, schedule, schedule_table
from carrara.diffusion.objective import Objective
from carrara.diffusion.time_sampling import LogitNormal, LogNormal, Mode, Uniform
from carrara.diffusion.weighting import EDM as EDMWeighting
from carrara.diffusion.weighting import P2, MinSNR, Noise, Sigmoid, Unweighted
from tests.diffusion.oracle import SCHEDULES, TARGETS, is_singular


def ddpm() -> Objective:
    return Objective(schedule_table.Linear(), parameterization.Epsilon(), Uniform(1000), Unweighted())


def rectified_flow() -> Objective:
    return Objective(schedule.Flow(), parameterization.Flow(), LogitNormal(), Unweighted())


def zero(x_t, t):
    return torch.zeros_like(x_t)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_epsilon_and_score_with_zero_terminal_snr_are_refused_by_both_names(name: str, target):
    one = SCHEDULES[name]
    if not is_singular(one, target):
        Objective(one, target, Uniform(), Unweighted())
        return
    with pytest.raises(ValueError, match=rf"{target.name}.*{type(one).__name__}") as refusal:
        Objective(one, target, Uniform(), Unweighted())
    assert "\n" not in str(refusal.value)


def test_a_schedule_that_ends_in_no_number_is_refused():
    class Broken(schedule.Flow):
        def alpha(self, t: torch.Tensor) -> torch.Tensor:
            return torch.full_like(t, torch.nan)

    with pytest.raises(ValueError, match="Broken"):
        Objective(Broken(), parameterization.V(), Uniform(), Unweighted())


@pytest.mark.parametrize("target", [t for t in TARGETS if t.name not in ("epsilon", "score")], ids=lambda t: t.name)
def test_other_targets_train_at_zero_terminal_snr(target):
    objective = Objective(schedule.Flow(), target, Uniform(), MinSNR())
    loss = objective.loss(zero, torch.randn(2, 3), torch.randn(2, 3), torch.tensor([0.5, 1.0]))
    assert loss.isfinite().all()


def test_the_zero_predictor_scores_one_for_epsilon():
    x0, eps, u = torch.rand(512, 1, 8, 8), torch.randn(512, 1, 8, 8), torch.rand(512)
    assert ddpm().loss(zero, x0, eps, u).mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("objective", [ddpm(), rectified_flow()], ids=["ddpm", "flow"])
def test_loss_is_the_weighted_squared_error_of_each_sample(objective: Objective):
    x0, eps, u = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.rand(5)
    seen: dict[str, torch.Tensor] = {}

    def predict(x_t, t):
        seen.update(x_t=x_t, t=t)
        return x_t.sin()

    loss = objective.loss(predict, x0, eps, u)
    assert loss.shape == (5,)
    t = objective.time_sampling(u, objective.schedule)
    assert torch.equal(seen["t"], t)
    for k in range(5):
        alpha, sigma = objective.schedule.alpha(t[k]), objective.schedule.sigma(t[k])
        x_t = alpha * x0[k] + sigma * eps[k]
        torch.testing.assert_close(seen["x_t"][k], x_t)
        error = x_t.sin() - objective.parameterization.target(x0[k], eps[k], alpha, sigma)
        torch.testing.assert_close(loss[k], error.square().mean())


def test_weights_are_applied_per_sample():
    plain, u = ddpm(), torch.tensor([0.01, 0.5, 0.99])
    weighted = Objective(plain.schedule, plain.parameterization, plain.time_sampling, MinSNR(5))
    x0, eps = torch.randn(3, 7), torch.randn(3, 7)
    snr = plain.schedule.logsnr(plain.time_sampling(u, plain.schedule)).exp()
    ratio = weighted.loss(zero, x0, eps, u) / plain.loss(zero, x0, eps, u)
    torch.testing.assert_close(ratio, snr.clamp(max=5) / snr)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_network_receives_a_scaled_x_and_c_noise(name: str, dtype: torch.dtype):
    one, target = SCHEDULES[name], parameterization.EDM(0.5)
    objective = Objective(one, target, Uniform(), Unweighted())
    x_t = torch.randn(3, 2, 4, 4).to(dtype)
    seen: list[torch.Tensor] = []

    def network(x, c_noise, conditioning):
        seen.extend([x, c_noise])
        return x * conditioning

    for t in (torch.tensor(0.5, dtype=torch.float64), torch.tensor([0.2, 0.5, 0.9])):
        seen.clear()
        output = objective.predict(network, 2)(x_t, t)
        c_in = target.c_in(one.alpha(t), one.sigma(t)).reshape(-1, 1, 1, 1).to(dtype)
        torch.testing.assert_close(seen[0], c_in * x_t)
        torch.testing.assert_close(seen[1], one.c_noise(t).to(dtype).expand(3))
        assert seen[0].dtype == seen[1].dtype == dtype and torch.equal(output, 2 * seen[0])


@pytest.mark.parametrize("weighting", [Unweighted(), MinSNR(), Noise(), EDMWeighting(), Sigmoid(), P2()])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_combination_has_a_finite_loss_at_every_time(name: str, weighting):
    u = torch.cat([torch.tensor([1e-7, 1e-5, 1 - 1e-6]), torch.linspace(0.001, 0.999, 61)])
    x0, eps = 0.5 * torch.randn(64, 8), torch.randn(64, 8)
    for target in TARGETS:
        for times in (Uniform(), LogNormal(), Mode(), LogitNormal()):
            if not is_singular(SCHEDULES[name], target):
                loss = Objective(SCHEDULES[name], target, times, weighting).loss(zero, x0, eps, u)
                assert loss.isfinite().all(), (target.name, times)


def test_nothing_is_drawn_inside():
    x0, eps, u = torch.randn(2, 3), torch.randn(2, 3), torch.rand(2)
    state = torch.get_rng_state()
    first = rectified_flow().loss(zero, x0, eps, u)
    assert torch.equal(first, rectified_flow().loss(zero, x0, eps, u))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("objective", [ddpm(), rectified_flow()], ids=["ddpm", "flow"])
@pytest.mark.parametrize("t", [torch.tensor(0.4, dtype=torch.float64), torch.tensor([0.2, 0.4, 0.9])])
def test_the_denoiser_of_a_perfect_network_returns_x0(objective: Objective, t: torch.Tensor):
    x0, eps = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    shape = (-1, 1, 1, 1)
    alpha, sigma = objective.schedule.alpha(t).reshape(shape), objective.schedule.sigma(t).reshape(shape)

    def predict(x_t, at):
        assert torch.equal(at, t)
        return objective.parameterization.target(x0, eps, alpha, sigma).float()

    x0_hat = objective.denoiser(predict)(objective.add_noise(x0, eps, t), t)
    assert x0_hat.dtype == torch.float32
    torch.testing.assert_close(x0_hat, x0, rtol=0, atol=1e-4)


def test_arithmetic_is_float32_under_autocast_and_with_half_precision_inputs():
    weight = torch.randn(6, 6)
    dtypes = []

    def predict(x_t, t):
        dtypes.append((x_t.dtype, (x_t @ weight).dtype))
        return (x_t @ weight).bfloat16()

    x0, eps, u = torch.randn(4, 6).bfloat16(), torch.randn(4, 6), torch.rand(4)
    objective = rectified_flow()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss(predict, x0, eps, u)
        x0_hat = objective.denoiser(predict)(x0, torch.tensor(0.7))
    assert loss.dtype == x0_hat.dtype == torch.float32
    assert dtypes == [(torch.float32, torch.bfloat16)] * 2
    of_x0 = Objective(objective.schedule, parameterization.X0(), Uniform(), Unweighted())
    assert of_x0.denoiser(predict)(x0, torch.tensor(0.7)).dtype == torch.float32

    output = (
        objective.add_noise(x0, eps, objective.time_sampling(u, objective.schedule)).bfloat16() @ weight.bfloat16()
    ).float()
    torch.testing.assert_close(loss, (output - (eps - x0.float())).square().mean(1))


def test_float64_stays_float64():
    x0, eps, u = torch.randn(4, 6).double(), torch.randn(4, 6).double(), torch.rand(4).double()
    assert ddpm().loss(zero, x0, eps, u).dtype == torch.float64


def test_noising_and_velocity_are_those_of_diffusers():
    from diffusers import DDPMScheduler

    other: Any = DDPMScheduler(1000, 1e-4, 0.02, "linear")
    x0, eps = torch.randn(64, 3, 4, 4), torch.randn(64, 3, 4, 4)
    index = torch.randint(1, 1001, (64,))
    index[:2] = torch.tensor([1, 1000])
    t = index / 1000
    objective = ddpm()
    x_t = objective.add_noise(x0, eps, t)
    alpha, sigma = (f(t)[:, None, None, None] for f in (objective.schedule.alpha, objective.schedule.sigma))
    v = parameterization.V().target(x0, eps, alpha, sigma)
    theirs = other.add_noise(x0, eps, index - 1), other.get_velocity(x0, eps, index - 1)
    for a, b in zip((x_t, v), theirs):
        assert ((a - b).norm() / b.norm()).item() < 1e-6
