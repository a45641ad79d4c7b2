"""Weights that a training begins with, whole or with additions."""

import json
import logging
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch

from carrara.build import exported_config
from carrara.callback.checkpoint_file import VerifiedCheckpointIO, checkpoint_name
from carrara.command import train
from carrara.command.train import main
from carrara.component import save_component
from carrara.conditioner.text import Text
from carrara.config import Composed, build, compose, load_yaml
from carrara.errors import UserError
from carrara.model.conditioned import Conditioned
from carrara.model.diffusion import DiffusionModel
from carrara.parts import imported, needed_parts, with_parts
from carrara.start import begin
from tests.published.pipelines import save_pipeline
from tests.tiny import awake, batches, diffusion_model, equal, train_tokenizers, trainer, weights

CONF = Path(__file__).parents[1] / "conf"
NETWORK: dict[str, Any] = {
    "_target_": "carrara.network.unet.UNet",
    "in_channels": 3,
    "resolution": 8,
    "channels": [8, 16],
    "attention": [False, True],
    "num_blocks": 1,
    "depth": 1,
    "heads": 2,
    "expansion": 2,
    "context_width": 8,
    "pooled_width": 8,
    "qk_norm": True,
    "learned_positions": False,
    "checkpointing": False,
}
TEXT: dict[str, Any] = {
    "_target_": "carrara.conditioner.text.Text",
    "vocab_size": 300,
    "max_length": 12,
    "width": 8,
    "depth": 1,
    "heads": 2,
}
FLOW: dict[str, Any] = {
    "schedule": {"_target_": "carrara.diffusion.schedule.Flow", "shift": 1.0},
    "parameterization": {"_target_": "carrara.diffusion.parameterization.Flow"},
}
LORA: dict[str, Any] = {"rank": 2, "alpha": 2, "targets": ["query", "key", "value", "out"]}


def config(start: Path | None, lora: dict[str, Any] | None = None, **nodes: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, dict[str, Any]] = {
        "network": NETWORK,
        "conditioner": TEXT,
        "diffusion": FLOW,
        "model": {"lora": lora},
    }
    changed = {name: base[name] | node for name, node in nodes.items()}
    return deepcopy({**base, **changed, "runs_dir": "runs", "part": {}, "start": {"network": start and str(start)}})


def model_of(config: dict[str, Any], **changes: Any) -> DiffusionModel:
    torch.manual_seed(1)
    network, conditioner = build(config["network"]), build(config["conditioner"])
    return diffusion_model(network=network, conditioner=conditioner, lora=config["model"]["lora"], **changes)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Conditioned]:
    """A component, with a vocabulary."""
    torch.manual_seed(7)
    folder = tmp_path_factory.mktemp("start") / "component"
    predictor = Conditioned(awake(build(NETWORK)), build(TEXT))
    train_tokenizers(predictor)
    node = {"_target_": "carrara.model.conditioned.Conditioned", "network": NETWORK, "conditioner": TEXT}
    card = {"fingerprint": "", "data": {}, "scores": {}, "diffusion": FLOW}
    save_component(folder, "noise_predictor", node, predictor, card)
    return folder, predictor


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """With concrete folders, as it goes into the run's folder."""
    parts = needed_parts(Path(), Composed(config, {}), None)
    return with_parts(config, imported(parts, Path(config["runs_dir"])))


def test_the_network_and_what_was_trained_along_begin_there(trained):
    folder, predictor = trained
    settings = checked(config(folder))
    model = model_of(settings)
    begin(settings, model)
    assert equal(weights(model.predictor), weights(predictor))
    assert isinstance(model.predictor.conditioner, Text)
    assert model.predictor.conditioner.tokenizer.trained  # so no other vocabulary is learned


def test_a_conditioner_that_reads_the_same_language_model_is_the_same(trained, tmp_path, caplog):
    """What is exported says which it reads; the run's own node leaves that to its part."""
    predictor = trained[1]
    reading = {**TEXT, "model": "runs/components/language_model/component"}
    node = {"_target_": "carrara.model.conditioned.Conditioned", "network": NETWORK, "conditioner": reading}
    card = {"fingerprint": "", "data": {}, "scores": {}, "diffusion": FLOW}
    save_component(tmp_path / "read", "noise_predictor", node, predictor, card)
    for folder, alike in ((reading["model"], True), ("another", False)):
        settings = {**config(tmp_path / "read"), "part": {"language_model": folder}}
        model = model_of(settings)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            begin(settings, model)
        assert equal(weights(model.predictor.conditioner), weights(predictor.conditioner)) == alike
        assert ("its conditioner is another one" in caplog.text) != alike


def test_without_a_start_nothing_happens():
    model = model_of(config(None))
    before = weights(model)
    begin(config(None), model)
    assert equal(weights(model), before)
    assert needed_parts(Path(), Composed(config(None), {}), None) == []


def test_another_conditioner_is_left_as_it_is(trained, caplog):
    settings = checked(config(trained[0], conditioner={"max_length": 10}))
    model = model_of(settings)
    before = weights(model.predictor.conditioner)
    with caplog.at_level(logging.INFO):
        begin(settings, model)
    assert equal(weights(model.predictor.conditioner), before)
    assert equal(weights(model.predictor.network), weights(trained[1].network))
    assert "only the network begins with it" in caplog.text


@pytest.mark.parametrize("free", [{"resolution": 16}, {"checkpointing": True}, {"heads": [2, 2]}])
def test_what_does_not_shape_the_weights_may_differ(trained, free):
    checked(config(trained[0], network=free))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ({"channels": [8, 32]}, r"whose channels is \[8,32\]: pass network\.channels=\[8,16\], or another network="),
        ({"heads": [2, 4]}, r"whose heads is \[2,4\]: pass network\.heads=2"),
        ({"qk_norm": False, "depth": 2}, r"depth is 2, qk_norm is false: pass network\.depth=1 network\.qk_norm=true"),
        ({"_target_": "carrara.network.dit.DiT"}, "is a UNet, and this run's network a DiT"),
    ],
)
def test_another_network_is_refused_with_what_to_pass(trained, network, message):
    with pytest.raises(UserError, match=message) as mistake:
        checked(config(trained[0], network=network))
    assert "\n" not in str(mistake.value)


def test_another_target_is_told(trained):
    table = {"_target_": "x.schedule_table.Linear", "beta_start": 1e-4, "beta_end": 0.02, "num_steps": 9}
    for schedule, told in ((FLOW["schedule"], ""), (table, "trained with Flow (shift 1.0), and this run has Linear (")):
        settings = config(trained[0], diffusion={"schedule": schedule})
        [part] = needed_parts(Path(), Composed(settings, {}), None)
        assert told in part.doubt and bool(part.doubt) == bool(told)


def test_an_auto_encoder_is_no_start(tmp_path):
    node = {"_target_": "carrara.autoencoder.identity.Identity"}
    save_component(tmp_path / "x", "autoencoder", node, build(node), {"fingerprint": "", "data": {}, "scores": {}})
    with pytest.raises(UserError, match=r"start\.network=.*is a component of kind autoencoder"):
        checked(config(tmp_path / "x"))


@pytest.mark.parametrize("reference", ["nowhere", "owner/none"])
def test_a_start_that_is_not_there_is_named(reference):
    with pytest.raises(UserError, match=rf"^start\.network={reference}: there is no such folder"):
        checked(config(Path(reference)))


def test_a_published_network_is_planned_with_and_then_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pipeline(tmp_path / "published")
    network = {
        "in_channels": 4, "channels": [64, 128], "attention": [True, False], "heads": 8, "expansion": 4,
        "context_width": 32, "pooled_width": 0, "qk_norm": False,
    }  # fmt: skip
    settings = config(tmp_path / "published", network=network)
    with pytest.raises(UserError, match=r"start\.network=.*pass .*network\.context_width=32"):
        checked(config(tmp_path / "published"))
    [part] = needed_parts(Path(), Composed(settings, {}), None)
    assert part.published is not None and not part.is_ready() and not Path("runs").exists()
    resolved = checked(settings)["start"]["network"]
    assert resolved.startswith("runs/components/published/network-") and Path(resolved).is_dir()
    assert checked(config(Path(resolved), network=network))["start"]["network"] == resolved


# --- with additions ---


def fitted(folder: Path, settings: dict[str, Any], steps: int, resume: Path | None = None) -> DiffusionModel:
    model = model_of(settings, max_steps=4)
    begin(settings, model)
    plugins = [VerifiedCheckpointIO()]
    training = trainer(folder, max_steps=steps, plugins=plugins)
    done = 0 if resume is None else 2
    training.fit(model, batches(4, start=done), ckpt_path=resume, weights_only=True)
    training.save_checkpoint(folder / f"step={steps}.ckpt")
    return model


def test_only_the_additions_are_trained_saved_and_resumed(trained, tmp_path):
    settings = checked(config(trained[0], LORA))
    whole = fitted(tmp_path / "whole", settings, 4)
    fitted(tmp_path / "parts", settings, 2)
    checkpoint = tmp_path / "parts" / "step=2.ckpt"
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    own = [key for key in state if not key.startswith("autoencoder.")]  # of which it is the identity
    assert own and all(".lora_" in key for key in own)
    resumed = fitted(tmp_path / "parts", settings, 4, checkpoint)
    assert equal(weights(resumed), weights(whole))
    exported = whole.exported.state_dict()
    assert exported.keys() == trained[1].state_dict().keys()
    changed = {key for key, value in exported.items() if not torch.equal(value, trained[1].state_dict()[key])}
    assert changed and all(key.rsplit(".", 2)[1] in LORA["targets"] for key in changed)
    assert all("attention." in key for key in changed)


def test_a_resume_on_other_weights_is_refused(trained, tmp_path):
    settings = checked(config(trained[0], LORA))
    fitted(tmp_path / "run", settings, 2)
    torch.manual_seed(9)
    other = Conditioned(build(NETWORK), build(TEXT))
    train_tokenizers(other)
    node = {"_target_": "carrara.model.conditioned.Conditioned", "network": NETWORK, "conditioner": TEXT}
    card = {"fingerprint": "", "data": {}, "scores": {}}
    save_component(tmp_path / "other", "noise_predictor", node, other, card)
    with pytest.raises(UserError, match=r"trained on other weights .* than those that start.network names"):
        fitted(tmp_path / "run", checked(config(tmp_path / "other", LORA)), 4, tmp_path / "run" / "step=2.ckpt")


def test_additions_need_something_to_be_added_to():
    with pytest.raises(UserError, match=r"model\.lora .*start\.network"):
        checked(config(None, LORA))


def test_additions_need_a_trained_conditioner(trained):
    settings = checked(config(trained[0], LORA, conditioner={"max_length": 10}))
    with pytest.raises(UserError, match=r"model\.lora leaves the conditioner as it is"):
        begin(settings, model_of(settings))


def test_additions_leave_captions_as_they_are(trained):
    model = model_of(config(trained[0], LORA), caption_mean_weight=1.0)
    assert model.caption_mean is None
    assert not any(p.requires_grad for p in model.predictor.conditioner.parameters())


# --- at full size ---


def test_stable_diffusion_is_planned_with_before_any_weights_are_read(tmp_path, monkeypatch, capsys):
    """The settings of Stable Diffusion 1.5 as they are published, and no weights at all."""
    monkeypatch.chdir(tmp_path)
    published = tmp_path / "sd"
    unet = {"_class_name": "UNet2DConditionModel", "sample_size": 64, "cross_attention_dim": 768}
    four = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    vae = {"_class_name": "AutoencoderKL", "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, **four}
    text = {"model_type": "clip_text_model", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    schedule = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    for name, content in {
        "model_index.json": {},
        "unet/config.json": unet,
        "vae/config.json": vae,
        "text_encoder/config.json": text,
        "text_encoder/model.safetensors": {},
        "tokenizer/vocab.json": {},
        "scheduler/scheduler_config.json": schedule,
    }.items():
        (published / name).parent.mkdir(parents=True, exist_ok=True)
        (published / name).write_text(json.dumps(content))
    user = [
        "model=latent_unet",
        "data=laion",
        "autoencoder=pretrained",
        "conditioner=clip",
        "network=stable_diffusion_1",
    ]
    here = [f"part.autoencoder={published}", f"conditioner.model={published}", f"start.network={published}"]
    main(CONF, [*user, *here, "part.evaluator=null", "dry_run=true"])
    plan = capsys.readouterr().out
    assert "network        859,520,964 trained" in plan and "autoencoder    83,653,863 frozen" in plan
    assert f"start       network        to be imported from {published}" in plan
    assert "was trained with ScaledLinear" in plan and "diffusion=stable_diffusion" in plan
    assert not (tmp_path / "runs").exists()
    main(CONF, [*user, *here, "part.evaluator=null", "diffusion=stable_diffusion", "dry_run=true"])
    assert "was trained with" not in capsys.readouterr().out


def test_what_a_run_began_with_is_not_needed_once_it_has_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started: list[Path] = []
    monkeypatch.setattr(train, "_start_processes", lambda folder, devices: started.append(folder))
    few = [f"data.make.{key}={number}" for key, number in (("num_train", 24), ("num_val", 4), ("num_val_seen", 4))]
    tiny = ["model=pixel_unet", "size=demo", "size.pixel_unet.channels=[8,8,8]", "part.evaluator=null", *few]
    settings = compose(CONF, "train", tiny).config
    node = exported_config(settings, "noise_predictor")
    card = {"fingerprint": "", "data": {}, "scores": {}, "diffusion": settings["diffusion"]}
    save_component(Path("begun"), "noise_predictor", node, build(node), card)
    main(CONF, [*tiny, "start.network=begun"])
    shutil.rmtree("begun")
    with pytest.raises(UserError, match=r"start\.network=begun: there is no such folder"):
        main(CONF, [f"resume={started[0]}"])
    checkpoints = started[0] / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / checkpoint_name(3)).touch()
    main(CONF, [f"resume={started[0]}"])
    assert started == [started[0]] * 2
    assert load_yaml(started[0] / "config.yaml")["start"] == {"network": "begun"}
