import shutil
from pathlib import Path

import pytest
import torch

from carrara.command import train
from carrara.config import build, compose
from carrara.errors import UserError
from carrara.network.caption_mean import CaptionMean
from carrara.plan import check_fit, meta_modules, optimizer_bytes

CONF = Path(__file__).parents[1] / "conf"
FULL = ["model=latent_unet", "data=laion", "trainer.devices=8"]


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_full_size_is_planned_without_data(nowhere, capsys):
    train.main(CONF, [*FULL, "dry_run=true"])
    plan = capsys.readouterr().out
    assert "latent_unet on laion, size base" in plan
    for kind in ("autoencoder", "evaluator"):
        assert f"part        {kind}" in plan
    assert "1 nodes × 8 devices × 1 accumulated × 256 a micro-batch" in plan
    assert "data        missing" in plan
    assert "activations, which grow with the micro-batch and are not estimated" in plan
    assert list(nowhere.glob("runs/*/*")) == []
    assert not (nowhere / "data").exists()


def test_the_plan_counts_what_is_trained(nowhere):
    config = compose(CONF, "train", ["size=demo"]).config
    modules, model = meta_modules(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    real = {name: build(config[name]) for name in ("network", "conditioner", "autoencoder", "evaluator")}
    real["other"] = CaptionMean(real["autoencoder"].latent_channels, real["conditioner"].width)
    assert modules.keys() == real.keys()
    for name, module in modules.items():
        assert sum(p.numel() for p in module.parameters()) == sum(p.numel() for p in real[name].parameters())
        trained = name in ("network", "conditioner", "other")
        assert all(p.requires_grad == trained for p in module.parameters())


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_optimizers_state_is_as_large_as_planned(nowhere, optimizer):
    overrides = ["model=evaluator", "size=demo", f"model/optimizer={optimizer}"]
    config = compose(CONF, "train", overrides).config
    _, model = meta_modules(config)
    real = build(config["model"], evaluator=build(config["evaluator"]))
    stepped = real.configure_optimizers()["optimizer"]
    for parameter in real.parameters():
        parameter.grad = torch.zeros_like(parameter)
    stepped.step()
    states = [value for state in stepped.state.values() for value in state.values()]
    assert optimizer_bytes(model) == sum(v.numel() * v.element_size() for v in states if isinstance(v, torch.Tensor))


def test_the_plan_finds_the_data_and_names_the_parts(nowhere, capsys):
    small = ["data.make.num_train=40", "data.make.num_val=4", "data.make.num_val_seen=4", "size=demo"]
    small += ["trainer.epoch_samples=null", "size.latent_unet.batch_size=32"]
    build(compose(CONF, "train", small).config["data"])
    train.main(CONF, [*small, "dry_run=true"])
    plan = capsys.readouterr().out
    assert "data        40 " in plan
    assert "to be trained first in runs/components/autoencoder-" in plan
    assert "32             images = 1 steps" in plan
    assert not (nowhere / "runs" / "components").exists()
    shutil.rmtree(nowhere / "data")
    train.main(CONF, [*small, "dry_run=true"])
    assert "they are made when training starts" in capsys.readouterr().out
    assert not (nowhere / "data").exists()


@pytest.mark.parametrize("model", ["latent_unet", "pixel_unet", "autoencoder", "evaluator"])
@pytest.mark.parametrize("size", ["demo", "small", "base"])
def test_every_models_network_fits_what_it_is_given(model, size):
    config = compose(CONF, "train", [f"model={model}", f"size={size}"]).config
    check_fit(config, meta_modules(config)[0])


@pytest.mark.parametrize("key", ["in_channels=5", "resolution=4", "context_width=77", "pooled_width=7"])
def test_a_network_that_does_not_fit_is_refused(key):
    config = compose(CONF, "train", [f"network.{key}", "size=demo"]).config
    with pytest.raises(UserError, match=r"does not fit latents of \(4, 8, 8\) and captions of width 128"):
        check_fit(config, meta_modules(config)[0])
