"""Published folders become components, once; everything that is wrong with one is a line that names file and field."""

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from huggingface_hub.errors import HTTPError
from safetensors.torch import load_file, save_file

from carrara.autoencoder.base import Autoencoder
from carrara.component import CARD, load_component, read_component
from carrara.errors import UserError
from carrara.network import hugging_face
from carrara.network.conditioning import Conditioning
from carrara.parts import find_component
from carrara.published import folder as published_folder
from tests.published.pipelines import change_json, relative_error, save_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StableDiffusionPipeline]:
    folder = tmp_path_factory.mktemp("published") / "pipeline"
    return folder, save_pipeline(folder)


@pytest.fixture
def copied(saved: tuple[Path, StableDiffusionPipeline], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved[0], tmp_path / "copied"))


@pytest.mark.parametrize("inner", ["", "vae"])
@torch.no_grad()
def test_an_auto_encoder_is_imported_once(saved, tmp_path, inner):
    folder, theirs = saved
    found = find_component(str(folder / inner), "autoencoder", tmp_path)
    assert found.parent == tmp_path / "components" / "published"
    ours, card = load_component(found, "autoencoder")
    assert isinstance(ours, Autoencoder)
    images = torch.rand(1, 3, 16, 16) * 2 - 1
    expected = theirs.vae.encode(images).latent_dist.mean * theirs.vae.config.scaling_factor
    assert relative_error(ours.encode(images), expected) < 1e-4
    digest = hashlib.sha256((folder / "vae" / WEIGHTS).read_bytes()).hexdigest()
    assert card["source"] == {"name": str(folder / inner), "sha256": digest}
    written = (found / CARD).stat().st_mtime_ns
    assert find_component(str(folder), "autoencoder", tmp_path) == found
    assert (found / CARD).stat().st_mtime_ns == written
    assert find_component(str(found), "autoencoder", tmp_path) == found  # and is a component like any other


@torch.no_grad()
def test_a_network_is_imported_with_what_it_was_trained_with(saved, tmp_path):
    folder, theirs = saved
    found = find_component(str(folder), "network", tmp_path)
    network, card = load_component(found, "network")
    assert card["diffusion"]["schedule"]["_target_"] == "carrara.diffusion.schedule_table.ScaledLinear"
    x, tokens = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 32)
    answer = network(x, torch.tensor([301.0]), Conditioning(tokens, torch.ones(1, 5, dtype=torch.bool), tokens[:, 0]))
    assert relative_error(answer, theirs.unet(x, 300, tokens).sample) < 1e-4


def test_another_scale_of_the_same_weights_is_another_component(copied, tmp_path):
    first = find_component(str(copied), "autoencoder", tmp_path)
    change_json(copied / "vae" / "config.json", scaling_factor=0.5)
    second = find_component(str(copied), "autoencoder", tmp_path)
    assert first != second
    scales = [load_component(path, "autoencoder")[0].state_dict()["latent_std"][0].item() for path in (first, second)]
    assert scales == pytest.approx([1 / 0.18215, 2.0])


def test_shards_and_half_precision_are_read(saved, copied, tmp_path):
    whole = load_component(find_component(str(copied), "autoencoder", tmp_path), "autoencoder")[0].state_dict()
    saved[1].vae.save_pretrained(copied / "vae", max_shard_size="500KB")
    (copied / "vae" / WEIGHTS).unlink()
    assert len(list((copied / "vae").glob("*.safetensors"))) > 1
    again = load_component(find_component(str(copied), "autoencoder", tmp_path), "autoencoder")[0].state_dict()
    assert all(torch.equal(again[key], value) for key, value in whole.items())
    for file in (copied / "vae").glob("diffusion*"):
        file.unlink()
    half = {key: value.half() for key, value in load_file(saved[0] / "vae" / WEIGHTS).items()}
    save_file(half, copied / "vae" / "diffusion_pytorch_model.fp16.safetensors")
    half_read = load_component(find_component(str(copied), "autoencoder", tmp_path), "autoencoder")[0].state_dict()
    assert all(value.dtype == torch.float32 for value in half_read.values())
    assert all(torch.allclose(half_read[key], value, atol=1e-3) for key, value in whole.items())


def pickled(folder: Path) -> None:
    (folder / "vae" / WEIGHTS).rename(folder / "vae" / "diffusion_pytorch_model.bin")


def missing(folder: Path) -> None:
    _edit(folder, lambda state: state.pop("decoder.conv_in.bias"))


def extra(folder: Path) -> None:
    _edit(folder, lambda state: state.update({"decoder.conv_in.scale": torch.ones(1)}))


def narrow(folder: Path) -> None:
    _edit(folder, lambda state: state.update({"quant_conv.bias": torch.ones(3)}))


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / "vae" / WEIGHTS)
    change(state)
    save_file(state, folder / "vae" / WEIGHTS)


def no_tensors(folder: Path) -> None:
    (folder / "vae" / WEIGHTS).write_text("none")


def shard_lost(folder: Path) -> None:
    (folder / "vae" / WEIGHTS).unlink()
    (folder / "vae" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "lost.safetensors"}}))


def shard_elsewhere(folder: Path) -> None:
    (folder / "vae" / WEIGHTS).unlink()
    (folder / "vae" / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))


def damaged_config(folder: Path) -> None:
    (folder / "vae" / "config.json").write_text("{")


def other_class(folder: Path) -> None:
    change_json(folder / "vae" / "config.json", _class_name="VQModel")


def without_vae(folder: Path) -> None:
    shutil.rmtree(folder / "vae")


def unknown_field(folder: Path) -> None:
    change_json(folder / "vae" / "config.json", swirl=1)


def a_text_for_a_number(folder: Path) -> None:
    change_json(folder / "vae" / "config.json", layers_per_block="2")


def no_scale(folder: Path) -> None:
    change_json(folder / "vae" / "config.json", scaling_factor=0)


def a_text_for_a_shift(folder: Path) -> None:
    change_json(folder / "vae" / "config.json", shift_factor="x")


def less_than_nothing(folder: Path) -> None:
    change_json(folder / "vae" / "config.json", latent_channels=-4)


def unknown_value(folder: Path) -> None:
    change_json(folder / "vae" / "config.json", act_fn="gelu")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (pickled, rf"vae has no {WEIGHTS}; pickled weights \(\.bin\) are not read"),
        (missing, rf"vae/{WEIGHTS} and the config.json .*decoder.conv_in.bias is missing"),
        (extra, rf"vae/{WEIGHTS} and the config.json .*decoder.conv_in.scale has no place"),
        (narrow, rf"vae/{WEIGHTS} and the config.json .*quant_conv.bias is \(3,\), and the config makes it \(8,\)"),
        (no_tensors, rf"vae/{WEIGHTS} is no safetensors file"),
        (shard_lost, "lost.safetensors is missing"),
        (shard_elsewhere, "weight_map names no files"),
        (damaged_config, r"vae/config.json cannot be read"),
        (other_class, r"vae/config.json: _class_name is VQModel, where a AutoencoderKL is needed"),
        (without_vae, r"there is no .*vae/config.json"),
        (unknown_field, r"vae/config.json: the field swirl is not known"),
        (a_text_for_a_number, r"vae/config.json: nothing can be built of it"),
        (no_scale, r"vae/config.json: scaling_factor is 0; it must be positive"),
        (a_text_for_a_shift, r"vae/config.json: shift_factor is x; it must be a number"),
        (less_than_nothing, r"vae/config.json: nothing can be built of it"),
        (unknown_value, r"vae/config.json: act_fn is gelu; only silu"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(copied, tmp_path, damage, message):
    damage(copied)
    with pytest.raises(UserError, match=message) as mistake:
        find_component(str(copied), "autoencoder", tmp_path)
    assert "\n" not in str(mistake.value)
    assert not list((tmp_path / "components").rglob(CARD))


def test_a_scheduler_that_ours_cannot_be_is_named(copied, tmp_path):
    change_json(copied / "scheduler" / "scheduler_config.json", prediction_type="flow_prediction")
    with pytest.raises(UserError, match=r"scheduler/scheduler_config.json: prediction_type is flow_prediction"):
        find_component(str(copied), "network", tmp_path)


@pytest.mark.parametrize(
    ("reference", "kind", "message"),
    [
        ("nowhere", "autoencoder", r"part\.autoencoder=nowhere: there is no such folder"),
        ("{folder}/scheduler", "autoencoder", r"part\.autoencoder=.*scheduler: it has no finished component"),
        ("{folder}/unet", "autoencoder", r"config.json: _class_name is UNet2DConditionModel, where a AutoencoderKL"),
        ("{folder}", "evaluator", r"part\.evaluator=.*: it has no finished component"),
        ("owner/no-such-model", "autoencoder", r"part\.autoencoder=owner/no-such-model: .*hf download owner/no-such"),
    ],
)
def test_a_wrong_reference_is_named(saved, tmp_path, reference, kind, message):
    with pytest.raises(UserError, match=message):
        find_component(reference.format(folder=saved[0]), kind, tmp_path)


@pytest.mark.parametrize("reference", ["owner/name", "owner/name/vae"])
def test_of_the_hub_only_what_is_needed_is_fetched(saved, tmp_path, monkeypatch, reference):
    """The hub is a folder here, from which the files that match are copied."""
    hub, cache, asked = saved[0], tmp_path / "cache", []

    def fetch(name: str, patterns: list[str]) -> Path:
        assert name == "owner/name"
        for file in (p for p in hub.rglob("*") if p.is_file()):
            relative = file.relative_to(hub)
            if any(Path(pattern) == relative for pattern in patterns):
                asked.append(relative.as_posix())
                (cache / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, cache / relative)
        return cache

    monkeypatch.setattr(published_folder, "fetch", fetch)
    found = find_component(reference, "autoencoder", tmp_path)
    assert read_component(found).card["source"]["name"] == reference
    expected = {"model_index.json", "vae/config.json", f"vae/{WEIGHTS}", "scheduler/scheduler_config.json"}
    assert set(asked) == expected
    assert not set(asked) & {"unet/config.json"}


def test_without_a_hub_what_to_do_is_said(monkeypatch):
    with pytest.raises(hugging_face.NotFetched, match="hf download owner/name"):
        hugging_face.fetch("owner/name", ["config.json"])


@pytest.mark.parametrize("failure", [HTTPError("a proxy refused"), ConnectionError("reset")])
def test_whatever_breaks_on_the_way_to_the_hub_is_one_line(monkeypatch, failure):
    monkeypatch.setattr("huggingface_hub.snapshot_download", raising(failure))
    with pytest.raises(hugging_face.NotFetched, match="hf download owner/name"):
        hugging_face.fetch("owner/name", ["config.json"])


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), PermissionError("the cache")])
def test_what_is_wrong_with_the_disk_is_not_blamed_on_the_hub(monkeypatch, failure):
    monkeypatch.setattr("huggingface_hub.snapshot_download", raising(failure))
    with pytest.raises(OSError, match=r"No space left|the cache"):
        hugging_face.fetch("owner/name", ["config.json"])


def raising(failure: Exception) -> Any:
    def download(*args: object, **kwargs: object) -> None:
        raise failure

    return download
