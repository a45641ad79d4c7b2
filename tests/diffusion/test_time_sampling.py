import pytest
import torch

from carrara.diffusion.objective import Objective
from carrara.diffusion.parameterization import V
from carrara.diffusion.schedule import EDM, Cosine, Flow, VarianceExploding
from carrara.diffusion.schedule_table import Linear
from carrara.diffusion.time_sampling import LogitNormal, LogNormal, Mode, SingleLevel, TimeSampler, Uniform
from carrara.diffusion.weighting import Unweighted

EDGES = torch.tensor([0.0, 1e-45, 1e-30, 2**-24, 0.5, 1 - 2**-24, 1.0])
EVEN = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000


@pytest.mark.parametrize(
    "sampler",
    [
        Uniform(),
        Uniform(1000),
        Uniform(1),
        LogitNormal(),
        LogitNormal(-1.2, 3),
        Mode(),
        Mode(-1),
        Mode(1.75),
        LogNormal(),
        LogNormal(3, 8),
        SingleLevel(0.5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_times_are_finite_and_in_range_and_rise_with_u(sampler: TimeSampler, dtype: torch.dtype):
    t = sampler(EDGES.to(dtype), Cosine())
    assert t.dtype == dtype
    assert ((t >= Cosine().t_least) & (t <= 1)).all()  # false of nan
    assert (t.diff() >= 0).all()


def test_discrete_times_are_equally_likely_first_and_last_included():
    index = Uniform(50)(EVEN, Flow()) * 50
    values, counts = index.unique(return_counts=True)
    assert values.tolist() == pytest.approx(list(range(1, 51)))
    assert counts.tolist() == [2000] * 50


def test_first_and_last_time_of_a_thousand_both_occur_in_float32():
    index = (Uniform(1000)(torch.rand(20_000), Flow()) * 1000).round().long()
    assert index.min() == 1
    assert index.max() == 1000


def test_uniform_is_uniform():
    torch.testing.assert_close(Uniform()(EVEN, Flow()), EVEN, rtol=0, atol=1.1e-5)
    schedule = EDM(sigma_min=0.002, sigma_max=80)
    t = Uniform()(EVEN, schedule)
    assert t.diff().std() < 1e-12 and t[-1] > 1 - 1e-5  # even
    assert schedule.sigma(t[0]).item() == pytest.approx(0.002, rel=1e-3)  # from the paper's least noise on


@pytest.mark.parametrize(("mean", "std"), [(0, 1), (-1.2, 1.5)])
def test_logit_normal_times_have_a_normal_logit(mean: float, std: float):
    logit = LogitNormal(mean, std)(EVEN, Flow()).logit()
    assert logit.mean().item() == pytest.approx(mean, abs=1e-3)
    assert logit.std().item() == pytest.approx(std, rel=1e-3)
    assert (logit - mean).pow(4).mean().item() == pytest.approx(3 * std**4, rel=0.01)


def test_mode_is_the_papers_function():
    """Esser et al. 2024, eq. 20 and the density below it: at t = f(u), 1 / |f'(u)|."""
    u, scale = EVEN, 1.29
    paper = 1 - u - scale * (torch.cos(torch.pi / 2 * u) ** 2 - 1 + u)
    torch.testing.assert_close(Mode(scale)(u, Flow()), paper.flip(0), rtol=0, atol=1.1e-5)
    torch.testing.assert_close(Mode(0)(u, Flow()), Uniform()(u, Flow()))
    middle = ((Mode(scale)(u, Flow()) - 0.5).abs() < 0.1).double().mean()
    assert middle > 0.3  # 0.2 of uniform times


@pytest.mark.parametrize("schedule", [EDM(), Cosine(), Flow()], ids=lambda s: type(s).__name__)
def test_log_normal_is_normal_in_log_sigma_on_any_schedule(schedule):
    t = LogNormal(-1.2, 1.2)(EVEN, schedule)
    log_sigma = -schedule.logsnr(t) / 2
    if isinstance(schedule, EDM):  # 4 in a hundred thousand are below the schedule's least noise
        log_sigma = log_sigma[t > schedule.t_least]
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=1e-3)
    assert log_sigma.std().item() == pytest.approx(1.2, rel=1e-3)


def test_a_single_level_is_one():
    t = SingleLevel(0.5)(EVEN[:10], EDM())
    torch.testing.assert_close(EDM().sigma(t), torch.full_like(t, 0.5))


def test_a_level_that_the_schedule_does_not_have_is_refused():
    SingleLevel(49).check(VarianceExploding())
    SingleLevel(0.011).check(VarianceExploding())
    SingleLevel(1e4).check(Flow())
    for sigma, schedule in ((100, VarianceExploding()), (0.001, EDM()), (1000, Linear())):
        with pytest.raises(ValueError, match=rf"sigma={sigma:g} .*{type(schedule).__name__}.* between"):
            Objective(schedule, V(), SingleLevel(sigma), Unweighted())


def test_impossible_values_are_refused():
    with pytest.raises(ValueError, match="scale"):
        Mode(1.76)
    with pytest.raises(ValueError, match="std"):
        LogNormal(std=0)
    with pytest.raises(ValueError, match="sigma"):
        SingleLevel(0)
    with pytest.raises(ValueError, match="num_steps"):
        Uniform(0)
    with pytest.raises(ValueError, match="std"):
        LogitNormal(std=0)
