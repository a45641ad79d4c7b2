"""pyproject.toml, requirements.lock, environment.yml and Makefile say the same thing."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCK_LINES = [
    line for line in (ROOT / "requirements.lock").read_text().splitlines() if line.strip() and not line.startswith("#")
]
LOCK = {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in LOCK_LINES if "==" in line}
MAIN = [Requirement(line) for line in PROJECT["dependencies"]]
DEV = [Requirement(line) for line in PROJECT["optional-dependencies"]["dev"]]
ENVIRONMENT: list[Any] = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


@pytest.mark.parametrize("line", LOCK_LINES)
def test_lock_pins_every_package_exactly(line: str) -> None:
    assert re.fullmatch(r"[\w.-]+==[\w.]+", line), "name==version, without a build suffix such as +cpu"


def test_lock_leaves_the_cuda_packages_to_torch() -> None:
    assert [name for name in LOCK if name.startswith(("nvidia-", "cuda-", "triton"))] == []


@pytest.mark.parametrize("requirement", MAIN + DEV, ids=str)
def test_lock_satisfies_the_project(requirement: Requirement) -> None:
    assert LOCK[canonicalize_name(requirement.name)] in requirement.specifier


@pytest.mark.parametrize(
    ("name", "below"),
    [
        ("torch", "2.9.1"),  # weights_only memory corruption
        ("lightning", "2.6.5"),  # 2.6.2 and 2.6.3 stole credentials
        ("hydra-core", "1.3.7"),
        ("hydra-core", "1.4.0"),
        ("pillow", "12.2.0"),
    ],
)
def test_project_refuses_versions_known_to_be_bad(name: str, below: str) -> None:
    [requirement] = [requirement for requirement in MAIN if requirement.name == name]
    assert Version(below) not in requirement.specifier


def test_project_does_without_torchvision() -> None:
    assert "torchvision" not in LOCK


def test_environment_installs_the_lock_and_this_package() -> None:
    conda = [entry for entry in ENVIRONMENT if isinstance(entry, str)]
    [pip] = [entry["pip"] for entry in ENVIRONMENT if isinstance(entry, dict)]
    assert pip == ["-r requirements.lock", "-e ."]  # names and versions live there and nowhere else
    assert {re.split("[=<>]", entry)[0] for entry in conda} == {"python", "pip"}


def test_environment_has_a_python_the_project_accepts() -> None:
    [python] = [entry for entry in ENVIRONMENT if isinstance(entry, str) and entry.startswith("python=")]
    assert Version(python.split("=")[1]) in SpecifierSet(PROJECT["requires-python"])


def test_makefile_checks_for_the_python_the_project_wants() -> None:
    [minimum] = SpecifierSet(PROJECT["requires-python"])
    major, minor = Version(minimum.version).release[:2]
    assert f"sys.version_info >= ({major}, {minor})" in (ROOT / "Makefile").read_text()


def test_every_package_the_source_imports_is_a_dependency() -> None:
    """A package that comes only because another wants it may go away with that other's next version."""
    sources = [*(ROOT / "src").rglob("*.py"), *ROOT.glob("*.py")]
    modules: set[str] = set()
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules.update(alias.name.split(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                modules.add(node.module.split(".")[0])
    outside = modules - set(sys.stdlib_module_names) - {"carrara"}
    distributions = packages_distributions()
    declared = {canonicalize_name(requirement.name) for requirement in MAIN}
    assert "torch" in outside
    assert [
        module
        for module in sorted(outside)
        if not declared & {canonicalize_name(name) for name in distributions.get(module, [])}
    ] == []


def test_torch_is_the_locked_one() -> None:
    """The build suffix differs between machines, the version does not (make setup installs the lock)."""
    assert Version(version("torch")).public == str(LOCK[canonicalize_name("torch")])
