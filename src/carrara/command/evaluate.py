"""`python evaluate.py run=DIR` or `images=DIR`: scores with their fingerprint."""

import json
import logging
from datetime import datetime
from pathlib import Path

from carrara.command_line import RunFailed, quote_free_text, split_flags
from carrara.config import Composed, Config, compose, save_yaml
from carrara.errors import UserError
from carrara.launch import launch
from carrara.parts import find_component
from carrara.precision import check_machine
from carrara.run_folder import find_run, made_folder

NAME = "evaluate"
WORKER = "carrara.scoring"

_log = logging.getLogger(__name__)


def main(conf_dir: Path, argv: list[str]) -> None:
    """Scores as `argv` says, in as many processes as `trainer.devices`.

    Raises:
        UserError: a mistake in the command.
        RunFailed: scoring failed, and why has been shown.
    """
    flags, overrides = split_flags(quote_free_text(argv))
    if flags:
        print((conf_dir / f"{NAME}.yaml").read_text())
        return
    composed = compose(conf_dir, NAME, overrides)
    order = _checked(composed, overrides)
    out = made_folder(Path(order["out"]))
    save_yaml(out / "evaluate.yaml", {**order, "conf_dir": str(conf_dir.resolve())})
    code = launch(out, order["trainer"]["devices"], WORKER)
    if code:
        raise RunFailed(code)
    result = json.loads((out / "scores.json").read_text())
    for name, value in result["scores"].items():
        print(f"{name:<36} {value:.6g}")
    print(f"fingerprint {result['hash']}: {json.dumps(result['fingerprint'])}")
    for warning in result["warnings"]:
        print(f"note: {warning}")
    print(f"written to {out / 'scores.json'}")


def _checked(composed: Composed, overrides: list[str]) -> Config:
    order = composed.config
    runs_dir = Path(order["runs_dir"])
    if (order["run"] is None) == (order["images"] is None):
        raise UserError("say what to score: run=DIR, or images=DIR with part.evaluator=PART to judge")
    if order["run"] is not None:
        given = [o for o in overrides if o.lstrip("+").startswith(("data", "size", "part.evaluator"))]
        if given:
            raise UserError(f"{given[0]}: a run is scored on its own data by its own evaluator; leave it out")
        order["run"] = str(find_run(str(order["run"]), runs_dir))
        out = Path(order["run"]) / "evaluated" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    else:
        from carrara.sampling import SAMPLING_KEYS  # here: it waits for torch

        given = [key for key in (*SAMPLING_KEYS, "weak", "likelihood_steps") if order[key] is not None]
        if given:
            raise UserError(
                f"{', '.join(given)}: pictures that are there are not sampled; leave it out, or give run=DIR"
            )
        if not Path(str(order["images"])).is_dir():
            raise UserError(f"images={order['images']} is no folder")
        out = Path(order["images"]) / "scores"
    for key, least in (("batch_size", 1), ("num_images", 2)):
        if order[key] is not None and (not isinstance(order[key], int) or order[key] < least):
            raise UserError(f"{key} must be a whole number from {least} on, not {order[key]!r}")
    check_machine(order["trainer"])
    for kind, reference in order["part"].items():
        if reference is not None:
            order["part"][kind] = str(find_component(str(reference), kind, runs_dir))
    order["out"] = str(order["out"] or out)
    return order
