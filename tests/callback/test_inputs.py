"""A run goes on with the shards and parts it began with, wherever they lie, and with no others."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from carrara.callback import inputs as inputs_module
from carrara.callback.inputs import Inputs
from carrara.data.module import ShardData
from carrara.errors import UserError

PARTS = {"autoencoder": "a" * 64, "evaluator": "e" * 64}


@pytest.fixture
def shards(write_shard: Callable[..., Path]) -> list[Path]:
    return [write_shard(f"{s}.tar", range(20 * s, 20 * s + 20)) for s in range(3)]


def go_on(shards: list[Path], later: list[Path], parts: dict[str, str] | None = None, **changes: Any) -> None:
    """Saves a checkpoint with the one and loads it with the other, through a file."""
    trainer: Any = None
    folder = shards[0].parent
    checkpoint: dict[str, Any] = {}
    Inputs(data(shards), PARTS).on_save_checkpoint(trainer, trainer, checkpoint)
    torch.save(checkpoint, folder / "checkpoint")
    saved = torch.load(folder / "checkpoint", weights_only=True)
    Inputs(data(later, **changes), parts or PARTS).on_load_checkpoint(trainer, trainer, saved)


def data(shards: list[Path], **changes: Any) -> ShardData:
    cache = str(shards[0].parent / "cache")
    return ShardData("test", [str(path) for path in shards], changes.pop("resolution", 8), cache_dir=cache, **changes)


def test_shards_that_lie_elsewhere_are_the_same(shards, tmp_path):
    go_on(shards, shards)
    (tmp_path / "moved").mkdir()
    go_on(shards, [Path(shutil.copy(path, tmp_path / "moved")) for path in shards])


def test_other_shards_are_named(shards, write_shard):
    other = write_shard("other/1.tar", range(500, 520))
    new = write_shard("new.tar", range(60, 80))
    for later, said in (
        ([*shards, new], r"data\.urls: new\.tar new\. Put back .* or start a new run, without resume"),
        (shards[:1], r"data\.urls: 1\.tar and 1 more gone\."),
        ([shards[0], other, shards[2]], r"data\.urls: 1\.tar changed\."),
        ([shards[0], other, new], r"data\.urls: 1\.tar changed, 2\.tar gone, new\.tar new\."),
        ([shards[0], shards[2], shards[1]], r"data\.urls: the shards are in another order, from 1\.tar on"),
    ):
        with pytest.raises(UserError, match=f"this run cannot go on: {said}"):
            go_on(shards, later)


def test_what_is_taken_of_the_shards_counts(shards):
    for changes in ({"val_samples": 5}, {"resolution": 16}, {"crop": "none"}):
        with pytest.raises(UserError, match="other samples of the shards are taken"):
            go_on(shards, shards, **changes)
    with pytest.raises(UserError, match=r"data\.val_urls: 1\.tar and 1 more gone"):
        go_on(shards, shards, val_urls=[str(shards[0])])


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"later": 2}, "data.urls is not"), ({"parts": {**PARTS, "evaluator": "b" * 64}}, "part.evaluator is not")],
)
def test_a_machine_with_other_contents_is_named_before_the_first_step(shards, monkeypatch, changes, said):
    """Each rank would deal out an order of its own: samples lost, others seen twice."""
    trainer: Any = None
    sent: list[dict[str, str]] = []

    def gather(trainer, value):
        sent.append(value)
        return [*sent]

    monkeypatch.setattr(inputs_module, "gather", gather)
    Inputs(data(shards), PARTS).on_fit_start(trainer, trainer)
    Inputs(data(shards), PARTS).on_fit_start(trainer, trainer)
    other = Inputs(data(shards[: changes.get("later")]), changes.get("parts", PARTS))
    with pytest.raises(UserError, match=f"{said} the same on all machines: rank 2 finds other contents"):
        other.on_fit_start(trainer, trainer)


def test_other_parts_are_named(shards):
    for later, said in (
        ({**PARTS, "autoencoder": "b" * 64}, r"part\.autoencoder has other weights .* bbbbbbbbbbbb….* aaaaaaaaaaaa…"),
        ({"autoencoder": "a" * 64}, r"part\.evaluator has other weights .*none"),
        ({**PARTS, "classifier": "c" * 64}, r"part\.classifier has other weights .*none"),
    ):
        with pytest.raises(UserError, match=said):
            go_on(shards, shards, later)
