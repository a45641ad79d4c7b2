"""The text encoder in a published pipeline's folder, read as Stable Diffusion reads it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from carrara.conditioner.pretrained import Pretrained
from carrara.errors import UserError
from tests.published.pipelines import LENGTH, WIDTH, relative_error, text_encoder, tokenizer

CAPTIONS = ["a red disc above a blue square by the sea", "stone", ""]
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "Stable Diffusion 1": {
        "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
        "vocab_size": 49408, "max_position_embeddings": 77,
    },
    "Stable Diffusion 2": {  # the last of 24 layers is left out of the published file
        "hidden_size": 1024, "num_hidden_layers": 23, "num_attention_heads": 16, "intermediate_size": 4096,
        "vocab_size": 49408, "max_position_embeddings": 77, "hidden_act": "gelu", "projection_dim": 512,
    },
}  # fmt: skip


def saved(folder: Path, name: str) -> transformers.CLIPTextModel:
    model = text_encoder(**SIZES[name])
    model.save_pretrained(folder / "text_encoder")
    tokenizer().save_pretrained(folder / "tokenizer")
    return model


@pytest.mark.parametrize(
    "name",
    [
        "tiny",
        pytest.param("Stable Diffusion 1", marks=pytest.mark.slow),
        pytest.param("Stable Diffusion 2", marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_it_answers_as_theirs_does(tmp_path, name):
    model = saved(tmp_path, name)
    width, length = model.config.hidden_size, model.config.max_position_embeddings
    ids = tokenizer()(CAPTIONS, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    expected = model(ids).last_hidden_state  # no mask: as its pipeline calls it
    ours = Pretrained(str(tmp_path), width, length, "max_length")
    found = ours(CAPTIONS)
    assert found.tokens.shape == (3, length, width) and found.mask.all()
    assert relative_error(found.tokens, expected) < 1e-4
    ends = ids.ne(tokenizer().eos_token_id).sum(1)
    assert relative_error(found.pooled, expected[torch.arange(3), ends]) < 1e-4  # of the end, not of the padding
    ours.save(tmp_path / "again" / "text_encoder", tmp_path / "again" / "tokenizer")
    again = transformers.CLIPTextModel.from_pretrained(tmp_path / "again" / "text_encoder")
    assert relative_error(again(ids).last_hidden_state, expected) < 1e-4


def test_what_padding_says_is_part_of_what_a_cache_depends_on(tmp_path):
    saved(tmp_path, "tiny")
    longest, whole = (Pretrained(str(tmp_path), WIDTH, LENGTH, padding) for padding in ("longest", "max_length"))
    assert longest.facts() != whole.facts() and longest.facts() | {"padding": "max_length"} == whole.facts()
    assert longest(["stone"]).tokens.shape[1] < LENGTH


@pytest.mark.parametrize("inner", ["", "text_encoder"])
def test_a_pipeline_of_the_hub_is_read_too(tmp_path, monkeypatch, inner):
    """From the cache, as it lies there after it has been downloaded."""
    if inner:
        saved(tmp_path / "local", "tiny")
        folder = str(tmp_path / "local" / inner)
    else:
        cache = tmp_path / "models--owner--name"
        saved(cache / "snapshots" / ("0" * 40), "tiny")
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("0" * 40)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        folder = "owner/name"
    assert Pretrained(folder, WIDTH, LENGTH, "max_length").width == WIDTH


def test_a_pipeline_without_its_tokenizer_is_refused(tmp_path):
    saved(tmp_path, "tiny")
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="it has no tokenizer"):
        Pretrained(str(tmp_path), WIDTH, LENGTH)


def test_an_unknown_padding_is_refused(tmp_path):
    saved(tmp_path, "tiny")
    with pytest.raises(UserError, match=r"conditioner\.padding=shortest is not known; it is longest or max_length"):
        Pretrained(str(tmp_path), WIDTH, LENGTH, "shortest")
