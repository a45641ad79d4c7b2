"""Step for step against diffusers' schedulers, whose index j is our i - 1, any function for a network."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from carrara.diffusion.objective import Objective
from carrara.diffusion.parameterization import Epsilon, Parameterization, V
from carrara.diffusion.sampler import Ancestral, DPMSolverPP2M, Sampler
from carrara.diffusion.schedule import Linear
from carrara.diffusion.time_sampling import Uniform
from carrara.diffusion.weighting import Unweighted

TARGETS = pytest.mark.parametrize(
    ("target", "prediction_type"), [(Epsilon(), "epsilon"), (V(), "v_prediction")], ids=["epsilon", "v"]
)


def network(x: Tensor, index: float) -> Tensor:
    return 0.9 * x.sin() + 0.3 * torch.cos(2 * x + index / 300)


def start() -> Tensor:
    return torch.randn(2, 3, 4, 4, dtype=torch.float64)


def ours(
    sampler: Sampler,
    target: Parameterization,
    x: Tensor,
    total: int,
    num_steps: int,
    drawn: torch.dtype = torch.float64,
) -> list[Tensor]:
    objective = Objective(Linear(num_steps=total), target, Uniform(), Unweighted())
    denoise = objective.denoiser(lambda x, time: network(x, time[0].item() * total / 1000))
    generator = torch.Generator().manual_seed(1)
    trajectory: list[Tensor] = []
    sampler(
        denoise,
        x,
        objective.schedule,
        num_steps,
        noise=lambda: torch.randn(x.shape, generator=generator, dtype=drawn),
        on_step=lambda k, t, x, x0_hat: trajectory.append(x),
    )
    return trajectory


def theirs(scheduler, x: Tensor, num_steps: int, **options) -> list[Tensor]:
    scheduler.set_timesteps(num_steps)
    generator = torch.Generator().manual_seed(1)
    trajectory = []
    for j in scheduler.timesteps:
        output = network(x, j.item() + 1)
        x = scheduler.step(output, j, x, generator=generator, **options).prev_sample
        trajectory.append(x)
    return trajectory


def assert_same_steps(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-4) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert ((a - b).norm() / b.norm()).item() < tolerance


@TARGETS
@pytest.mark.parametrize(("variance", "variance_type"), [("posterior", "fixed_small"), ("beta", "fixed_large")])
def test_ddpm(target, prediction_type, variance, variance_type):
    x = start()
    scheduler = DDPMScheduler(
        100, 1e-4, 0.02, variance_type=variance_type, clip_sample=False, prediction_type=prediction_type
    )
    assert_same_steps(ours(Ancestral(variance=variance), target, x, 100, 100), theirs(scheduler, x, 100))


@TARGETS
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_steps", [10, 50])
def test_ddim(target, prediction_type, eta, num_steps):
    x = start()
    scheduler = DDIMScheduler(
        1000,
        1e-4,
        0.02,
        clip_sample=False,
        set_alpha_to_one=True,
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )
    steps = theirs(scheduler, x, num_steps, eta=eta)
    assert_same_steps(ours(Ancestral(eta=eta), target, x, 1000, num_steps), steps)


@TARGETS
@pytest.mark.parametrize("num_steps", [2, 10, 40])
@pytest.mark.parametrize(("stochastic", "algorithm"), [(False, "dpmsolver++"), (True, "sde-dpmsolver++")])
def test_dpm_solver_pp_2m(target, prediction_type, num_steps, stochastic, algorithm):
    x = start()
    scheduler = DPMSolverMultistepScheduler(
        1000,
        1e-4,
        0.02,
        solver_order=2,
        algorithm_type=algorithm,
        solver_type="midpoint",
        lower_order_final=True,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
        prediction_type=prediction_type,
    )
    steps = ours(DPMSolverPP2M(stochastic), target, x, 1000, num_steps, torch.float32)  # as diffusers draws here
    assert_same_steps(steps, theirs(scheduler, x, num_steps))
