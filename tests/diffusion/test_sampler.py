"""Samplers on distributions whose denoiser E[x0 | x_t] is known in closed form."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from carrara.diffusion import parameterization
from carrara.diffusion.objective import Objective
from carrara.diffusion.sampler import Ancestral, DPMSolverPP2M, Euler, Heun, Sampler
from carrara.diffusion.schedule import Cosine, CosineTable, Flow, Linear, NoiseSchedule
from carrara.diffusion.time_sampling import Uniform
from carrara.diffusion.weighting import Unweighted

MEAN, STD = 0.5, 0.5
MODES, WEIGHTS, WIDTH = torch.tensor([-1.0, 1.0]).double(), torch.tensor([0.3, 0.7]).double(), 0.1
ONE = torch.ones((), dtype=torch.float64)

SAMPLERS = {
    "ddpm": Ancestral(),
    "ddpm_large": Ancestral(variance="beta"),
    "eta_half": Ancestral(eta=0.5),
    "ddim": Ancestral(eta=0),
    "euler": Euler(),
    "heun": Heun(),
    "2m": DPMSolverPP2M(),
    "2m_sde": DPMSolverPP2M(stochastic=True),
}
TARGETS = [parameterization.Epsilon(), parameterization.X0(), parameterization.V(), parameterization.Flow()]
SCHEDULES = {"linear": Linear(), "cosine": Cosine(), "cosine_table": CosineTable(), "flow": Flow()}
COMPATIBLE = [
    pytest.param(schedule, target, id=f"{name}-{target.name}")
    for name, schedule in SCHEDULES.items()
    for target in TARGETS
    if not (schedule.terminal_snr_is_zero and target.singular_at_zero_snr)  # refused when built
]
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
both_variances = pytest.mark.parametrize("variance", ["posterior", "beta"])

Denoise = Callable[[Tensor, Tensor], Tensor]


def gaussian(schedule: NoiseSchedule) -> Denoise:
    """E[x0 | x_t] for x0 ~ N(MEAN, STD^2)."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, s = schedule.alpha(t), schedule.sigma(t)
        return MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)

    return denoise


def mixture(schedule: NoiseSchedule) -> Denoise:
    """E[x0 | x_t] for x0 ~ 0.3 N(-1, WIDTH^2) + 0.7 N(1, WIDTH^2)."""

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        a, s = schedule.alpha(t), schedule.sigma(t)
        variance = a**2 * WIDTH**2 + s**2
        from_mode = x[..., None] - a * MODES
        share = (WEIGHTS.log() - from_mode**2 / (2 * variance)).softmax(-1)
        return (share * (MODES + a * WIDTH**2 / variance * from_mode)).sum(-1)

    return denoise


class ExactNoise:
    """Noise with mean 0 and variance 1 and no correlation with x, now and a step ago, exactly, in the sample.

    A Gaussian's denoiser is affine, so the sample's mean and variance are then those of infinitely many.
    """

    def __init__(self, denoise: Denoise) -> None:
        self.denoise = denoise
        self.seen: list[Tensor] = []

    def watch(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen = [*self.seen[-1:], x]
        return self.denoise(x, t)

    def __call__(self) -> Tensor:
        return exact(torch.randn_like(self.seen[-1]), *self.seen)


def exact(noise: Tensor, *others: Tensor) -> Tensor:
    noise = noise - noise.mean()
    if others:
        basis = torch.linalg.qr(torch.stack([x - x.mean() for x in others], dim=1)).Q
        noise = noise - basis @ (basis.T @ noise)
    return noise / noise.std(correction=0)


def draw_gaussian(sampler: Sampler, schedule: NoiseSchedule, num_steps: int, n: int = 500) -> Tensor:
    noise = ExactNoise(gaussian(schedule))
    x = schedule.prior_scale * exact(torch.randn(n, dtype=torch.float64))
    return sampler(noise.watch, x, schedule, num_steps, noise)


def draw_mixture(sampler: Sampler, schedule: NoiseSchedule, num_steps: int, n: int = 10_000) -> Tensor:
    x = schedule.prior_scale * torch.randn(n, dtype=torch.float64)
    return sampler(mixture(schedule), x, schedule, num_steps, lambda: torch.randn_like(x))


# ---- DDPM's Algorithm 2


@pytest.mark.parametrize(
    ("variance", "num_steps", "tolerance"),
    # beta tilde is the least variance a step can need: it ends 0.78 % short at T = 1000, half that at 2000
    [("beta", 1000, 0.005), ("posterior", 1000, 0.008), ("posterior", 2000, 0.005)],
)
def test_algorithm_2_recovers_a_gaussian(variance, num_steps: int, tolerance: float):
    table = Linear(0.1 / num_steps, 20 / num_steps, num_steps)  # beta from 1e-4 to 0.02 for 1000 steps
    sample = draw_gaussian(Ancestral(variance=variance), table, num_steps)
    assert sample.mean().item() == pytest.approx(MEAN, rel=0.005)
    assert sample.std(correction=0).item() == pytest.approx(STD, rel=tolerance)


@both_variances
def test_algorithm_2_recovers_a_mixture(variance):
    sample = draw_mixture(Ancestral(variance=variance), Linear(), 1000, n=3_000)
    assert (sample > 0).double().mean().item() == pytest.approx(0.7, abs=0.03)
    assert (sample[sample > 0] - 1).std().item() == pytest.approx(WIDTH, rel=0.05)


def wrong_subtract_the_noise(denoise: Denoise, x: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The seeds' words taken literally: at each step, take the predicted noise away, and add none."""
    for now in schedule.levels(schedule.times(1000))[:-1]:
        x = x - (x - now.alpha * denoise(x, now.t)) / now.sigma
    return x


def wrong_take_the_mean(denoise: Denoise, x: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The mean of every step of Algorithm 2, without its noise."""
    return Ancestral()(denoise, x, schedule, 1000, noise=lambda: torch.zeros_like(x))


@pytest.mark.parametrize("wrong", [wrong_subtract_the_noise, wrong_take_the_mean])
def test_wrong_samplers_collapse(wrong):
    """Algorithm 2, from the same noise with the same denoisers, has neither fault: see above."""
    schedule, x = Linear(), torch.randn(1_000, dtype=torch.float64)
    assert wrong(gaussian(schedule), x, schedule).std() < STD / 100
    positive = (wrong(mixture(schedule), x, schedule) > 0).double().mean().item()
    assert min(positive, 1 - positive) < 0.01  # where 0.3 and 0.7 should be


@pytest.mark.parametrize("index", [1, 2, 300, 1000])
def test_posterior_mean_closed_form_is_the_noise_form_and_the_samplers(index: int):
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    alpha_bars = torch.cat([torch.ones(1).double(), (1 - betas).cumprod(0)])
    beta, alpha_bar, previous = betas[index - 1], alpha_bars[index], alpha_bars[index - 1]
    x0, eps = torch.randn(2, 100, dtype=torch.float64)
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * eps
    # DDPM eq. 7 and, with x0 put in terms of eps, eq. 11
    closed = previous.sqrt() * beta / (1 - alpha_bar) * x0
    closed = closed + (1 - beta).sqrt() * (1 - previous) / (1 - alpha_bar) * x_t
    from_noise = (x_t - beta / (1 - alpha_bar).sqrt() * eps) / (1 - beta).sqrt()
    torch.testing.assert_close(closed, from_noise, rtol=0, atol=1e-10)

    times = torch.tensor([index, index - 1], dtype=torch.float64) / 1000
    step = Ancestral()(lambda x, t: x0, x_t, Linear(), 1, lambda: torch.zeros_like(x0), times=times)
    torch.testing.assert_close(step, closed, rtol=0, atol=1e-10)
    tilde = (1 - previous) / (1 - alpha_bar) * beta
    for sampler, variance in [(Ancestral(), tilde), (Ancestral(variance="beta"), beta)]:
        noisy = sampler(lambda x, t: x0, x_t, Linear(), 1, lambda: torch.ones_like(x0), times=times)
        expected = variance.sqrt() if index > 1 else tilde * 0  # no noise on the last step
        torch.testing.assert_close(noisy - step, expected.expand(100), rtol=0, atol=1e-10)


# ---- every sampler


@every_schedule
@every_sampler
def test_every_sampler_recovers_a_gaussian(sampler: Sampler, schedule: NoiseSchedule):
    num_steps = 400 if isinstance(sampler, Ancestral) else 100  # first order, second order
    sample = draw_gaussian(sampler, schedule, num_steps)
    assert sample.mean().item() == pytest.approx(MEAN, rel=0.02)
    assert sample.std(correction=0).item() == pytest.approx(STD, rel=0.02)


@pytest.mark.parametrize("schedule", [Cosine(), Flow()], ids=["cosine", "flow"])
def test_the_stochastic_2m_is_of_higher_order_than_ancestral(schedule: NoiseSchedule):
    """Four times the steps leave about a sixteenth of the error in the spread, and a quarter of the ancestral one's."""

    def errors(sampler: Sampler) -> list[float]:
        return [abs(draw_gaussian(sampler, schedule, n).std(correction=0).item() / STD - 1) for n in (100, 400)]

    few, many = errors(DPMSolverPP2M(stochastic=True))
    assert few < 0.01 and few / many > 8
    few, many = errors(Ancestral())
    assert few > 0.03 and few / many < 5


@every_sampler
@pytest.mark.parametrize(("schedule", "target"), COMPATIBLE)
def test_every_target_makes_the_same_sample(sampler, schedule, target):
    objective, perfect = Objective(schedule, target, Uniform(), Unweighted()), gaussian(schedule)

    def network(x: Tensor, time: Tensor) -> Tensor:
        """It knows the distribution, and is told the time as networks are told."""
        t = time[0] / 1000
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x0_hat = perfect(x, t)
        return target.target(x0_hat, (x - alpha * x0_hat) / sigma, alpha, sigma)

    x, noise = torch.randn(2, 64, dtype=torch.float64)
    samples = [
        sampler(denoise, schedule.prior_scale * x, schedule, 20, lambda: noise)
        for denoise in (perfect, objective.denoiser(network))
    ]
    torch.testing.assert_close(*samples, rtol=0, atol=1e-8)


@every_schedule
@every_sampler
def test_every_sampler_recovers_a_mixture(sampler: Sampler, schedule: NoiseSchedule):
    sample = draw_mixture(sampler, schedule, 50, n=3_000)
    assert (sample > 0).double().mean().item() == pytest.approx(0.7, abs=0.03)
    assert sample.abs().mean().item() == pytest.approx(1, abs=0.02)


@every_schedule
@every_sampler
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_few_steps_stay_finite_and_one_is_the_denoisers_answer(sampler, schedule, num_steps: int):
    x = schedule.prior_scale * torch.randn(64)
    denoise = gaussian(schedule)
    sample = sampler(denoise, x, schedule, num_steps, lambda: torch.randn(64))
    assert sample.isfinite().all()
    assert sample.abs().max() < 5
    if num_steps == 1:
        torch.testing.assert_close(sample, denoise(x, ONE).float())


@every_sampler
def test_calls_of_network_and_noise(sampler: Sampler):
    schedule, seen, draws, x = Linear(), [], [], torch.randn(4)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(round(t.item() * 1000))
        return x_t * 0

    def noise() -> Tensor:
        draws.append(1)
        return torch.randn(4)

    sampler(denoise, x, schedule, 10, noise)
    once = list(range(1000, 0, -100))
    if isinstance(sampler, Heun):
        assert seen == sorted(once + once[1:], reverse=True)  # at both ends of each step but the last's
    else:
        assert seen == once
    stochastic = getattr(sampler, "eta", 0) > 0 or getattr(sampler, "stochastic", False)
    assert len(draws) == (9 if stochastic else 0)  # none on the last step


@every_sampler
def test_on_step_sees_every_step(sampler: Sampler):
    seen: list[tuple[int, float, Tensor, Tensor]] = []
    x = torch.randn(4)
    sample = sampler(
        gaussian(Linear()),
        x,
        Linear(),
        4,
        lambda: torch.randn(4),
        lambda k, t, x, x0: seen.append((k, t.item(), x, x0)),
    )
    assert [(k, t) for k, t, _, _ in seen] == [(0, 0.75), (1, 0.5), (2, 0.25), (3, 0.0)]
    assert torch.equal(seen[-1][2], sample)
    torch.testing.assert_close(seen[-1][3], sample)  # the last step ends on x0_hat itself
    assert not torch.equal(seen[0][2], seen[1][2])


@every_sampler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_arithmetic_is_float32_or_float64_under_autocast(sampler: Sampler, dtype: torch.dtype):
    wide, weight, x = (
        torch.promote_types(dtype, torch.float32),
        torch.randn(8, 8),
        torch.randn(3, 8).to(dtype),
    )

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        assert x_t.dtype == wide
        return (x_t.bfloat16() @ weight.bfloat16()) / 8

    def run(denoise: Denoise) -> Tensor:
        return sampler(denoise, x, Cosine(), 5, lambda: torch.ones(3, 8).to(wide))

    expected = run(lambda x_t, t: denoise(x_t, t).to(wide))
    with torch.autocast("cpu", torch.bfloat16):
        sample = run(denoise)
    assert sample.dtype == wide
    assert torch.equal(sample, expected)


def test_refusals():
    x = torch.randn(3)
    with pytest.raises(ValueError, match="needs noise"):
        Ancestral()(gaussian(Flow()), x, Flow(), 4)
    with pytest.raises(ValueError, match="must fall"):
        Euler()(gaussian(Flow()), x, Flow(), 2, times=torch.tensor([1.0, 0.5, 0.5]))
    with pytest.raises(ValueError, match="eta must lie"):
        Ancestral(eta=1.1)
    with pytest.raises(ValueError, match="eta=1 only"):
        Ancestral(eta=0, variance="beta")
    with pytest.raises(ValueError, match="posterior or beta"):
        Ancestral(variance="large")  # type: ignore[arg-type]


def test_a_spacing_chooses_the_times():
    seen: list[float] = []

    def squared(schedule: NoiseSchedule, num_steps: int) -> Tensor:
        return schedule.times(num_steps) ** 2

    Euler(spacing=squared)(
        gaussian(Flow()), torch.randn(3), Flow(), 4, on_step=lambda k, t, x, x0: seen.append(t.item())
    )
    assert seen == [0.5625, 0.25, 0.0625, 0]
