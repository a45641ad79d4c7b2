"""`scheduler_config.json`: what a published U-Net was trained with, to and from our schedule and target."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carrara.errors import UserError

FILE = "scheduler_config.json"
CLASS = "DDIMScheduler"
NUM_STEPS = 1000
"""Of the table: the network is told an index of it as its time."""

_PACKAGE = "carrara.diffusion"
_TABLES = {  # beta_schedule -> our class and its settings by their fields; the cosine's have no field
    "linear": ("Linear", ("beta_start", "beta_end")),
    "scaled_linear": ("ScaledLinear", ("beta_start", "beta_end")),
    "squaredcos_cap_v2": ("CosineTable", ()),
}
_COSINE = {"max_beta": 0.999, "s": 0.008}
_TARGETS = {"epsilon": "Epsilon", "v_prediction": "V", "sample": "X0"}
_DEFAULTS = {
    "num_train_timesteps": NUM_STEPS, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon", "rescale_betas_zero_snr": False,
}  # fmt: skip


def nodes_of(file: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`schedule` and `parameterization` as in `conf/diffusion`; what the file says of sampling is not read.

    Raises:
        UserError: a table or target that ours cannot be.
    """
    fields = {key: config.get(key, default) for key, default in _DEFAULTS.items()}
    for key, known in (
        ("beta_schedule", list(_TABLES)),
        ("prediction_type", list(_TARGETS)),
        ("num_train_timesteps", [NUM_STEPS]),
        ("trained_betas", [None]),
    ):
        if fields[key] not in known:
            raise UserError(f"{file}: {key} is {fields[key]}; only {', '.join(map(str, known))} can be read here")
    name, keys = _TABLES[fields["beta_schedule"]]
    schedule = {
        "_target_": f"{_PACKAGE}.schedule_table.{name}",
        **({key: fields[key] for key in keys} or _COSINE),
        "num_steps": fields["num_train_timesteps"],
    }
    if fields["rescale_betas_zero_snr"]:
        schedule = {"_target_": f"{_PACKAGE}.schedule_table.ZeroTerminalSNR", "table": schedule}
    target = {"_target_": f"{_PACKAGE}.parameterization.{_TARGETS[fields['prediction_type']]}"}
    return {"schedule": schedule, "parameterization": target}


def config_of(diffusion: Mapping[str, Any]) -> dict[str, Any]:
    """The `scheduler_config.json` with which `diffusers` samples as our DDIM does.

    Args:
        diffusion: the run's node.

    Raises:
        UserError: a schedule or target that has no place in it.
    """
    schedule, zero = diffusion["schedule"], False
    if _class_of(schedule) == "ZeroTerminalSNR":
        schedule, zero = schedule["table"], True
    kinds = {name: (beta_schedule, keys) for beta_schedule, (name, keys) in _TABLES.items()}
    targets = {name: prediction_type for prediction_type, name in _TARGETS.items()}
    problems = []
    found = kinds.get(_class_of(schedule))
    if found is None:
        problems.append("diffusion/schedule: only linear, scaled_linear, cosine_table or zero_terminal_snr")
    elif not found[1] and any(schedule[key] != value for key, value in _COSINE.items()):
        problems.append(f"diffusion.schedule: a cosine_table only with {_COSINE}")
    if found is not None and schedule["num_steps"] != NUM_STEPS:
        problems.append(f"diffusion.schedule.num_steps: only {NUM_STEPS}")
    target = targets.get(_class_of(diffusion["parameterization"]))
    if target is None:
        problems.append("diffusion/parameterization: only epsilon, v or x0")
    if problems or found is None:
        raise UserError("; ".join(problems))
    return {
        "_class_name": CLASS,
        **_DEFAULTS,
        **{key: schedule[key] for key in found[1]},
        "beta_schedule": found[0],
        "prediction_type": target,
        "rescale_betas_zero_snr": zero,
        "clip_sample": False,
        "set_alpha_to_one": True,
        "timestep_spacing": "trailing",
        "steps_offset": 0,
    }


def _class_of(node: Mapping[str, Any]) -> str:
    return str(node["_target_"]).rpartition(".")[2]
