import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from carrara.autoencoder.kl import KL
from carrara.component import load_component, read_component, save_component
from carrara.conditioner.text import Text
from carrara.config import build, load_yaml, save_yaml
from carrara.errors import UserError

KL_NODE = {
    "_target_": "carrara.autoencoder.kl.KL",
    "latent_channels": 3,
    "downsampling": 2,
    "channels": [8, 8],
    "num_blocks": 1,
    "patch": 1,
    "kl_weight": 1e-6,
}
TEXT_NODE = {
    "_target_": "carrara.conditioner.text.Text",
    "vocab_size": 300,
    "max_length": 8,
    "width": 16,
    "depth": 1,
    "heads": 2,
}
CARD = {"fingerprint": "0123456789ab", "data": {"name": "shapes"}, "scores": {"val/psnr": 30.0}}


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, KL]:
    module = build(KL_NODE)
    module.set_statistics(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.5, 2.0]))
    save_component(tmp_path / "component", "autoencoder", KL_NODE, module, CARD)
    return tmp_path / "component", module


def test_a_component_comes_back_as_it_was(saved):
    folder, module = saved
    loaded, card = load_component(folder, "autoencoder")
    assert isinstance(loaded, KL)
    assert not loaded.training
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(loaded.encode(images), module.encode(images), rtol=0, atol=0)
    assert card.keys() == {"kind", "fingerprint", "data", "scores", "sha256"}
    assert {key: card[key] for key in CARD} == CARD
    assert sorted(path.name for path in folder.iterdir()) == [
        "card.json",
        "config.yaml",
        "weights.safetensors",
    ]
    assert os.listdir(folder.parent) == ["component"]


def test_a_vocabulary_travels_with_the_weights(tmp_path):
    module = build(TEXT_NODE)
    assert isinstance(module, Text)
    module.tokenizer.train_on(["a red circle", "a blue square"])
    save_component(tmp_path / "text", "conditioner", TEXT_NODE, module, CARD)
    loaded, _ = load_component(tmp_path / "text", "conditioner")
    captions = ["a blue circle", "ein Kreis"]
    torch.testing.assert_close(loaded(captions).tokens, module(captions).tokens, rtol=0, atol=0)


def test_a_vocabulary_that_is_not_trained_yet_can_be_saved(tmp_path):
    save_component(tmp_path / "text", "conditioner", TEXT_NODE, build(TEXT_NODE), CARD)
    loaded, _ = load_component(tmp_path / "text", "conditioner")
    assert isinstance(loaded, Text)
    assert not loaded.tokenizer.trained


@pytest.mark.parametrize(("depth", "message"), [(2, "blocks.1.* has no weights"), (0, "blocks.0.* has no place")])
def test_a_component_of_another_depth_is_refused(tmp_path, depth, message):
    save_component(tmp_path / "text", "conditioner", TEXT_NODE, build(TEXT_NODE), CARD)
    save_yaml(tmp_path / "text" / "config.yaml", {**TEXT_NODE, "depth": depth})
    with pytest.raises(UserError, match=message):
        load_component(tmp_path / "text", "conditioner")


def test_tied_weights_are_saved(tmp_path):
    module = build(TEXT_NODE)
    blocks = [m for m in module.modules() if isinstance(m, nn.Linear) and m.weight.shape == (16, 16)]
    blocks[0].weight = nn.Parameter(torch.eye(16))
    for block in blocks[1:]:
        block.weight = blocks[0].weight
    assert len(blocks) > 1
    save_component(tmp_path / "tied", "conditioner", TEXT_NODE, module, CARD)
    loaded, _ = load_component(tmp_path / "tied", "conditioner")
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)


def test_an_older_component_is_replaced(saved):
    folder, _ = saved
    other = build(KL_NODE)
    save_component(folder, "autoencoder", KL_NODE, other, {**CARD, "scores": {}})
    loaded, card = load_component(folder, "autoencoder")
    assert card["scores"] == {}
    torch.testing.assert_close(loaded.state_dict(), other.state_dict(), rtol=0, atol=0)
    assert os.listdir(folder.parent) == ["component"]


def test_what_fails_while_saving_leaves_nothing(saved, monkeypatch):
    folder, _ = saved
    before = (folder / "card.json").read_text()

    def full(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("carrara.component.save_yaml", full)
    with pytest.raises(OSError, match="no space"):
        save_component(folder, "autoencoder", KL_NODE, build(KL_NODE), {**CARD, "scores": {}})
    assert (folder / "card.json").read_text() == before
    load_component(folder, "autoencoder")
    assert os.listdir(folder.parent) == ["component"]


def test_further_files_are_written_along_or_nothing_is(tmp_path):
    def write(folder: Path) -> None:
        (folder / "more").mkdir()
        (folder / "more" / "config.json").write_text("{}")

    def fail(folder: Path) -> None:
        (folder / "more").mkdir()
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        save_component(tmp_path / "x", "autoencoder", KL_NODE, build(KL_NODE), CARD, fail)
    assert os.listdir(tmp_path) == []
    save_component(tmp_path / "x", "autoencoder", KL_NODE, build(KL_NODE), CARD, write)
    assert (tmp_path / "x" / "more" / "config.json").read_text() == "{}"
    load_component(tmp_path / "x", "autoencoder")


def test_a_card_must_say_what_it_is_of(tmp_path):
    with pytest.raises(ValueError, match="lacks data, scores"):
        save_component(tmp_path / "x", "autoencoder", KL_NODE, build(KL_NODE), {"fingerprint": ""})


def flip_a_byte(folder: Path) -> None:
    weights = folder / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)


def widen(folder: Path) -> None:
    save_yaml(folder / "config.yaml", {**KL_NODE, "channels": [16, 8]})


def retarget(folder: Path) -> None:
    save_yaml(folder / "config.yaml", {**load_yaml(folder / "config.yaml"), "_target_": "torch.load"})


def elsewhere(folder: Path) -> None:
    save_yaml(folder / "config.yaml", {**KL_NODE, "_target_": "carrara.network.unet.UNet"})


def nest(folder: Path) -> None:
    save_yaml(folder / "config.yaml", {**KL_NODE, "channels": [{"_target_": "os.system", "_args_": ["true"]}]})


def lose_weights(folder: Path) -> None:
    (folder / "weights.safetensors").unlink()


def know_more(folder: Path) -> None:
    save_yaml(folder / "config.yaml", {**load_yaml(folder / "config.yaml"), "with_attention": True})


def lose_card(folder: Path) -> None:
    (folder / "card.json").unlink()


def break_card(folder: Path) -> None:
    (folder / "card.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_byte, "sha256 differs"),
        (widen, r"encoder\.0\.weight is \(8, 3, 3, 3\), built is \(16, 3, 3, 3\)"),
        (retarget, r"'torch\.load' lies outside carrara\.autoencoder"),
        (elsewhere, r"lies outside carrara\.autoencoder"),
        (nest, r"os\.system"),
        (know_more, r"carrara\.autoencoder\.kl\.KL has no setting with_attention"),
        (lose_weights, "does not exist: export the component again"),
        (lose_card, "is no component: it has no card.json"),
        (break_card, "is damaged"),
    ],
)
def test_a_component_that_was_changed_is_refused(saved, damage, message):
    damage(saved[0])
    with pytest.raises(UserError, match=message):
        load_component(saved[0], "autoencoder")


def test_a_component_of_another_kind_is_refused(saved):
    with pytest.raises(UserError, match="of kind autoencoder, where kind evaluator is needed"):
        load_component(saved[0], "evaluator")


def test_a_component_can_be_asked_without_its_weights(saved):
    (saved[0] / "weights.safetensors").unlink()
    component = read_component(saved[0])
    assert (component.kind, component.config) == ("autoencoder", KL_NODE)
    assert component.card == json.loads((saved[0] / "card.json").read_text())


def test_a_predictor_may_hold_parts_of_several_groups(saved):
    node = {
        "_target_": "carrara.model.conditioned.Conditioned",
        "network": {"_target_": "carrara.network.unet.UNet"},
        "conditioner": {"_target_": "carrara.conditioner.text.Text"},
    }
    folder = saved[0]
    save_yaml(folder / "config.yaml", node)
    (folder / "card.json").write_text(json.dumps({"kind": "noise_predictor", "sha256": ""}))
    assert read_component(folder, "noise_predictor").config == node
    save_yaml(folder / "config.yaml", {**node, "network": {"_target_": "carrara.data.loader.Loader"}})
    with pytest.raises(UserError, match=r"carrara\.data"):
        read_component(folder, "noise_predictor")
