from dataclasses import fields, replace
from typing import Any

import pytest

from carrara.metric.fingerprint import ScoreFingerprint, few_images_warning, score_fingerprint

FIELDS = ScoreFingerprint(
    extractors={"inception": "f58c"},
    data="d1",
    num_real=1000,
    num_generated=1000,
    resize="inside",
    sampling={"sampler": {"_target_": "heun", "levels": [1, 2]}, "num_steps": 18, "guidance": {"scale": 7}},
    ema=True,
    seed=0,
    precision="bf16-mixed",
)


def test_is_the_same_in_every_process_and_version():
    digest, values = score_fingerprint(FIELDS)
    assert digest == "880830fbce35"
    assert values == vars(FIELDS)
    same = {"sampler": {"_target_": "heun", "levels": [1.0, 2]}, "num_steps": 18, "guidance": {"scale": 7.0}}
    assert score_fingerprint(replace(FIELDS, sampling=same))[0] == digest
    other = {**same, "guidance": {"scale": 7.5}}
    assert score_fingerprint(replace(FIELDS, sampling=other))[0] != digest


@pytest.mark.parametrize("name", [field.name for field in fields(ScoreFingerprint)])
def test_every_field_counts(name):
    others: dict[type, Any] = {str: "other", dict: {"inception": "other"}}
    other = others.get(type(getattr(FIELDS, name)), 3)
    assert score_fingerprint(replace(FIELDS, **{name: other}))[0] != score_fingerprint(FIELDS)[0]


def test_a_folder_of_images_has_no_sampler():
    folder = replace(FIELDS, sampling=None, ema=None, seed=None)
    assert score_fingerprint(folder)[1]["sampling"] is None


def test_few_images_are_warned_of():
    warning = few_images_warning("val/fid_inception", 500)
    assert warning is not None
    assert "val/fid_inception" in warning
    assert "500" in warning
    assert few_images_warning("val/fid_inception", 10_000) is None
