"""`shards.py do=restore` and `do=corrupt`, and training on what they wrote."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor, nn

from carrara.build import exported_config
from carrara.command import restore as command
from carrara.command import shards
from carrara.component import load_component, save_component
from carrara.config import build
from carrara.corruption.base import as_stored
from carrara.corruption.noise import Gaussian
from carrara.data.module import ShardData
from carrara.errors import UserError
from carrara.model.restoration import restored
from carrara.pipeline.pictures import to_uint8
from tests.tiny import awake, diffusion_model, kl

CONF = Path(__file__).parents[2] / "conf"
RESOLUTION = 8
NETWORK = {"_target_": "carrara.network.drunet.DRUNet", "channels": [8, 16], "num_blocks": 1, "residual": True}
CARD: dict[str, Any] = {"fingerprint": "", "data": {}, "scores": {}}
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    config = exported_config({"network": NETWORK}, "restoration")
    for seed, name in enumerate(("restoration", "other")):
        torch.manual_seed(seed)
        save_component(root / name, "restoration", config, awake(build(config)), CARD)
    node = {
        "_target_": "carrara.autoencoder.kl.KL", "latent_channels": 4, "downsampling": 4, "channels": [8, 16],
        "num_blocks": 1, "patch": 2,
    }  # fmt: skip
    save_component(root / "autoencoder", "autoencoder", node, kl(), CARD)
    return root


def picture(value: int) -> Image.Image:
    random = np.random.default_rng(value)
    return Image.fromarray(random.integers(0, 256, (RESOLUTION, RESOLUTION, 3), dtype=np.uint8))


def encoded(image: Image.Image, suffix: str) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG" if suffix == "png" else "JPEG")
    return file.getvalue()


@pytest.fixture
def make(write_shard, parts, tmp_path, monkeypatch) -> Make:
    monkeypatch.chdir(tmp_path)
    for s in range(3):
        samples = {
            f"{k:03d}": {
                "png": encoded(picture(k), "png"),
                "txt": f"picture {k}, ".encode(),  # spaces and all
                "json": json.dumps({"k": k, "width": 640}).encode(),
            }
            for k in range(7 * s, 7 * s + 7)
        }
        if s == 1:
            samples["008"]["jpg"] = encoded(picture(8), "jpg")
            del samples["008"]["png"]
            samples["009"]["png"] = b"broken"
        write_shard(f"plain/{s}.tar", samples)

    def run(*overrides: str, do: str = "restore") -> Path:
        given = [
            f"do={do}", "data=laion", f"data.resolution={RESOLUTION}", "data.urls=plain/*.tar", "data.num_workers=0",
            f"part.restoration={parts}/restoration", "out=made", "batch_size=3",
        ]  # fmt: skip
        shards.main(CONF, [*given, *overrides])
        return tmp_path / "made"

    return run


def contents(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: file.read() for member in tar if (file := tar.extractfile(member)) is not None}


def pixels(data: bytes) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).copy()).permute(2, 0, 1)


def data(tmp_path: Path, urls: str) -> ShardData:
    return ShardData("made", urls, RESOLUTION, val_samples=2, cache_dir=str(tmp_path / "index"))


@torch.no_grad()
def test_pictures_are_restored_and_all_else_stays(make, parts, capsys):
    folder = make()
    assert capsys.readouterr().out == "3 of 3 shards made now, in made; samples left out: not_an_image 1\n"
    part, _ = load_component(parts / "restoration", "restoration")
    for s in range(3):
        before, after = contents(Path(f"plain/{s}.tar")), contents(folder / f"{s}.tar")
        for k in range(7 * s, 7 * s + 7):
            if k == 9:  # is broken
                assert not any(name.startswith("009") for name in after)
                continue
            original = before.get(f"{k:03d}.png") or before[f"{k:03d}.jpg"]
            answer = to_uint8(restored(part, pixels(original)[None].float() / 127.5 - 1))[0]
            written = pixels(after.pop(f"{k:03d}.png"))
            assert (written.int() - answer.int()).abs().max() <= 1
            assert (written.int() - pixels(original).int()).abs().float().mean() > 5
            for suffix in ("txt", "json"):
                assert after.pop(f"{k:03d}.{suffix}") == before[f"{k:03d}.{suffix}"]
        assert list(after) == ["__made_of__/shard.json"]


def test_noisy_shards_hold_what_a_restoration_is_shown_in_training(make, tmp_path):
    folder = make("corruption.sigma=0.4", do="corrupt")
    batch = next(iter(data(tmp_path, "plain/*.tar").train_loader(16)))
    clean = batch["images"].float() / 127.5 - 1
    noisy = as_stored(Gaussian(0.4, 0)(clean, batch["keys"], 0))
    shards = {path.name: contents(path) for path in folder.glob("*.tar")}
    for key, expected in zip(batch["keys"], noisy, strict=True):
        shard, _, name = key.partition("/")
        written = pixels(shards[shard][f"{name}.png"]).float() / 127.5 - 1
        torch.testing.assert_close(written, expected, rtol=0, atol=1e-6)
    made_of = json.loads(shards["0.tar"]["__made_of__/shard.json"])
    assert made_of["do"] == "corrupt" and json.loads(made_of["corruption"])["sigma"] == 0.4


def test_what_was_interrupted_goes_on(make, monkeypatch, capsys):
    calls = 0

    def interrupted(network: nn.Module, noisy: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:  # three a shard: within the second
            raise KeyboardInterrupt
        return restored(network, noisy)

    monkeypatch.setattr(command, "restored", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make()
    folder = Path("made")
    assert [path.name for path in folder.iterdir() if path.suffix in (".tar", ".partial")] == ["0.tar"]
    first = (folder / "0.tar").stat()
    with FileLock(folder / ".2.tar.lock"):  # another machine has that one
        make()
    assert "1 of 3 shards made now" in capsys.readouterr().out
    make()
    assert "1 of 3 shards made now" in capsys.readouterr().out
    assert (folder / "0.tar").stat().st_mtime_ns == first.st_mtime_ns
    whole = {path.name: path.read_bytes() for path in make("out=again").parent.glob("again/*.tar")}
    assert whole == {path.name: path.read_bytes() for path in folder.glob("*.tar")}


def test_a_diffusion_model_trains_on_restored_shards(make, tmp_path):
    folder = make()
    there = data(tmp_path, f"{folder}/*.tar")
    model = diffusion_model()
    loader = there.train_loader(6)
    captions = set()
    for batch in loader:
        assert model.loss(batch)["loss"].isfinite()
        captions |= set(batch["captions"])
    assert len(captions) == 18 and all(caption.startswith("picture ") for caption in captions)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["part.restoration=null"], r"part\.restoration=…: the part or run"),
        (["part.restoration={parts}/autoencoder"], "of kind autoencoder, where kind restoration is needed"),
        (["part.restoration=nowhere"], r"part\.restoration=nowhere: there is no such folder"),
        (["out=null"], "out=FOLDER: where the shards of do=restore go"),
        (["out=plain"], "plain/0.tar was made with something else"),
        (["data.flip=true"], r"data\.flip, .* do not go with do=restore"),
        (["data.resolution=0"], r"data\.resolution"),
    ],
)
def test_mistakes_are_named(make, parts, overrides, message):
    before = {path: path.read_bytes() for path in Path("plain").iterdir()}
    with pytest.raises(UserError, match=message):
        make(*(override.format(parts=parts) for override in overrides))
    assert {path: path.read_bytes() for path in Path("plain").iterdir() if path.suffix == ".tar"} == before


@pytest.mark.parametrize(
    ("do", "overrides"),
    [("restore", ["part.restoration={parts}/other"]), ("corrupt", []), ("restore", ["data.crop=none"])],
)
def test_a_folder_holds_what_was_made_alike(make, parts, do, overrides):
    make()
    with pytest.raises(UserError, match=r"made/\d\.tar was made with something else"):
        make(*(override.format(parts=parts) for override in overrides), do=do)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [(["corruption.sigma=0"], r"corruption\.sigma must be"), (["out=null"], "shards of do=corrupt go")],
)
def test_mistakes_of_corrupting_are_named(make, overrides, message):
    with pytest.raises(UserError, match=message):
        make(*overrides, do="corrupt")
