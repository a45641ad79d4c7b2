import math
from typing import Any

import pytest
import torch

from carrara.diffusion.schedule import (
    EDM,
    AdditiveNoise,
    Cosine,
    Flow,
    NoiseSchedule,
    Sigmoid,
    VarianceExploding,
    VariancePreserving,
)
from carrara.diffusion.schedule_table import CosineTable, Discrete, Linear, ScaledLinear, ZeroTerminalSNR
from tests.diffusion.oracle import SCHEDULES

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
every_table = pytest.mark.parametrize(
    "table", [Linear(), ScaledLinear(), CosineTable(), ZeroTerminalSNR(Linear())], ids=lambda s: type(s).__name__
)
GRID = torch.linspace(0, 1, 1001, dtype=torch.float64)


def test_linear_ends_at_the_papers_alpha_bar():
    alpha_bar = Linear().alpha(torch.ones((), dtype=torch.float64)).item() ** 2
    assert alpha_bar == pytest.approx(4.04e-5, rel=2e-3)


def test_stepwise_and_one_shot_forward_processes_agree():
    n, index, x0 = 200_000, 300, 1.5
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist()
    stepwise = torch.full((n,), x0)
    for beta in betas[:index]:
        stepwise = math.sqrt(1 - beta) * stepwise + math.sqrt(beta) * torch.randn(n)
    t = torch.tensor(index / 1000)
    schedule = Linear()
    one_shot = schedule.alpha(t) * x0 + schedule.sigma(t) * torch.randn(n)
    assert stepwise.mean().item() == pytest.approx(one_shot.mean().item(), rel=0.01)
    assert stepwise.var().item() == pytest.approx(one_shot.var().item(), rel=0.01)


@every_schedule
def test_snr_strictly_falls(schedule: NoiseSchedule):
    logsnr = schedule.logsnr(GRID)
    assert (logsnr.diff() < 0).all()
    assert logsnr[0] == torch.inf


@every_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_agree_with_each_other_and_keep_shape_and_dtype(schedule: NoiseSchedule, dtype: torch.dtype):
    t = GRID[1:-1].reshape(27, 37).to(dtype)
    alpha, sigma, logsnr = schedule.alpha(t), schedule.sigma(t), schedule.logsnr(t)
    for value in (alpha, sigma, logsnr, schedule.c_noise(t), schedule.t_from_logsnr(logsnr)):
        assert value.shape == t.shape
        assert value.dtype == dtype
    tolerance = 1e-11 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(logsnr, 2 * (alpha / sigma).log(), rtol=tolerance, atol=tolerance)
    total = alpha**2 + sigma**2
    assert torch.allclose(total, torch.ones_like(total), atol=tolerance) == isinstance(schedule, VariancePreserving)
    assert torch.equal(alpha, torch.ones_like(alpha)) == isinstance(schedule, AdditiveNoise)


@every_schedule
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 5e-7), (torch.float64, 1e-12)])
def test_t_from_logsnr_is_the_inverse(schedule: NoiseSchedule, dtype: torch.dtype, tolerance: float):
    if isinstance(schedule, EDM) and dtype == torch.float32:
        tolerance = 2e-6  # 2 log sigma = 14 log t + ..., in float32
    between = torch.linspace(0.0013, 0.9987, 777, dtype=dtype)  # not on a table's indices
    near_one = torch.tensor([0.9996, 0.9999, 1], dtype=dtype)  # beyond the cosine's clip
    for t in (between, near_one):
        torch.testing.assert_close(schedule.t_from_logsnr(schedule.logsnr(t)), t, rtol=0, atol=tolerance)


@every_schedule
def test_ends(schedule: NoiseSchedule):
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    assert schedule.alpha(zero) == 1
    assert schedule.sigma(zero) == 0
    assert (schedule.alpha(one) == 0) == schedule.terminal_snr_is_zero
    expected = {EDM: 80, VarianceExploding: 50}.get(type(schedule), 1)
    assert schedule.prior_scale == pytest.approx(expected, rel=3e-3)
    assert schedule.c_noise(one) == 1000 and schedule.c_noise(zero) == 0
    infinite = torch.tensor([torch.inf, -torch.inf], dtype=torch.float64)
    assert schedule.t_from_logsnr(infinite).tolist() == pytest.approx([0, 1], abs=1e-12)


@every_schedule
def test_float32_keeps_its_precision_where_there_is_hardly_any_noise_or_picture(schedule: NoiseSchedule):
    t = torch.tensor([1e-5, 1e-3, 0.25, 0.75, 0.9985])
    for function in (schedule.alpha, schedule.sigma):
        torch.testing.assert_close(function(t).double(), function(t.double()), rtol=1e-6, atol=0)


@pytest.mark.parametrize("num_steps", [10, 1000, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_is_exact_at_its_indices(num_steps: int, dtype: torch.dtype):
    betas = torch.linspace(1e-4, 0.02, num_steps, dtype=torch.float64)
    index = torch.arange(1, num_steps + 1)
    alpha = Discrete(betas).alpha(index.to(dtype) / num_steps)
    expected = (1 - betas).cumprod(0).sqrt().to(dtype)
    torch.testing.assert_close(alpha, expected, rtol=1.2e-7 if dtype == torch.float32 else 1e-13, atol=0)


def test_between_indices_log_alpha_bar_is_linear():
    table = Discrete([0.1, 0.2])
    middle = table.alpha(torch.tensor([0.25, 0.75], dtype=torch.float64)) ** 2
    assert middle.tolist() == pytest.approx([math.sqrt(0.9), 0.9 * math.sqrt(0.8)], rel=1e-12)


@every_table
def test_steps_over_a_table_visit_its_indices(table: Discrete):
    assert torch.equal(table.times(1000), torch.arange(1000, -1, -1, dtype=torch.float64) / 1000)
    times = table.times(30) * 1000
    assert torch.equal(times, times.round())
    assert times[0] == 1000
    assert times[-1] == 0
    with pytest.raises(ValueError, match="1001, but the schedule's table has 1000"):
        table.times(1001)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.1], [1.0, 0.1], [[0.1]], [math.nan]])
def test_a_table_of_anything_but_betas_is_refused(betas: list):
    with pytest.raises(ValueError, match="betas must be"):
        Discrete(betas)


@every_schedule
def test_the_last_noisy_time_of_spacings_in_noise_levels_is_a_time(schedule: NoiseSchedule):
    assert 0 < schedule.t_min < 0.5
    assert schedule.sigma(torch.tensor(schedule.t_min)) < 0.05


def test_scaled_linear_is_stable_diffusions_table():
    from diffusers import DDIMScheduler

    other: Any = DDIMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    ours = ScaledLinear().alpha(GRID[1:]) ** 2
    torch.testing.assert_close(ours.float(), other.alphas_cumprod, rtol=1e-5, atol=0)


@pytest.mark.parametrize("table", [Linear(), ScaledLinear()], ids=lambda s: type(s).__name__)
def test_zero_terminal_snr_is_the_papers_rescaling(table: Discrete):
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    betas = 1 - (table.alpha(GRID[1:]) / table.alpha(GRID[:-1])) ** 2
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(betas), 0)
    rescaled = ZeroTerminalSNR(table)
    torch.testing.assert_close(rescaled.alpha(GRID[1:]) ** 2, theirs, rtol=1e-10, atol=1e-14)
    assert rescaled.alpha(GRID[-1]) == 0 and rescaled.terminal_snr_is_zero
    torch.testing.assert_close(rescaled.alpha(GRID[1]), table.alpha(GRID[1]))
    again = ZeroTerminalSNR(rescaled)
    torch.testing.assert_close(again.alpha(GRID), rescaled.alpha(GRID))


def test_on_the_last_step_to_zero_alpha_falls_evenly():
    table = ZeroTerminalSNR(Linear())
    t = torch.tensor([0.999, 0.99925, 0.9995, 1.0], dtype=torch.float64)
    alpha = table.alpha(t)
    torch.testing.assert_close(alpha / alpha[0], torch.tensor([1, 0.75, 0.5, 0]).double(), rtol=1e-9, atol=0)


def test_sigmoid_is_the_papers_curve():
    def curve(x: torch.Tensor) -> torch.Tensor:
        low, high = torch.tensor(-3.0).double(), torch.tensor(3.0).double()
        return (torch.sigmoid(high) - torch.sigmoid(x)) / (torch.sigmoid(high) - torch.sigmoid(low))

    torch.testing.assert_close(Sigmoid().alpha(GRID) ** 2, curve(-3 + 6 * GRID), rtol=1e-9, atol=1e-15)
    sharper = Sigmoid(0, 3, 0.5).alpha(GRID) ** 2
    assert sharper[0] == 1 and sharper[-1] == 0 and (sharper.diff() < 0).all()


@pytest.mark.parametrize(
    ("start", "end", "tau"), [(-3, 1, 0.9), (-3, 2, 0.3), (-3, 2, 0.7), (-3, 3, 0.1), (0, 3, 0.3), (-3, 3, 0.001)]
)
def test_sigmoid_is_exact_at_its_ends_and_back_for_any_setting(start: float, end: float, tau: float):
    schedule = Sigmoid(start, end, tau)
    assert schedule.alpha(GRID[-1]) == 0 and schedule.sigma(GRID[0]) == 0
    assert (schedule.logsnr(GRID).diff() < 0).all()
    inner = torch.tensor([1e-5, 1e-3, 0.3, 0.6, 0.9, 0.999], dtype=torch.float64)
    back = schedule.t_from_logsnr(schedule.logsnr(inner))
    if tau >= 0.1:  # below, alpha is so nearly 1 or 0 that its logarithm holds no more of the time
        torch.testing.assert_close(back, inner, rtol=1e-6, atol=0)
    assert back.isfinite().all()


def test_a_shift_keeps_the_path_and_moves_the_times():
    """SNR falls by shift^2 at every time, as more pixels of the same picture make it appear."""
    plain, shifted = Flow(), Flow(3.0)
    inner = GRID[1:-1]
    torch.testing.assert_close(shifted.logsnr(inner), plain.logsnr(inner) - 2 * math.log(3))
    torch.testing.assert_close(shifted.alpha(inner) + shifted.sigma(inner), torch.ones_like(inner))
    expected = 3 * inner / (1 + 2 * inner)
    torch.testing.assert_close(shifted.sigma(inner), expected)
    torch.testing.assert_close(shifted.c_noise(inner), 1000 * expected)  # what a network without a shift would be told


def test_edm_has_the_papers_levels():
    schedule = EDM()
    i = torch.arange(18, dtype=torch.float64)
    paper = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    torch.testing.assert_close(schedule.sigma(schedule.times(18))[:-1], paper)
    assert schedule.times(18)[-1] == 0


def test_the_variance_exploding_kernel_is_that_of_its_sde():
    """sigma(t)^2 is the integral of g^2 = d sigma_geometric^2 / dt (Song et al. 2021, eq. 30)."""
    schedule = VarianceExploding(0.01, 50)
    t = torch.linspace(0, 0.7, 200_001, dtype=torch.float64)
    g_squared = 0.01**2 * 5000 ** (2 * t) * 2 * math.log(5000)
    integral = torch.trapezoid(g_squared, t).sqrt()
    assert schedule.sigma(t[-1]).item() == pytest.approx(integral.item(), rel=1e-6)
    assert schedule.sigma(torch.tensor(schedule.t_min).double()).item() == pytest.approx(0.01)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Flow(0),
        lambda: EDM(sigma_min=0),
        lambda: EDM(sigma_min=1, sigma_max=0.5),
        lambda: VarianceExploding(2, 1),
        lambda: Sigmoid(3, -3),
        lambda: Sigmoid(tau=0),
        lambda: Cosine(s=-0.1),
        lambda: ZeroTerminalSNR(Discrete([0.1])),
        lambda: ZeroTerminalSNR(Flow()),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings_are_refused(build):
    with pytest.raises(ValueError, match=r"must be|0 <|one step"):
        build()


@pytest.mark.parametrize("schedule", [Cosine(), CosineTable()], ids=["continuous", "table"])
def test_cosine_is_the_papers_curve(schedule: NoiseSchedule):
    def f(t):
        return torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    t = GRID[:-1]
    expected = f(t) / f(torch.zeros(()).double())
    torch.testing.assert_close(schedule.alpha(t) ** 2, expected, rtol=1e-8, atol=0)


def test_cosine_is_clipped_at_the_rate_of_the_papers_largest_beta():
    t = torch.linspace(0.99, 1, 10_001, dtype=torch.float64)
    rate = -2 * Cosine().alpha(t).log().diff() / t.diff()
    assert (rate.diff() > -1e-3).all()  # never falls: the curve and its clip meet without a kink
    assert rate[-1].item() == pytest.approx(-1000 * math.log(1 - 0.999), rel=1e-6)
    last = 1 - (CosineTable().alpha(GRID[-1]) / CosineTable().alpha(GRID[-2])) ** 2
    assert last.item() == pytest.approx(0.999, abs=1e-9)


def test_levels_are_the_schedules_values():
    levels = Flow().levels(torch.tensor([1, 0.25, 0]))
    assert [(level.alpha, level.sigma) for level in levels] == [(0, 1), (0.75, 0.25), (1, 0)]
    assert levels[0].logsnr == -math.inf
    assert levels[1].logsnr == pytest.approx(2 * math.log(3))
    assert levels[2].logsnr == math.inf
    assert levels[1].t.dtype == torch.float64
