"""What an `auto` part is trained as: the model of that name on the run's data, with what the two have to share."""

from pathlib import Path
from typing import Any

from carrara import run_folder
from carrara.config import Composed, compose
from carrara.config_check import flatten
from carrara.errors import UserError

AUTO = "auto"

_CARRIED = tuple(
    f"trainer.{key}" for key in run_folder.OF_THE_MACHINE if not key.startswith(("keep_", "best_"))
)  # of a part's checkpoints the last one matters
_KINDS = {
    "small_pictures": ("noise_predictor",),
    "prior": ("noise_predictor", "generator"),  # diffusion, autoregression
    "clip": ("evaluator",),
}
_SHARED = {  # settings that a part has from the run that needs it, besides its own architecture's
    # captions are read alike, and one judges both
    "small_pictures": ("conditioner", "language_model", "part.language_model", "part.evaluator"),
    "prior": ("clip", "part.clip"),
}


def kinds_of(part: str) -> tuple[str, ...]:
    """What kinds of component a part's name asks for: one, except where several models can be it."""
    return _KINDS.get(part, (part,))


def compose_part(conf_dir: Path, composed: Composed, kind: str) -> Composed:
    """`model=<kind>` on the run's data and size, with its settings of that architecture and of the machine."""
    config = composed.config
    nodes: dict[str, Any] = {key: config[key] for key in ("data", "runs_dir", "logger") if key in config}
    if kind in config:
        nodes[kinds_of(kind)[0]] = config[kind]
    known = dict(flatten(config))
    nodes |= {key: known[key] for key in _SHARED.get(kind, ()) if key in known}
    if composed.size:
        nodes["size"] = composed.size
    if "seed" in nodes.get("data", {}):
        nodes["data"] = {**nodes["data"], "seed": "${seed}"}  # a part has its own seed
    for key in _CARRIED:
        nodes[key] = config["trainer"][key.removeprefix("trainer.")]
    groups = ("data", "size", "conditioner") if "conditioner" in _SHARED.get(kind, ()) else ("data", "size")
    choices = [f"{group}={composed.choices[group]}" for group in groups if group in composed.choices]
    try:
        return compose(conf_dir, "train", [f"model={kind}", *choices], nodes)
    except UserError as mistake:
        raise UserError(
            f"part.{kind}={AUTO}: python train.py model={kind} says {mistake}; its settings are "
            f"size.{kind if kind in composed.size else kinds_of(kind)[0]}.… here"
        ) from None
