import shutil
from pathlib import Path

import pytest

from carrara.command import train
from carrara.component import save_component
from carrara.config import build, compose
from carrara.errors import UserError

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


def test_a_named_part_is_counted_as_it_is(nowhere, capsys):
    """Not by the run's own settings of it, which are for one that is trained."""
    node = compose(CONF, "train", ["size=demo"]).config["autoencoder"]
    node["channels"] = [2 * channels for channels in node["channels"]]
    autoencoder = build(node)
    save_component(Path("wide"), "autoencoder", node, autoencoder, {"fingerprint": "", "data": {}, "scores": {}})
    train.main(CONF, ["size=demo", "part.autoencoder=wide", "dry_run=true"])
    count = sum(parameter.numel() for parameter in autoencoder.parameters())
    assert f"autoencoder    {count:,} frozen" in capsys.readouterr().out


def test_a_named_part_is_checked_as_it_is(nowhere):
    """It has the latents of the run's own settings, and no tokens."""
    node = compose(CONF, "train", ["size=demo", "autoencoder.latent_channels=8"]).config["autoencoder"]
    save_component(Path("kl"), "autoencoder", node, build(node), {"fingerprint": "", "data": {}, "scores": {}})
    with pytest.raises(UserError, match=r"the auto-encoder has no tokens: take a discrete one"):
        train.main(CONF, ["size=demo", "model=dalle", "part.autoencoder=kl"])
    assert not Path("data").exists()  # it is told before anything is made


def test_a_setting_of_the_wrong_kind_is_named_by_its_key(nowhere):
    with pytest.raises(UserError, match=r"^callback\.score\.num_images must be a whole number, not null$"):
        train.main(CONF, ["callback.score.num_images=null"])
    assert not Path("data").exists()
