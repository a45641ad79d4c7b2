"""`scheduler_config.json`: what a published U-Net was trained with, to and from our schedule and target."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carrara.errors import UserError

FILE = "scheduler_config.json"
CLASS = "DPMSolverMultistepScheduler"
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
_KINDS = {name: (kind, keys) for kind, (name, keys) in _TABLES.items()}
_PREDICTION_TYPES = {name: kind for kind, name in _TARGETS.items()}
_DEFAULTS = {
    "num_train_timesteps": NUM_STEPS, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear",
    "trained_betas": None, "prediction_type": "epsilon", "rescale_betas_zero_snr": False,
}  # fmt: skip


def nodes_of(file: Path, config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`schedule` and `parameterization` as in `conf/diffusion`; what the file says of sampling is not read.

    Raises:
        UserError: a table or target that ours cannot be.
    """
    if "beta_schedule" not in config:  # of flow matching, say
        raise UserError(
            f"{file}: {config.get('_class_name')} has no beta_schedule; only tables of betas can be read here"
        )
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
    """The `scheduler_config.json` with which `diffusers` samples as our DDIM does, in any number of steps.

    It is DPM-Solver++ of order 1, which is DDIM (Lu et al. 2022, section 4): their DDIMScheduler goes from t to
    t − 1000 // steps, which is not the next time unless the number of steps divides 1000.

    Args:
        diffusion: the run's node, of which `problems_of` finds none.
    """
    schedule, zero = _table_of(diffusion)
    kind, keys = _KINDS[_class_of(schedule)]
    return {
        "_class_name": CLASS,
        **_DEFAULTS,
        **{key: schedule[key] for key in keys},
        "beta_schedule": kind,
        "prediction_type": _PREDICTION_TYPES[_class_of(diffusion["parameterization"])],
        "rescale_betas_zero_snr": zero,
        "algorithm_type": "dpmsolver++",
        "solver_order": 1,
        "final_sigmas_type": "zero",
        "timestep_spacing": "trailing",
        "steps_offset": 1,  # not read with trailing steps; the pipeline warns of 0
    }


def problems_of(diffusion: Mapping[str, Any]) -> list[str]:
    """What of a run's schedule and target has no place in a `scheduler_config.json`."""
    schedule, _ = _table_of(diffusion)
    problems = []
    if _class_of(schedule) not in _KINDS:
        problems.append("diffusion/schedule=linear, scaled_linear, cosine_table or zero_terminal_snr of one of them")
    else:
        wanted = {"num_steps": NUM_STEPS} | (_COSINE if _class_of(schedule) == "CosineTable" else {})
        different = [f"diffusion.schedule.{key}={value}" for key, value in wanted.items() if schedule[key] != value]
        problems += different
    if _class_of(diffusion["parameterization"]) not in _PREDICTION_TYPES:
        problems.append("diffusion/parameterization=epsilon, v or x0")
    return problems


def _table_of(diffusion: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
    """The table of betas, and whether it is rescaled to zero terminal SNR."""
    schedule = diffusion["schedule"]
    return (schedule["table"], True) if _class_of(schedule) == "ZeroTerminalSNR" else (schedule, False)


def _class_of(node: Mapping[str, Any]) -> str:
    return str(node["_target_"]).rpartition(".")[2]
