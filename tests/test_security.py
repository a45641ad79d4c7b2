"""Shards, checkpoints, components and configs may come from anyone: what they carry is not run, and nothing leaks.

Each payload leaves a canary where it runs; a control shows that it does so without the protection.
"""

import contextlib
import os
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import hydra.utils
import pytest
import torch
import webdataset
import yaml
from torch import nn

from carrara.autoencoder.identity import Identity
from carrara.callback.checkpoint_file import VerifiedCheckpointIO, digest, newest_valid
from carrara.command_line import quote_free_text
from carrara.component import load_component, read_component, save_component
from carrara.config import build, check, compose, load_yaml, save_yaml
from carrara.data.loader import Loader
from carrara.data.manifest import Manifest
from carrara.data.source import expand
from carrara.errors import UserError
from carrara.run_folder import load_config, save_config
from tests.shards import make_loader, sample

CONF = Path(__file__).parents[1] / "conf"


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here" / "canary"


class Payload:
    """Pickled, it makes the canary where it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.canary}",))


# --- pickles ---


def test_pickles_in_a_shard(canary, write_shard, tmp_path):
    bomb = pickle.dumps(Payload(canary))
    members = dict.fromkeys(("pyd", "pickle", "pkl", "pth", "jpg.pickle"), bomb)
    path = write_shard("a.tar", {f"{v:06d}": {**sample(v), **members} for v in range(6)})
    (batch,) = make_loader(Manifest.load([str(path)], tmp_path / "cache"), batch=6)
    assert len(batch["keys"]) == 6 and not canary.exists()
    # the control: what webdataset's own decoders do with it, unless it is told not to
    secured, webdataset.utils.enforce_security = webdataset.utils.enforce_security, False
    try:
        with contextlib.suppress(webdataset.autodecode.DecodingError):
            list(webdataset.WebDataset(str(path), shardshuffle=False).decode())
    finally:
        webdataset.utils.enforce_security = secured
    assert canary.exists()


def test_a_pickle_in_place_of_a_picture_a_caption_or_a_json(canary, write_shard, tmp_path):
    bomb = pickle.dumps(Payload(canary))
    samples = {f"{v:06d}": sample(v) for v in range(8)}
    for key, suffix in zip(samples, ("png", "txt", "json"), strict=False):
        samples[key] = {**samples[key], suffix: bomb}
    path = write_shard("a.tar", samples)
    loader: Loader = make_loader(Manifest.load([str(path)], tmp_path / "cache"), batch=8, max_bad_fraction=1.0)
    assert len(list(loader)) == 1 and not canary.exists()
    pickle.loads(bomb)
    assert canary.exists()


def test_a_checkpoint(canary, tmp_path):
    path = tmp_path / "step=00000001.ckpt"
    torch.save({"x": Payload(canary)}, path)
    path.with_name(f"{path.name}.sha256").write_text(digest(path))
    assert newest_valid(tmp_path) == path  # its checksum is right: whoever made it made that too
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        VerifiedCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not canary.exists()
    torch.load(path, weights_only=False)
    assert canary.exists()


def test_a_components_weights(canary, tmp_path):
    part = nn.Linear(2, 2)
    node = {"_target_": "carrara.autoencoder.identity.Identity"}
    save_component(
        tmp_path / "part", "autoencoder", node, Identity(), {"fingerprint": "", "data": {}, "scores": {}, "steps": 1}
    )
    weights = tmp_path / "part" / "weights.safetensors"
    torch.save({"weight": part.weight, "bomb": Payload(canary)}, weights)
    with pytest.raises(UserError):
        load_component(tmp_path / "part", "autoencoder")
    shutil.copy(weights, tmp_path / "part" / "pytorch_model.bin")
    with pytest.raises(UserError):
        load_component(tmp_path / "part", "autoencoder")
    assert not canary.exists()
    torch.load(tmp_path / "part" / "pytorch_model.bin", weights_only=False)
    assert canary.exists()


# --- what a config builds ---


def targets(canary: Path) -> list[dict[str, Any]]:
    touch = f"touch {canary}"
    bomb = canary.with_name("bomb.pt")
    return [
        {"_target_": "os.system", "_args_": [touch]},
        {"_target_": "os.system", "_partial_": False, "_args_": [touch]},
        {"_target_": "subprocess.getoutput", "_args_": [touch]},
        {"_target_": "carrara.launch.os.system", "_args_": [touch]},
        {"_target_": "carrara.component.os.system", "_args_": [touch]},
        {"_target_": "torch.load", "f": str(bomb), "weights_only": False},
        {"_target_": "torch.hub.load", "repo_or_dir": str(canary.parent), "source": "local", "model": "canary"},
        {"_target_": "carrara.callback.checkpoint_file.torch.load", "f": str(bomb), "weights_only": False},
    ]


@pytest.mark.parametrize("number", range(8))
def test_a_target_that_is_not_ours(canary, number):
    torch.save(Payload(canary), canary.with_name("bomb.pt"))
    (canary.parent / "hubconf.py").write_text(f"def canary():\n    open({str(canary)!r}, 'w').close()\n")
    node = targets(canary)[number]
    for wrapped in (
        node,
        {"a": [node]},
        {"a": {"_target_": "carrara.network.tokenizer.Tokenizer", "vocab_size": node}},
    ):
        with pytest.raises(UserError):
            check({"network": wrapped})
        with pytest.raises(UserError):
            build(wrapped if "_target_" in wrapped else {"_target_": "carrara.network.tokenizer.Tokenizer", **wrapped})
    assert not canary.exists()
    if "_args_" not in node:  # the others hydra's own list stops
        hydra.utils.instantiate(node)
        assert canary.exists()
    else:
        hydra.utils.get_method(node["_target_"])(*node["_args_"])
        assert canary.exists()


@pytest.mark.parametrize("number", range(8))
def test_a_target_on_the_command_line_and_in_a_runs_config(canary, number, tmp_path):
    torch.save(Payload(canary), canary.with_name("bomb.pt"))
    target = targets(canary)[number]["_target_"]
    for override in (
        f"network._target_={target}",
        f"+network.x._target_={target}",
        f"data.prompt_check._target_={target}",
    ):
        with pytest.raises(UserError):
            compose(CONF, "train", [override])
    config = compose(CONF, "train", ["logger.wandb.mode=disabled"]).config
    config["network"] = targets(canary)[number]
    save_config(tmp_path, config)
    with pytest.raises(UserError):
        load_config(tmp_path)
    assert not canary.exists()


def test_yaml_that_makes_objects(canary, tmp_path):
    text = f"network: !!python/object/apply:os.system ['touch {canary}']\n"
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError):
        load_yaml(tmp_path / "config.yaml")
    with pytest.raises(UserError):
        load_config(tmp_path)
    assert not canary.exists()
    yaml.load(text, yaml.UnsafeLoader)
    assert canary.exists()


@pytest.mark.parametrize("secret", ["${oc.env:SECRET}", "${oc.${x}:SECRET}", "${oc.decode:${oc.env:SECRET}}"])
def test_an_interpolation_in_what_comes_from_elsewhere(secret, monkeypatch, tmp_path):
    """Resolved, the address would carry the variable's value to whoever wrote it."""
    monkeypatch.setenv("SECRET", "hunter2")
    urls = f"https://example.com/{secret}.tar"
    node = {"_target_": "carrara.data.source.expand", "urls": urls, "name": "env"}
    refused = r"urls: \$\{…\} is not looked up here"
    with pytest.raises(UserError, match=refused):
        build(node)
    config = compose(CONF, "train", []).config
    config["data"] = {**config["data"], "urls": [urls]}
    save_config(tmp_path, config)
    with pytest.raises(UserError, match=r"config\.yaml: data\.urls.*is not looked up"):
        load_config(tmp_path)
    card = {"fingerprint": "", "data": {}, "scores": {}}
    node = {"_target_": "carrara.autoencoder.identity.Identity"}
    save_component(tmp_path / "part", "autoencoder", node, Identity(), card)
    save_yaml(tmp_path / "part" / "config.yaml", {**node, "more": urls})
    with pytest.raises(UserError, match=r"config\.yaml: more.*is not looked up"):
        read_component(tmp_path / "part", "autoencoder")
    # the control
    node = {"_target_": "carrara.data.source.expand", "urls": urls.replace("${x}", "env")}
    assert hydra.utils.instantiate(node) == ["https://example.com/hunter2.tar"]


def test_an_interpolation_in_free_text_of_the_command_line(monkeypatch):
    """It is text there, and would be resolved when the data are built."""
    monkeypatch.setenv("SECRET", "hunter2")
    overrides = quote_free_text(["data.urls=https://example.com/${oc.env:SECRET}.tar", "data.make=null"])
    config = compose(CONF, "train", overrides).config
    assert "hunter2" not in str(config)
    with pytest.raises(UserError, match=r"urls: \$\{…\} is not looked up here"):
        build(config["data"])


# --- commands and paths ---


def test_commands_in_place_of_addresses(canary):
    for url in (
        f"pipe:touch {canary}",
        f"[pipe:touch {canary}]",
        f"http://a/b.tar::pipe:touch {canary}",
        f"a|touch {canary}",
    ):
        with pytest.raises(UserError):
            expand(url)
    assert not canary.exists()
    secured, webdataset.utils.enforce_security = webdataset.utils.enforce_security, False
    try:
        webdataset.gopen(f"pipe:touch {canary}").read()
    finally:
        webdataset.utils.enforce_security = secured
    assert canary.exists()


def test_keys_that_are_paths_stay_names(canary, write_tar, tmp_path):
    """`../`, absolute paths and links in a tar: nothing is ever unpacked by name."""
    members = []
    for k, name in enumerate(("../../canary", str(canary), "a/../../canary", "~/canary", "$(touch canary)")):
        members += [(f"{name}{k}.{suffix}", data) for suffix, data in sample(k).items()]
    path = write_tar("a.tar", members)
    (batch,) = make_loader(Manifest.load([str(path)], tmp_path / "cache"), batch=5)
    assert len(batch["keys"]) == 5
    assert not list(tmp_path.rglob("*canary*"))
    subprocess.run(["tar", "-xPf", str(path), "-C", str(canary.parent)], check=True)
    assert list(tmp_path.rglob("*canary*"))


# --- secrets ---


def test_passwords_in_addresses_are_refused():
    with pytest.raises(UserError, match=r"must hold no password, key or signature: use ~/\.netrc"):
        expand("https://me:hunter2@host/a.tar")


def test_the_environment_is_in_no_config(monkeypatch):
    monkeypatch.setenv("SECRET", "hunter2")
    for value in ("${oc.env:SECRET}", "x${oc.env:SECRET}y", "${oc.env:NOTHING,${oc.env:SECRET}}"):
        with pytest.raises(UserError, match="environment variables are not read"):
            compose(CONF, "train", [f"name='{value}'"])
