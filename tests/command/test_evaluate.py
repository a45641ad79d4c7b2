"""What `evaluate.py` makes of its settings before it builds anything."""

from pathlib import Path

import pytest

from carrara.command.evaluate import _checked
from carrara.config import compose
from carrara.errors import UserError
from carrara.scoring import set_scores

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
        (["images=.", "batch_size=0"], "batch_size must be a whole number from 1 on, not 0"),
        (["images=.", "num_images=-5"], "num_images must be a whole number from 2 on, not -5"),
        (["images=.", "trainer.accelerator=gpu", "trainer.devices=99"], "trainer.devices=99, but this machine has"),
        (["images=.", "trainer.accelerator=cpu", "trainer.precision=16-mixed"], "16-mixed is of GPUs alone"),
        (["images=.", "num_images=2.5"], "num_images must be a whole number from 2 on, not 2.5"),
    ],
)
def test_what_does_not_go_together_is_told(overrides, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        checked(*overrides)


def test_settings_are_of_all_scores_that_have_them():
    nothing = {"num_images": None, "seed": None, "batch_size": 64, "inception": None}
    config = compose(CONF, "train", ["model=vae"]).config
    set_scores(config, nothing | {"num_images": 33, "batch_size": 11})
    for name in ("score", "validation_loss"):
        assert config["callback"][name]["num_images"] == 33 and config["callback"][name]["batch_size"] == 11
    config["callback"]["score"]["seed"] = 7  # the run's own stays, unless another is said
    for said, seed in ((compose(CONF, "evaluate", ["run=x"]).config, 7), (nothing | {"seed": 3}, 3)):
        set_scores(config, said)
        assert config["callback"]["score"]["seed"] == seed
    evaluator = compose(CONF, "train", ["model=evaluator"]).config
    set_scores(evaluator, nothing | {"num_images": 33})  # of its validation loss
    assert evaluator["callback"]["validation_loss"]["num_images"] == 33
    for key, value in (("inception", "weights.pt"), ("seed", 1)):
        with pytest.raises(UserError, match=f"evaluator is not scored with {key}: leave it out"):
            set_scores(evaluator, nothing | {key: value})
