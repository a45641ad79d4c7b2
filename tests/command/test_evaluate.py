"""What `evaluate.py` makes of its settings before it builds anything."""

from pathlib import Path

import pytest

from carrara.command.evaluate import _checked
from carrara.config import compose
from carrara.errors import UserError

CONF = Path(__file__).parents[2] / "conf"


def checked(*overrides: str) -> dict:
    return _checked(compose(CONF, "evaluate", overrides), list(overrides))


def test_a_folder_of_pictures_is_taken(tmp_path):
    order = checked(f"images={tmp_path}")
    assert order["out"] == str(tmp_path / "scores")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "say what to score"),
        (["images=nowhere"], "images=nowhere is no folder"),
        (["images=.", "sampler=heun"], "sampler: pictures that are there are not sampled"),
        (["images=.", "num_steps=3", "guidance_scale=2"], "num_steps, guidance_scale: "),
        (["images=.", "weak=x", "likelihood_steps=3"], "weak, likelihood_steps: "),
    ],
)
def test_what_does_not_go_together_is_told(overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        checked(*overrides)
