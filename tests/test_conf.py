"""Every `_target_` in conf/<group>/ lies under carrara.<group>, and its constructor reads every key.

And no option takes back what a model says.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from carrara.config import check_settings, compose
from carrara.errors import UserError

CONF = Path(__file__).parents[1] / "conf"
HYDRA_KEYS = {"defaults", "_target_", "_args_", "_partial_", "_recursive_", "_convert_"}


class FixedNoise:
    """Stands in for a component in the tests of the checks themselves."""

    def __init__(self, scale: float, *, offset: float = 0.0) -> None:
        self.value = offset + scale


def takes_anything(**options: float) -> dict[str, float]:
    return options


def targets(node: Any) -> Iterator[dict[str, Any]]:
    """The mappings under `node` that name a `_target_`, itself and nested ones too."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


def problem(node: dict[str, Any], group: str) -> str | None:
    """What is wrong with one mapping of conf/<group>/ that names a `_target_`, or None."""
    target = node["_target_"]
    if not target.startswith(f"carrara.{group}."):
        return f"{target} does not lie under carrara.{group}"
    try:
        constructor = get_object(target)
    except (ImportError, AttributeError) as error:
        return f"{target} cannot be imported: {error}"
    return unread_keys(node, constructor)


def unread_keys(node: dict[str, Any], constructor: Any) -> str | None:
    parameters = inspect.signature(constructor).parameters.values()
    for catch_all in (p for p in parameters if p.kind is p.VAR_KEYWORD):
        return f"{node['_target_']} takes **{catch_all.name}: name them"
    read = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    unread = sorted(set(node) - HYDRA_KEYS - read)
    return f"{node['_target_']} does not read {', '.join(unread)}" if unread else None


def configured() -> list[tuple[str, dict[str, Any]]]:
    """(file under conf/, mapping with a `_target_`) of all configs; interpolations stay as written."""
    return [
        (str(path.relative_to(CONF)), node)
        for path in sorted(CONF.rglob("*.yaml"))
        for node in targets(OmegaConf.to_container(OmegaConf.load(path), resolve=False))
    ]


@pytest.mark.parametrize(
    ("path", "node"), [pytest.param(*pair, id=f"{pair[0]}:{pair[1]['_target_']}") for pair in configured()]
)
def test_target_lies_in_its_group_and_reads_every_key(path: str, node: dict[str, Any]) -> None:
    assert problem(node, group=Path(path).parts[0]) is None


def test_there_are_targets_in_the_groups_that_build_something() -> None:
    groups = {Path(path).parts[0] for path, _ in configured()}
    assert {"autoencoder", "diffusion", "evaluator", "model", "network"} <= groups


def test_nested_targets_are_found() -> None:
    inner = {"_target_": "carrara.diffusion.schedule.A"}
    node = {"a": [{"b": {"_target_": "carrara.diffusion.sampler.B", "schedule": inner}}], "c": 1}
    assert [found["_target_"] for found in targets(node)] == [
        "carrara.diffusion.sampler.B",
        inner["_target_"],
    ]


@pytest.mark.parametrize("target", ["os.system", "torch.nn.Linear", "carrara.network.unet.UNet", "carrara.modelling.X"])
def test_a_target_of_another_group_is_caught(target: str) -> None:
    assert problem({"_target_": target}, group="model") == f"{target} does not lie under carrara.model"


def test_a_target_that_does_not_exist_is_caught() -> None:
    found = problem({"_target_": "carrara.network.no_such_module.UNet"}, group="network")
    assert found is not None
    assert "cannot be imported" in found


def test_a_key_that_nothing_reads_is_caught() -> None:
    node = {"_target_": "FixedNoise", "scale": 1.0, "offset": 2.0, "_partial_": True}
    assert unread_keys(node, FixedNoise) is None
    assert unread_keys({**node, "shift": 0}, FixedNoise) == "FixedNoise does not read shift"
    assert unread_keys({"_target_": "f", "a": 1.0}, takes_anything) == "f takes **options: name them"


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, node


@pytest.mark.parametrize("model", sorted(path.stem for path in (CONF / "model").glob("*.yaml")))
def test_what_a_models_yaml_says_holds(model: str):
    """An option that is composed after a model's own keys would take them back without a word."""
    said = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{model}.yaml"), resolve=False)
    assert isinstance(said, dict)
    said.pop("defaults")
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = OmegaConf.to_container(hydra.compose("train", [f"model={model}"]), resolve=False)
    found = dict(leaves(composed))
    assert {path: found[path] for path, _ in leaves(said)} == dict(leaves(said))


@pytest.mark.parametrize(
    ("model", "highest"), [("latent_unet", True), ("super_resolution", False), ("language_model", False)]
)
def test_the_best_checkpoints_are_those_with_the_least_distance_or_the_most_of_anything_else(model, highest):
    assert compose(CONF, "train", [f"model={model}"]).config["trainer"]["best_is_highest"] is highest


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.crop=centre", 'data.crop must be center or none or random, not "centre"'),
        ("model.target=dirty", 'model.target must be clean or noisy or self, not "dirty"'),
        ("model.versions=2", "model.versions must be new or two, not 2"),
    ],
)
def test_a_word_that_is_none_of_the_choices_is_answered_with_them(override, message):
    config = compose(CONF, "train", ["model=restoration", override]).config
    with pytest.raises(UserError, match=f"^{message}$"):
        check_settings(config)
