"""The project's own configs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

CONF = Path(__file__).parents[1] / "conf"


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
