"""What the experiments share: a run is trained once, a score computed once; both are taken up again where they stopped.

Run them from the repository's folder: `python -m experiments.objectives`.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
RUNS = Path("runs")


def trained(experiment: str, label: str, overrides: Sequence[str]) -> Path:
    """The folder of the run that `train.py` with these overrides makes; it is trained only if it is not there.

    Runs lie in runs/<experiment>/<label>-<hash of the overrides>; the parts that they need are those of all other runs.
    """
    place = RUNS / experiment / f"{label}-{_hash(list(overrides))}"
    place.mkdir(parents=True, exist_ok=True)
    (RUNS / "components").mkdir(exist_ok=True)
    if not (place / "components").is_symlink():
        (place / "components").symlink_to(os.path.relpath(RUNS / "components", place))
    finished = _finished(place)
    if not finished:
        print(f"== {experiment}/{label}", flush=True)
        command = [sys.executable, str(ROOT / "train.py"), *overrides, f"runs_dir={place}", "resume=auto"]
        subprocess.run(command, check=True)
        finished = _finished(place)
    return finished[-1]


def _finished(place: Path) -> list[Path]:
    """The runs there that came to their end, the newest last; the parts that all runs share are none of them."""
    return [path.parent for path in sorted(place.glob("*/*/scores.json")) if path.parts[-3] != "components"]


def scores(run: Path, num_images: int, order: Mapping[str, Any]) -> dict[str, float]:
    """Scores of a run sampled in another way, by `evaluate.py`: order has keys of its own, such as num_steps."""
    name = _hash([num_images, dict(order)])
    out = run / "experiment" / name
    if not (out / "scores.json").is_file():
        overrides = [f"{key}={value}" for key, value in {**order, "num_images": num_images}.items()]
        command = [sys.executable, str(ROOT / "evaluate.py"), f"run={run}", *overrides, f"out={out}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return last_scores(out)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def last_scores(folder: Path) -> dict[str, float]:
    """Of a run, or of an evaluation."""
    return json.loads((folder / "scores.json").read_text())["scores"]


def spread(values: Sequence[float], digits: int = 3) -> str:
    """`mean ± standard deviation` of the seeds."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as README has it."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
