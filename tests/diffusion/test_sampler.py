"""Samplers on distributions whose denoiser E[x0 | x_t] is known in closed form."""

import pytest
import torch
from torch import Tensor

from carrara.diffusion.langevin import AnnealedLangevin, PredictorCorrector
from carrara.diffusion.multistep import DPMSolverPP2M, UniPC
from carrara.diffusion.objective import Objective
from carrara.diffusion.sampler import Ancestral, Euler, Heun, Sampler
from carrara.diffusion.schedule import Cosine, Flow, NoiseSchedule, VarianceExploding
from carrara.diffusion.schedule_table import Linear
from carrara.diffusion.spacing import LogSNR
from carrara.diffusion.time_sampling import Uniform
from carrara.diffusion.weighting import Unweighted
from tests.diffusion.oracle import (
    MEAN,
    MODES,
    SCHEDULES,
    STD,
    TARGETS,
    WEIGHTS,
    WIDTH,
    Denoise,
    ExactNoise,
    draw_mixture,
    exact,
    gaussian,
    is_singular,
    mixture,
)

ONE = torch.ones((), dtype=torch.float64)

SAMPLERS: dict[str, Sampler] = {
    "ddpm": Ancestral(),
    "ddpm_large": Ancestral(variance="beta"),
    "eta_half": Ancestral(eta=0.5),
    "euler": Euler(),
    "heun": Heun(),
    "heun_churn": Heun(s_churn=20),
    "2m": DPMSolverPP2M(),
    "2m_sde": DPMSolverPP2M(stochastic=True),
    "unipc_1": UniPC(1),
    "unipc_2": UniPC(2),
    "unipc_3": UniPC(3),
    "predictor_corrector": PredictorCorrector(snr=0.1),
}
FIRST_ORDER = ("ddpm", "ddpm_large", "eta_half", "euler", "predictor_corrector")
COMPATIBLE = [
    pytest.param(schedule, target, id=f"{name}-{target.name}")
    for name, schedule in SCHEDULES.items()
    for target in TARGETS
    if not is_singular(schedule, target)
]
every_sampler = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS.keys())
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
both_variances = pytest.mark.parametrize("variance", ["posterior", "beta"])


def draw(sampler: Sampler, schedule: NoiseSchedule, times: Tensor, n: int = 500) -> Tensor:
    """Samples of the Gaussian from x at t = 1, of which mean and spread are exactly those of q."""
    start = schedule.alpha(ONE) * MEAN + torch.hypot(schedule.alpha(ONE) * STD, schedule.sigma(ONE)) * exact(
        torch.randn(n, dtype=torch.float64)
    )
    noise = ExactNoise(gaussian(schedule), start)
    return sampler(noise.watch, start, schedule, times, noise)


def draw_of_mixture(sampler: Sampler, schedule: NoiseSchedule, times: Tensor, n: int) -> Tensor:
    start = schedule.alpha(ONE) * draw_mixture(n) + schedule.sigma(ONE) * torch.randn(n, 2, dtype=torch.float64)
    return sampler(mixture(schedule), start, schedule, times, lambda: torch.randn_like(start))


def fine(schedule: NoiseSchedule) -> Tensor:
    """21 times, from t = 1 down to hardly any noise, on every schedule."""
    if not schedule.terminal_snr_is_zero:
        return LogSNR()(schedule, 20)
    inner = schedule.t_from_logsnr(torch.linspace(-7, 9, 19, dtype=torch.float64))
    return torch.cat([torch.ones(1).double(), inner, torch.zeros(1).double()])


def assert_is_mixture(sample: Tensor, tolerance: float, width_tolerance: float = 1.0) -> None:
    first = (sample - MODES[0]).square().sum(-1) < (sample - MODES[1]).square().sum(-1)
    assert first.double().mean().item() == pytest.approx(0.3, abs=0.03)
    for mode, of_mode in zip(MODES, (sample[first], sample[~first]), strict=True):
        torch.testing.assert_close(of_mode.mean(0), mode, rtol=tolerance, atol=0)
        assert (of_mode - mode).square().mean().sqrt().item() == pytest.approx(WIDTH, rel=width_tolerance)
    between = (WEIGHTS[0] * WEIGHTS[1]).sqrt() * (MODES[0] - MODES[1]).abs()
    # a weight of 0.33 for 0.3 makes it 2.6 % wider
    torch.testing.assert_close(sample.std(0), torch.hypot(between, torch.tensor(WIDTH)), rtol=0.026 + tolerance, atol=0)


# ---- DDPM's Algorithm 2


@pytest.mark.parametrize(
    ("variance", "num_steps", "tolerance"),
    # beta tilde is the least variance a step can need: it ends 0.78 % short at T = 1000, half that at 2000
    [("beta", 1000, 0.005), ("posterior", 1000, 0.008), ("posterior", 2000, 0.005)],
)
def test_algorithm_2_recovers_a_gaussian(variance, num_steps: int, tolerance: float):
    table = Linear(0.1 / num_steps, 20 / num_steps, num_steps)  # beta from 1e-4 to 0.02 for 1000 steps
    sample = draw(Ancestral(variance=variance), table, table.times(num_steps))
    assert sample.mean().item() == pytest.approx(MEAN, rel=0.005)
    assert sample.std(correction=0).item() == pytest.approx(STD, rel=tolerance)


@both_variances
def test_algorithm_2_recovers_a_mixture(variance):
    assert_is_mixture(
        draw_of_mixture(Ancestral(variance=variance), Linear(), Linear().times(1000), n=6_000),
        0.02,
        width_tolerance=0.05,
    )


def wrong_subtract_the_noise(denoise: Denoise, x: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The seeds' words taken literally: at each step, take the predicted noise away, and add none."""
    for now in schedule.levels(schedule.times(1000))[:-1]:
        x = x - (x - now.alpha * denoise(x, now.t)) / now.sigma
    return x


def wrong_take_the_mean(denoise: Denoise, x: Tensor, schedule: NoiseSchedule) -> Tensor:
    """The mean of every step of Algorithm 2, without its noise."""
    return Ancestral()(denoise, x, schedule, schedule.times(1000), lambda: torch.zeros_like(x))


@pytest.mark.parametrize("wrong", [wrong_subtract_the_noise, wrong_take_the_mean])
def test_wrong_samplers_collapse(wrong):
    """Algorithm 2, from the same noise with the same denoisers, has neither fault: see above."""
    schedule, x = Linear(), torch.randn(1_000, 2, dtype=torch.float64)
    assert wrong(gaussian(schedule), x, schedule).std() < STD / 100
    second = (wrong(mixture(schedule), x, schedule)[:, 0] > 0).double().mean().item()
    assert min(second, 1 - second) < 0.01  # where 0.3 and 0.7 should be


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
    step = Ancestral()(lambda x, t: x0, x_t, Linear(), times, lambda: torch.zeros_like(x0))
    torch.testing.assert_close(step, closed, rtol=0, atol=1e-10)
    tilde = (1 - previous) / (1 - alpha_bar) * beta
    for sampler, variance in [(Ancestral(), tilde), (Ancestral(variance="beta"), beta)]:
        noisy = sampler(lambda x, t: x0, x_t, Linear(), times, lambda: torch.ones_like(x0))
        expected = variance.sqrt() if index > 1 else tilde * 0  # no noise on the last step
        torch.testing.assert_close(noisy - step, expected.expand(100), rtol=0, atol=1e-10)


# ---- every sampler


@every_schedule
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_recovers_a_gaussian(name: str, schedule: NoiseSchedule):
    """Any fault of a formula shows at 2.5 %; with more steps the spread is within 1 %, below."""
    sample = draw(SAMPLERS[name], schedule, schedule.times(500 if name in FIRST_ORDER else 150))
    assert sample.mean().item() == pytest.approx(MEAN, rel=1e-6)
    assert sample.std(correction=0).item() == pytest.approx(STD, rel=0.025)


def test_annealed_langevin_recovers_a_gaussian_and_a_mixture():
    schedule, sampler = VarianceExploding(), AnnealedLangevin(num_updates=400, step_size=0.2)
    sample = draw(sampler, schedule, fine(schedule), n=200)
    assert sample.mean().item() == pytest.approx(MEAN, rel=1e-6)
    assert sample.std(correction=0).item() == pytest.approx(STD, rel=0.02)
    sampler = AnnealedLangevin(num_updates=50, step_size=0.2)
    assert_is_mixture(draw_of_mixture(sampler, schedule, fine(schedule), 3_000), tolerance=0.02)


@every_schedule
def test_langevin_takes_x_on_as_it_is_and_x_over_alpha_once_it_is_more_picture_than_noise(schedule: NoiseSchedule):
    """Seen without its steps: so small that nothing else moves x."""
    x, times, seen = torch.randn(64, dtype=torch.float64), fine(schedule), []
    sampler = AnnealedLangevin(num_updates=1, step_size=1e-300)
    sampler(gaussian(schedule), x, schedule, times, lambda: x * 0, lambda k, t, x, x0_hat: seen.append(x))
    levels = schedule.levels(times)
    turn = next(k for k, level in enumerate(levels) if level.logsnr > 0)  # the first level of more picture
    for k in range(1, len(levels) - 1):
        scale = levels[k].alpha / levels[turn].alpha if k > turn else 1
        torch.testing.assert_close(seen[k - 1], scale * x)


@pytest.mark.slow
@every_schedule
@pytest.mark.parametrize("name", [*SAMPLERS, "annealed_langevin"])
def test_every_sampler_recovers_both_distributions_closely(name: str, schedule: NoiseSchedule):
    langevin = AnnealedLangevin(num_updates=1000, step_size=0.1)
    if name == "annealed_langevin":
        gaussians = draw(langevin, schedule, fine(schedule), n=200)
        pairs = draw_of_mixture(AnnealedLangevin(100, 0.2), schedule, fine(schedule), 50_000)
    else:
        sampler = SAMPLERS[name]
        gaussians = draw(sampler, schedule, schedule.times(1000 if name in FIRST_ORDER else 300))
        pairs = draw_of_mixture(sampler, schedule, schedule.times(200), 50_000)
    assert gaussians.mean().item() == pytest.approx(MEAN, rel=0.01)
    assert gaussians.std(correction=0).item() == pytest.approx(STD, rel=0.0105)
    # the last step, to sigma = 0, makes modes as narrow as its noise narrower
    assert_is_mixture(pairs, 0.01, width_tolerance=0.25)


@pytest.mark.parametrize("schedule", [Cosine(), Flow()], ids=["cosine", "flow"])
def test_the_stochastic_2m_is_of_higher_order_than_ancestral(schedule: NoiseSchedule):
    """Four times the steps leave about a sixteenth of the error in the spread, and a quarter of the ancestral one's."""

    def errors(sampler: Sampler) -> list[float]:
        samples = [draw(sampler, schedule, schedule.times(n)) for n in (100, 400)]
        return [abs(sample.std(correction=0).item() / STD - 1) for sample in samples]

    few, many = errors(DPMSolverPP2M(stochastic=True))
    assert few < 0.01 and few / many > 8
    few, many = errors(Ancestral())
    assert few > 0.03 and few / many < 5


@every_sampler
@pytest.mark.parametrize(("schedule", "target"), COMPATIBLE)
def test_every_target_makes_the_same_sample(sampler, schedule, target):
    objective, perfect = Objective(schedule, target, Uniform(), Unweighted()), gaussian(schedule)

    def predict(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x0_hat = perfect(x, t)
        return target.target(x0_hat, (x - alpha * x0_hat) / sigma, alpha, sigma)

    x, noise = torch.randn(2, 64, dtype=torch.float64)
    samples = [
        sampler(denoise, schedule.prior_scale * x, schedule, schedule.times(20), lambda: noise)
        for denoise in (perfect, objective.denoiser(predict))
    ]
    torch.testing.assert_close(*samples, rtol=0, atol=1e-8)


@every_schedule
@every_sampler
def test_every_sampler_recovers_a_mixture(sampler: Sampler, schedule: NoiseSchedule):
    sample = draw_of_mixture(sampler, schedule, schedule.times(60), n=4_000)
    assert_is_mixture(sample, tolerance=0.05)


@every_schedule
@every_sampler
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_few_steps_stay_finite_and_one_is_the_denoisers_answer(sampler, schedule, num_steps: int):
    x = schedule.prior_scale * torch.randn(64)
    denoise = gaussian(schedule)
    sample = sampler(denoise, x, schedule, schedule.times(num_steps), lambda: torch.randn(64))
    assert sample.isfinite().all()
    assert sample.abs().max() < 5 * max(1, schedule.prior_scale)
    if num_steps == 1:
        torch.testing.assert_close(sample, denoise(x, ONE).float())


@every_schedule
def test_langevin_starts_anywhere_and_ends_on_the_denoisers_answer(schedule: NoiseSchedule):
    last: list[Tensor] = []
    sample = AnnealedLangevin(5)(
        gaussian(schedule),
        schedule.prior_scale * torch.randn(64),
        schedule,
        schedule.times(4),
        lambda: torch.randn(64),
        lambda k, t, x, x0_hat: last.append(x0_hat),
    )
    assert sample.isfinite().all() and len(last) == 4
    assert torch.equal(sample, last[-1])


@pytest.mark.parametrize(
    ("name", "calls", "draws"),  # for ten steps, of which the last draws none
    [
        ("ddpm", 10, 9),
        ("ddpm_large", 10, 9),
        ("eta_half", 10, 9),
        ("euler", 10, 0),
        ("heun", 19, 0),
        ("heun_churn", 19, 9),  # there is no more noise than at t = 1 to churn to
        ("2m", 10, 0),
        ("2m_sde", 10, 9),
        ("unipc_1", 10, 0),
        ("unipc_2", 10, 0),
        ("unipc_3", 10, 0),
        ("predictor_corrector", 19, 18),
    ],
)
def test_calls_of_network_and_noise(name: str, calls: int, draws: int):
    seen: list[int] = []
    drawn: list[int] = []

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(round(t.item() * 1000))
        return x_t * 0

    def noise() -> Tensor:
        drawn.append(1)
        return torch.randn(4)

    sampler = SAMPLERS[name]
    sampler(denoise, torch.randn(4), Linear(), Linear().times(10), noise)
    assert (len(seen), len(drawn)) == (calls, draws)
    assert sampler.draws_noise == (draws > 0)
    if calls == 10:
        assert seen == list(range(1000, 0, -100))


@every_sampler
def test_on_step_sees_every_step(sampler: Sampler):
    seen: list[tuple[int, float, Tensor, Tensor]] = []
    sample = sampler(
        gaussian(Linear()),
        torch.randn(4),
        Linear(),
        Linear().times(4),
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
        return sampler(denoise, x, Cosine(), Cosine().times(5), lambda: torch.ones(3, 8).to(wide))

    expected = run(lambda x_t, t: denoise(x_t, t).to(wide))
    with torch.autocast("cpu", torch.bfloat16):
        sample = run(denoise)
    assert sample.dtype == wide
    assert torch.equal(sample, expected)


def test_refusals():
    x, times = torch.randn(3), Flow().times(4)
    for sampler in (Ancestral(), Heun(s_churn=1), DPMSolverPP2M(True), AnnealedLangevin(), PredictorCorrector()):
        with pytest.raises(ValueError, match="draws noise"):
            sampler(gaussian(Flow()), x, Flow(), times)
    with pytest.raises(ValueError, match="must fall"):
        Euler()(gaussian(Flow()), x, Flow(), torch.tensor([1.0, 0.5, 0.5]))
    with pytest.raises(ValueError, match="eta must lie"):
        Ancestral(eta=1.1)
    with pytest.raises(ValueError, match="eta=1 only"):
        Ancestral(eta=0, variance="beta")
    with pytest.raises(ValueError, match="posterior or beta"):
        Ancestral(variance="large")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="s_churn"):
        Heun(s_churn=-1)
    with pytest.raises(ValueError, match="order"):
        UniPC(4)
    with pytest.raises(ValueError, match="step_size"):
        AnnealedLangevin(step_size=0)
    with pytest.raises(ValueError, match="snr"):
        PredictorCorrector(snr=0)
