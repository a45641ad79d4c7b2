"""Step for step against diffusers' schedulers, whose index j is our i - 1, any function for a network."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from carrara.diffusion.multistep import DPMSolverPP2M, UniPC
from carrara.diffusion.objective import Objective
from carrara.diffusion.parameterization import Epsilon, Parameterization, V
from carrara.diffusion.parameterization import Flow as FlowTarget
from carrara.diffusion.sampler import Ancestral, Euler, Heun, Sampler
from carrara.diffusion.schedule import AdditiveNoise, Flow, NoiseSchedule
from carrara.diffusion.schedule_table import Discrete, Linear, ScaledLinear, ZeroTerminalSNR
from carrara.diffusion.time_sampling import Uniform
from carrara.diffusion.weighting import Unweighted

TARGETS = pytest.mark.parametrize(
    ("target", "prediction_type"), [(Epsilon(), "epsilon"), (V(), "v_prediction")], ids=["epsilon", "v"]
)
# tables of 1000 steps: ours, and how diffusers is told
TABLES = pytest.mark.parametrize(
    ("schedule", "betas"),
    [(Linear(), (1e-4, 0.02, "linear")), (ScaledLinear(), (0.00085, 0.012, "scaled_linear"))],
    ids=["linear", "scaled_linear"],
)


def network(x: Tensor, index: float) -> Tensor:
    return 0.9 * x.sin() + 0.3 * torch.cos(2 * x + index / 300)


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 3, 4, 4, dtype=dtype)


def ours(
    sampler: Sampler,
    target: Parameterization,
    schedule: NoiseSchedule,
    x: Tensor,
    times: Tensor,
    drawn: torch.dtype | None = None,
) -> list[Tensor]:
    """x after every step; with `drawn` noise of another dtype than x, as some schedulers draw it."""
    objective = Objective(schedule, target, Uniform(), Unweighted())
    denoise = objective.denoiser(lambda x, t: network(x, schedule.c_noise(t).item()))
    generator = torch.Generator().manual_seed(1)
    trajectory: list[Tensor] = []
    sampler(
        denoise,
        x,
        schedule,
        times,
        lambda: torch.randn(x.shape, generator=generator, dtype=drawn or x.dtype),
        lambda k, t, x, x0_hat: trajectory.append(x),
    )
    return trajectory


def theirs(scheduler: Any, x: Tensor, num_steps: int, index: Callable[[float], float], **options) -> list[Tensor]:
    """x after every call; its index j is what our network is told as `index(j)`."""
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(1)
    trajectory = []
    for j in scheduler.timesteps:
        output = network(scheduler.scale_model_input(x, j), index(j.item()))
        if "generator" in scheduler.step.__code__.co_varnames:
            options["generator"] = generator
        x = scheduler.step(output, j, x, **options).prev_sample
        trajectory.append(x)
    return trajectory


def of(alphas_cumprod: Tensor) -> Discrete:
    """Their table, float32, as it is."""
    alpha_bar = torch.cat([torch.ones(1).double(), alphas_cumprod.double()])
    return Discrete(1 - alpha_bar[1:] / alpha_bar[:-1])


def next_index(j: float) -> float:
    return j + 1


def assert_same_steps(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-4) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert ((a - b).norm() / b.norm()).item() < tolerance


@TARGETS
@TABLES
@pytest.mark.parametrize(("variance", "variance_type"), [("posterior", "fixed_small"), ("beta", "fixed_large")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ddpm(target, prediction_type, schedule, betas, variance, variance_type, dtype):
    x = start(dtype)
    scheduler = DDPMScheduler(
        1000,
        *betas,
        variance_type=variance_type,
        clip_sample=False,
        prediction_type=prediction_type,
        timestep_spacing="trailing",
    )
    steps = theirs(scheduler, x, 100, next_index)
    mine = ours(Ancestral(variance=variance), target, schedule, x, schedule.times(100))
    if variance == "beta":  # with fewer than all steps theirs adds noise on the last, which is not at its index 0
        mine, steps = mine[:-1], steps[:-1]
    assert_same_steps(mine, steps)


@TARGETS
@TABLES
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [10, 50])
def test_ddim(target, prediction_type, schedule, betas, eta, num_steps):
    x = start()
    scheduler = DDIMScheduler(
        1000,
        *betas,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )
    steps = theirs(scheduler, x, num_steps, next_index, eta=eta)
    assert_same_steps(ours(Ancestral(eta=eta), target, schedule, x, schedule.times(num_steps)), steps)


@pytest.mark.parametrize("eta", [0.0, 0.999])
@pytest.mark.parametrize("num_steps", [5, 50])
def test_ddim_with_zero_terminal_snr(eta, num_steps):
    x = start()
    scheduler = DDIMScheduler(
        1000,
        0.00085,
        0.012,
        "scaled_linear",
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
    )
    schedule = ZeroTerminalSNR(ScaledLinear())
    steps = theirs(scheduler, x, num_steps, next_index, eta=eta)
    # eta = 1 would keep sqrt(1 - alpha_bar - std^2) = 0 of the old noise on the first step: in float32 theirs takes the
    # root of what rounding leaves of that, which on some machines is below 0
    assert_same_steps(ours(Ancestral(eta=eta), V(), schedule, x, schedule.times(num_steps)), steps, 1e-4)


@TARGETS
@TABLES
@pytest.mark.parametrize("num_steps", [2, 10, 40])
@pytest.mark.parametrize(("stochastic", "algorithm"), [(False, "dpmsolver++"), (True, "sde-dpmsolver++")])
def test_dpm_solver_pp_2m(target, prediction_type, schedule, betas, num_steps, stochastic, algorithm):
    x = start()
    scheduler = DPMSolverMultistepScheduler(
        1000,
        *betas,
        solver_order=2,
        algorithm_type=algorithm,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )
    sampler = DPMSolverPP2M(stochastic)
    steps = ours(sampler, target, schedule, x, schedule.times(num_steps), torch.float32)  # as diffusers draws here
    assert_same_steps(steps, theirs(scheduler, x, num_steps, next_index))


@TARGETS
@TABLES
@pytest.mark.parametrize("num_steps", [2, 5, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(target, prediction_type, schedule, betas, num_steps, order):
    x = start()
    scheduler = UniPCMultistepScheduler(
        1000,
        *betas,
        solver_order=order,
        solver_type="bh2",
        predict_x0=True,
        lower_order_final=True,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )
    steps = ours(UniPC(order), target, schedule, x, schedule.times(num_steps))
    assert_same_steps(steps, theirs(scheduler, x, num_steps, next_index))


# These samplers of diffusers go over x / alpha, and start there from sigma / alpha.


@TARGETS
@TABLES
@pytest.mark.parametrize(
    ("sampler", "other"),
    [(Euler(), EulerDiscreteScheduler), (Ancestral(), EulerAncestralDiscreteScheduler)],
    ids=["euler", "euler_ancestral"],
)
def test_euler(target, prediction_type, schedule, betas, sampler, other):
    x = start()
    times = schedule.times(20)
    levels = schedule.levels(times)
    scheduler = other(1000, *betas, prediction_type=prediction_type, timestep_spacing="trailing")
    steps = theirs(scheduler, x / levels[0].alpha, 20, next_index)
    steps = [step * level.alpha for step, level in zip(steps, levels[1:], strict=True)]
    assert_same_steps(ours(sampler, target, schedule, x, times), steps)


@pytest.mark.parametrize(
    ("sampler", "other"),
    [(Euler(), EulerDiscreteScheduler), (Ancestral(), EulerAncestralDiscreteScheduler)],
    ids=["euler", "euler_ancestral"],
)
def test_euler_with_the_floored_table_of_zero_terminal_snr(sampler, other):
    x = start()
    scheduler = other(
        1000, 0.00085, 0.012, "scaled_linear", prediction_type="v_prediction", timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
    )  # fmt: skip
    assert scheduler.alphas_cumprod[-1] == 2**-24  # theirs, instead of 0
    schedule = of(scheduler.alphas_cumprod)
    times = schedule.times(20)
    levels = schedule.levels(times)
    steps = theirs(scheduler, x / levels[0].alpha, 20, next_index)
    steps = [step * level.alpha for step, level in zip(steps, levels[1:], strict=True)]
    assert_same_steps(ours(sampler, V(), schedule, x, times), steps)


class OverAlpha(AdditiveNoise):
    """Another schedule's x / alpha: alpha is 1 and sigma its sigma / alpha."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        self.schedule = schedule

    def sigma(self, t: Tensor) -> Tensor:
        return self.schedule.sigma(t) / self.schedule.alpha(t)

    def t_from_logsnr(self, logsnr: Tensor) -> Tensor:
        return self.schedule.t_from_logsnr(logsnr)


def test_heun():
    """Where alpha is 1 the definitions coincide: both go straight over sigma."""
    x, table = start(), ScaledLinear()
    scheduler = HeunDiscreteScheduler(
        1000, 0.00085, 0.012, "scaled_linear", prediction_type="epsilon", timestep_spacing="trailing"
    )
    schedule, times = OverAlpha(table), table.times(20)
    levels = schedule.levels(times)
    calls = theirs(scheduler, levels[0].sigma * x, 20, next_index)
    objective = Objective(schedule, Epsilon(), Uniform(), Unweighted())

    def predict(x: Tensor, t: Tensor) -> Tensor:  # it scales the network's input
        return network(x / (schedule.sigma(t).square() + 1).sqrt(), table.c_noise(t).item())

    trajectory: list[Tensor] = []
    Heun()(
        objective.denoiser(predict), levels[0].sigma * x, schedule, times, None,
        lambda k, t, x, x0_hat: trajectory.append(x),
    )  # fmt: skip
    assert_same_steps(trajectory, [*calls[1::2], calls[-1]])  # theirs are two a step, but for the last


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_euler(shift):
    x = start(torch.float32)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    schedule = Flow(shift)
    num_steps = 10
    times = schedule.times(num_steps)
    scheduler.set_timesteps(sigmas=times[:-1].tolist())  # which it shifts
    trajectory = []
    theirs_x = x
    for j in scheduler.timesteps:
        theirs_x = scheduler.step(network(theirs_x, j.item()), j, theirs_x).prev_sample
        trajectory.append(theirs_x)
    assert_same_steps(ours(Euler(), FlowTarget(), schedule, x, times), trajectory)
