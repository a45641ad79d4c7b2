"""Imports go down only: the layers of the house, checked on the source.

A *unit* is a package or a module right under carrara. ALLOWED says, for each, which other units it may
import; within a unit anything goes. A unit that is missing from the table is a violation too, so a new one
is given its layer here.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "carrara"

FOUNDATION = {"divergence", "errors", "keyed_random", "signals"}
PARTS = {"autoencoder", "classifier", "conditioner", "evaluator", "language_model"}  # siblings: none imports another
BELOW_PIPELINE = FOUNDATION | {"corruption", "diffusion", "network", "data", "metric", "model"} | PARTS
BELOW_COMMANDS = {"component", "config", "published", "pipeline", "callback", "search"}
COMMANDS = {
    "architecture", "build", "cache_use", "command", "command_line", "launch", "parts", "plan", "precision", "rank",
    "report", "run_folder", "sampling", "score_card", "scoring", "start", "worker", "world",
}  # fmt: skip

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "signals": set(),
    "keyed_random": set(),
    "divergence": set(),
    "diffusion": set(),
    "corruption": FOUNDATION,
    "network": FOUNDATION,
    "data": FOUNDATION,
    "metric": FOUNDATION,
    **{part: FOUNDATION | {"network"} for part in PARTS},
    "model": FOUNDATION | PARTS | {"corruption", "network", "diffusion"},
    "config": FOUNDATION,
    "component": FOUNDATION | {"config"},  # a part on disk holds a config and is built from it
    "published": FOUNDATION | {"autoencoder", "conditioner", "network", "config", "component"},
    "search": FOUNDATION | {"data", "evaluator"},
    "pipeline": FOUNDATION | PARTS | {"network", "diffusion", "model", "component"},
    "callback": BELOW_PIPELINE | {"component", "pipeline"},
    **dict.fromkeys(COMMANDS, BELOW_PIPELINE | COMMANDS | BELOW_COMMANDS),
}
FAMILIES = ("report", "config", "parts")  # units of several files: report.py, report_chart.py, …
OUTSIDE = {"diffusion": {"torch"}}  # besides the standard library; a unit that is not named may import any package


def unit_of(module: str) -> str:
    """The unit of a dotted name under carrara; report_chart, report_score, … are files of the unit report."""
    unit = module.split(".")[1]
    return next((family for family in FAMILIES if unit.startswith(f"{family}_")), unit)


def imported(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of imports, in functions and under TYPE_CHECKING too; relative ones resolved."""
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from carrara import errors` imports carrara.errors; deeper names do not change the unit.
            names = [f"{origin}.{alias.name}" for alias in node.names] if origin == "carrara" else [origin]
            yield from ((node.lineno, name) for name in names)


def violations(source: Path) -> list[str]:
    """One line for each import under `source` (a folder named carrara) that the tables above do not allow."""
    found = []
    for path in sorted(source.rglob("*.py")):
        relative = path.relative_to(source)
        is_package = path.name == "__init__.py"
        module = ".".join(["carrara", *(relative.parent if is_package else relative.with_suffix("")).parts])
        unit = unit_of(module) if module != "carrara" else "__init__"
        if unit not in ALLOWED and unit != "__init__":
            found.append(f"{relative}: {unit} has no layer; give it one in tests/test_imports.py")
            continue
        for line, name in imported(ast.parse(path.read_text()), module, is_package):
            top = name.split(".")[0]
            if top == "carrara":
                target = unit_of(name) if name != "carrara" else unit
                fine = target == unit or target in ALLOWED.get(unit, set())
            else:
                target = top
                fine = top in sys.stdlib_module_names or unit not in OUTSIDE or top in OUTSIDE[unit]
            if not fine:
                found.append(f"{relative}:{line}: {unit} may not import {target}")
    return found


def test_imports_go_down_only() -> None:
    assert violations(SOURCE) == []


def test_linter_reads_the_source() -> None:
    assert (SOURCE / "errors.py").is_file()
    trees = {path: ast.parse(path.read_text()) for path in SOURCE.rglob("*.py")}
    assert sum(1 for tree in trees.values() for _ in imported(tree, "carrara.x", is_package=False)) > 50


def test_tables_have_no_cycle_between_layers() -> None:
    for unit, below in ALLOWED.items():
        if unit not in COMMANDS:  # the commands' modules are one layer and may use each other
            assert [other for other in below if unit in ALLOWED[other]] == []


@pytest.mark.parametrize(
    ("path", "code", "violation"),
    [
        ("diffusion/schedule.py", "import numpy as np", "diffusion may not import numpy"),
        ("diffusion/schedule.py", "from carrara.errors import UserError", "diffusion may not import errors"),
        ("network/unet.py", "from carrara.model.diffusion import Diffusion", "network may not import model"),
        ("network/unet.py", "from ..data.shapes import Scene", "network may not import data"),
        ("conditioner/text.py", "import carrara.autoencoder.kl", "conditioner may not import autoencoder"),
        ("conditioner/__init__.py", "from .. import evaluator", "conditioner may not import evaluator"),
        (
            "metric/frechet.py",
            "def f():\n    from carrara import evaluator",
            "metric may not import evaluator",
        ),
        (
            "data/loader.py",
            "if TYPE_CHECKING:\n    from carrara.config import check",
            "data may not import config",
        ),
        ("model/diffusion.py", "from carrara.callback.ema import EMA", "model may not import callback"),
        ("model/diffusion.py", "from carrara.component import load", "model may not import component"),
        ("pipeline/text_to_image.py", "from carrara.launch import launch", "pipeline may not import launch"),
        ("errors.py", "from carrara import report_chart", "errors may not import report"),
        ("__init__.py", "from carrara.data import loader", "__init__ may not import data"),
    ],
)
def test_linter_catches_a_planted_violation(tmp_path: Path, path: str, code: str, violation: str) -> None:
    planted = tmp_path / "carrara" / path
    planted.parent.mkdir(parents=True, exist_ok=True)
    planted.write_text(code + "\n")
    assert [line.split(": ", 1)[1] for line in violations(tmp_path / "carrara")] == [violation]


def test_linter_wants_a_layer_for_a_new_unit(tmp_path: Path) -> None:
    (tmp_path / "carrara").mkdir()
    (tmp_path / "carrara" / "utils.py").write_text("")
    assert violations(tmp_path / "carrara") == ["utils.py: utils has no layer; give it one in tests/test_imports.py"]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        (
            "diffusion/objective.py",
            "import math\nimport torch\nfrom carrara.diffusion.schedule import NoiseSchedule",
        ),
        ("diffusion/objective.py", "from . import schedule\nfrom .schedule import NoiseSchedule"),
        (
            "model/diffusion.py",
            "from carrara.diffusion import objective\nfrom carrara.network.unet import UNet",
        ),
        ("callback/evaluation.py", "from carrara.metric.frechet import FrechetDistance"),
        ("command/train.py", "from carrara import config, launch\nimport lightning"),
    ],
)
def test_linter_lets_the_rest_pass(tmp_path: Path, path: str, code: str) -> None:
    allowed = tmp_path / "carrara" / path
    allowed.parent.mkdir(parents=True)
    allowed.write_text(code + "\n")
    assert violations(tmp_path / "carrara") == []
