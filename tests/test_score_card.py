from copy import deepcopy
from typing import Any

import pytest

from carrara.component import save_component
from carrara.metric.extractor import INCEPTION_SHA256
from carrara.score_card import folder_card, score_card
from tests.tiny import clip

F32 = "32-true"

NODE = {
    "_target_": "carrara.evaluator.clip.CLIP",
    "resolution": 8,
    "patch": 4,
    "image_width": 16,
    "image_depth": 1,
    "vocab_size": 300,
    "max_length": 12,
    "text_width": 16,
    "text_depth": 1,
    "heads": 2,
    "embedding_width": 16,
}
SCORES = {"val/fd_evaluator": 3.0, "val/clip_score": 20.0, "val/num_images": 128.0, "val_seen/num_images": 64.0}


@pytest.fixture
def config(tmp_path) -> dict[str, Any]:
    card = {"fingerprint": "f", "data": {}, "scores": {}}
    save_component(tmp_path / "evaluator", "evaluator", NODE, clip(), card)
    return {
        "part": {"evaluator": str(tmp_path / "evaluator")},
        "data": {"resolution": 32, "crop": "center"},
        "callback": {"score": {"seed": 0}},
        "diffusion": {
            "sampler": {"_target_": "carrara.diffusion.sampler.Euler"},
            "spacing": {"_target_": "carrara.diffusion.spacing.Uniform"},
            "guidance": {"_target_": "carrara.diffusion.guidance.Guidance", "scale": 3.0, "rescale": 0.0},
            "thresholding": {"_target_": "carrara.diffusion.thresholding.Unbounded"},
            "num_steps": 12,
            "schedule": {"_target_": "carrara.diffusion.schedule.Flow"},
        },
    }


def test_the_card_says_what_the_scores_depend_on(config):
    card = score_card(config, "d", F32, SCORES)
    assert card["scores"] == SCORES and len(card["hash"]) == 12
    assert card["num_images"] == {"val/num_images": 128, "val_seen/num_images": 64}
    facts = card["fingerprint"]
    assert facts["sampling"]["num_steps"] == 12 and facts["sampling"]["guidance"]["scale"] == 3.0
    assert facts["seed"] == 0 and facts["ema"] and facts["sampling"]["weak"] is None
    assert "Euler" in facts["sampling"]["sampler"]["_target_"] and facts["num_real"] == facts["num_generated"] == 128
    assert len(facts["extractors"]["evaluator"]) == 64 and facts["data"] == "d" and facts["resize"] == "32 center"


def changed(config: dict[str, Any], *path: str, value: Any) -> dict[str, Any]:
    other = deepcopy(config)
    node = other
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return other


def test_other_ways_to_sample_are_other_fingerprints(config):
    first = score_card(config, "d", F32, SCORES)["hash"]
    others = [
        changed(config, "diffusion", "num_steps", value=30),
        changed(config, "diffusion", "spacing", "_target_", value="carrara.diffusion.spacing.Karras"),
        changed(config, "diffusion", "thresholding", "_target_", value="carrara.diffusion.thresholding.Static"),
        changed(config, "diffusion", "guidance", "rescale", value=0.7),
        changed(config, "callback", "score", "seed", value=1),
        changed(config, "diffusion", "guidance", "scale", value=1.0),
        changed(config, "diffusion", "sampler", "_target_", value="carrara.diffusion.sampler.Heun"),
        changed(config, "diffusion", "sampler", "eta", value=0.5),
        changed(config, "data", "resolution", value=64),
        changed(config, "data", "crop", value="none"),
    ]
    hashes = [score_card(other, "d", F32, SCORES)["hash"] for other in others]
    assert len({first, *hashes}) == 11
    assert score_card(config, "d", "bf16-mixed", SCORES)["hash"] not in {first, *hashes}
    assert score_card(config, "d", F32, SCORES, weak="w")["hash"] not in {first, *hashes}
    assert score_card(config, "d", F32, SCORES, likelihood_steps=20)["hash"] not in {first, *hashes}
    trained_otherwise = changed(config, "diffusion", "schedule", "_target_", value="carrara.diffusion.schedule.Cosine")
    assert score_card(trained_otherwise, "d", F32, SCORES)["hash"] == first  # that is the model's, not the score's
    assert score_card(config, "d", F32, SCORES | {"val/num_images": 5000.0})["hash"] != first
    assert (
        score_card(deepcopy(config), "d", F32, SCORES | {"val/fd_evaluator": 1.0})["hash"] == first
    )  # not of the values
    assert score_card(config | {"name": "renamed"}, "d", F32, SCORES)["hash"] == first


def test_another_evaluator_is_another_fingerprint(config, tmp_path):
    card = {"fingerprint": "f", "data": {}, "scores": {}}
    save_component(tmp_path / "other", "evaluator", NODE, clip(), card)  # other weights
    other = changed(config, "part", "evaluator", value=str(tmp_path / "other"))
    assert score_card(other, "d", F32, SCORES)["hash"] != score_card(config, "d", F32, SCORES)["hash"]


def test_other_data_and_inception_are_other_fingerprints(config):
    first = score_card(config, "d", F32, SCORES)
    assert score_card(config, "other", F32, SCORES)["hash"] != first["hash"]
    other = score_card(changed(config, "callback", "score", "inception", value="inception.pt"), "d", F32, SCORES)
    assert other["fingerprint"]["extractors"]["inception"] == INCEPTION_SHA256
    assert "inception" not in first["fingerprint"]["extractors"]


def test_few_images_are_warned_of(config):
    assert any(
        "val/fd_evaluator is over 128 images" in line for line in score_card(config, "d", F32, SCORES)["warnings"]
    )
    many = SCORES | {"val/num_images": 20_000.0}
    assert score_card(config, "d", F32, many)["warnings"] == []
    assert score_card(config, "d", F32, {"val/loss": 1.0})["warnings"] == []  # no distance, nothing to warn of


def test_a_run_that_samples_nothing_has_a_card_too():
    config = {"data": {"resolution": 32, "crop": "center"}, "callback": {"score": {}}, "part": {}}
    facts = score_card(config, "d", F32, {"val/psnr": 30.0, "val/num_images": 8.0})["fingerprint"]
    assert facts["sampling"] is None and facts["extractors"] == {}


def test_a_folder_of_pictures_has_a_card(config):
    card = folder_card({"fd_evaluator": 1.0}, {"evaluator": "hash"}, "d", F32, 100, 50, 32)
    assert card["num_images"] == {"num_real": 100, "num_generated": 50}
    assert card["fingerprint"]["sampling"] is None and "over 50 images" in card["warnings"][0]
    assert folder_card({"fd_evaluator": 1.0}, {"evaluator": "hash"}, "d", F32, 100, 60, 32)["hash"] != card["hash"]
