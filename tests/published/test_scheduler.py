from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from carrara.config import build
from carrara.errors import UserError
from carrara.published.scheduler import config_of, nodes_of, problems_of
from tests.published.pipelines import scheduler

FILE = Path("scheduler/scheduler_config.json")
BETAS = [
    {},
    {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"prediction_type": "sample"},
]


@pytest.mark.parametrize("changes", BETAS)
def test_the_noise_levels_are_theirs_and_go_back(changes):
    theirs = scheduler(**changes)
    nodes = nodes_of(FILE, dict(theirs.config))
    schedule = build(nodes["schedule"])
    times = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert torch.allclose(schedule.alpha(times).square().float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-7)
    names = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}
    assert build(nodes["parameterization"]).name == names[theirs.config.prediction_type]
    again = DPMSolverMultistepScheduler.from_config(config_of(nodes))
    assert torch.allclose(again.alphas_cumprod, theirs.alphas_cumprod, atol=1e-7)  # 2⁻²⁴ for a terminal 0
    assert again.config.prediction_type == theirs.config.prediction_type


def test_what_a_file_leaves_out_has_their_default():
    nodes = nodes_of(FILE, {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "skip_prk_steps": True})
    assert nodes["schedule"]["beta_start"] == DDIMScheduler().config.beta_start
    assert nodes["parameterization"]["_target_"].endswith(".Epsilon")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beta_schedule", "sigmoid"),
        ("prediction_type", "flow_prediction"),
        ("num_train_timesteps", 500),
        ("trained_betas", [0.1, 0.2]),
    ],
)
def test_a_field_that_ours_cannot_be_is_named_with_its_file(field, value):
    with pytest.raises(UserError, match=rf"^scheduler/scheduler_config.json: {field} is"):
        nodes_of(FILE, {"beta_schedule": "linear", field: value})


def test_a_scheduler_without_betas_is_refused():
    theirs = FlowMatchEulerDiscreteScheduler().config
    with pytest.raises(UserError, match=r"scheduler_config.json: FlowMatchEulerDiscreteScheduler has no beta_schedule"):
        nodes_of(FILE, {"_class_name": "FlowMatchEulerDiscreteScheduler", **theirs})


@pytest.mark.parametrize(
    ("schedule", "target", "problems"),
    [
        (
            {"_target_": "carrara.diffusion.schedule.Flow", "shift": 1.0},
            "Flow",
            [
                "diffusion/schedule=linear, scaled_linear, cosine_table or zero_terminal_snr of one of them",
                "diffusion/parameterization=epsilon, v or x0",
            ],
        ),
        (
            {"_target_": "x.Linear", "beta_start": 1e-4, "beta_end": 0.02, "num_steps": 100},
            "V",
            ["diffusion.schedule.num_steps=1000"],
        ),
        (
            {"_target_": "x.CosineTable", "max_beta": 0.5, "s": 0.008, "num_steps": 1000},
            "V",
            ["diffusion.schedule.max_beta=0.999"],
        ),
        ({"_target_": "x.CosineTable", "max_beta": 0.999, "s": 0.008, "num_steps": 1000}, "X0", []),
    ],
)
def test_what_has_no_place_in_theirs_is_named_with_its_key(schedule, target, problems):
    parameterization = {"_target_": f"carrara.diffusion.parameterization.{target}"}
    assert problems_of({"schedule": schedule, "parameterization": parameterization}) == problems
