from typing import Any

import pytest
import torch

from carrara.diffusion.schedule import EDM, Cosine, Flow, NoiseSchedule, VarianceExploding
from carrara.diffusion.schedule_table import Linear, ScaledLinear
from carrara.diffusion.spacing import Karras, LogSNR, Spacing, Uniform
from tests.diffusion.oracle import SCHEDULES

every_spacing = pytest.mark.parametrize("spacing", [Uniform(), Karras(), LogSNR()], ids=lambda s: type(s).__name__)


@every_spacing
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize("num_steps", [1, 2, 10, 50])
def test_times_fall_from_one_to_zero_or_are_refused_by_name(spacing: Spacing, schedule, num_steps: int):
    if schedule.terminal_snr_is_zero and not isinstance(spacing, Uniform):
        with pytest.raises(ValueError, match=f"{type(spacing).__name__}.*{type(schedule).__name__}.*uniform"):
            spacing(schedule, num_steps)
        return
    times = spacing(schedule, num_steps)
    assert times.shape == (num_steps + 1,) and times.dtype == torch.float64
    assert times[0] == 1 and times[-1] == 0
    assert (times.diff() < 0).all()


def test_karras_takes_the_papers_levels():
    i = torch.arange(10, dtype=torch.float64)
    schedule = EDM(sigma_min=0.01, sigma_max=20)
    expected = (20 ** (1 / 7) + i / 9 * (0.01 ** (1 / 7) - 20 ** (1 / 7))) ** 7
    torch.testing.assert_close(schedule.sigma(Karras()(schedule, 10))[:-1], expected)
    other = (20 ** (1 / 3) + i / 9 * (0.01 ** (1 / 3) - 20 ** (1 / 3))) ** 3
    torch.testing.assert_close(schedule.sigma(Karras(rho=3)(schedule, 10))[:-1], other)


def test_karras_on_a_table_takes_the_levels_of_diffusers():
    from diffusers import EulerDiscreteScheduler

    other: Any = EulerDiscreteScheduler(
        1000, 0.00085, 0.012, "scaled_linear", use_karras_sigmas=True, timestep_spacing="trailing"
    )
    other.set_timesteps(1000)  # from the table's last to its first level
    schedule = ScaledLinear()
    levels = schedule.levels(Karras()(schedule, 1000))[:-1]
    ours = torch.tensor([level.sigma / level.alpha for level in levels])
    torch.testing.assert_close(ours, other.sigmas[:-1].float(), rtol=2e-5, atol=0)


@pytest.mark.parametrize("schedule", [Linear(), Cosine(), VarianceExploding()], ids=lambda s: type(s).__name__)
def test_logsnr_is_even_down_to_t_min(schedule: NoiseSchedule):
    logsnr = schedule.logsnr(LogSNR()(schedule, 12)[:-1])
    torch.testing.assert_close(logsnr.diff(), logsnr.diff()[:1].expand(11), rtol=1e-6, atol=0)
    torch.testing.assert_close(logsnr[-1], schedule.logsnr(torch.tensor(schedule.t_min).double()))


@every_spacing
def test_impossible_steps_are_refused(spacing: Spacing):
    for impossible in (0, -1, 2.5, True, "ten"):
        with pytest.raises(ValueError, match=f"num_steps is {impossible}"):
            spacing(Cosine(), impossible)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="1001, but the schedule's table has 1000"):
        Uniform()(Linear(), 1001)
    with pytest.raises(ValueError, match="rho"):
        Karras(rho=0)


def test_flow_is_uniform_as_ever():
    assert Uniform()(Flow(), 4).tolist() == [1, 0.75, 0.5, 0.25, 0]
