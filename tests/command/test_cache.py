"""`shards.py do=cache`, and training on what it wrote."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from webdataset import WebDataset

from carrara.autoencoder.kl import KL
from carrara.cache_use import usable_cache
from carrara.command import shards
from carrara.command.train import Job, train
from carrara.command.train_check import check_cache
from carrara.component import load_component, save_component
from carrara.conditioner.pretrained import Pretrained
from carrara.config import build, compose
from carrara.data.cached import decoded_bytes, facts_of
from carrara.data.module import ShardData
from carrara.data.reader import Use
from carrara.data.shard_index import scan
from carrara.errors import UserError
from carrara.network.hugging_face import EXPORTED
from carrara.parts import Part, needed_parts
from tests.conditioner.test_pretrained import WIDTH, bert, clip_text_model
from tests.tiny import diffusion_model, kl, objective, unet

CONF = Path(__file__).parents[2] / "conf"
RESOLUTION = 16
NODE = {
    "_target_": "carrara.autoencoder.kl.KL", "latent_channels": 4, "downsampling": 4, "channels": [8, 16],
    "num_blocks": 1, "patch": 2, "kl_weight": 1e-6,
}  # fmt: skip


def save_autoencoder(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    autoencoder = kl()
    autoencoder.set_statistics(torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([0.5, 1.0, 1.5, 2.0]))
    save_component(folder, "autoencoder", NODE, autoencoder, {"fingerprint": "", "data": {}, "scores": {}, "steps": 1})


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("parts")
    save_autoencoder(root / "autoencoder", 0)
    save_autoencoder(root / "other", 1)
    clip_text_model(root / "clip")
    bert(root / "bert")
    return root


@pytest.fixture
def make(write_shard, sample, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for s in range(3):
        samples = {
            f"{k:03d}": {
                **sample(k, {"other": "a green cube"}),
                "txt": f"a {'big red' if k % 2 else 'blue'} disc".encode(),
            }
            for k in range(12 * s, 12 * s + 12)
        }
        if s == 1:
            samples["013"]["png"] = b"broken"
            del samples["014"]["txt"]
        write_shard(f"plain/{s}.tar", samples)

    def run(*overrides: str, text: bool = True) -> Path:
        given = [
            "do=cache", "data=laion", f"data.resolution={RESOLUTION}", "data.urls=plain/*.tar", "data.num_workers=0",
            f"part.autoencoder={parts}/autoencoder", "out=cached", "dtype=float32", "batch_size=5",
        ]  # fmt: skip
        if text:
            given += [
                "conditioner=clip",
                f"conditioner.model={parts}/clip",
                f"conditioner.width={WIDTH}",
                "conditioner.max_length=16",
                "conditioner.padding=longest",
            ]
        shards.main(CONF, [*given, *overrides])
        return tmp_path / "cached"

    return run


def data(tmp_path: Path, urls: str, **changes: Any) -> ShardData:
    settings: dict[str, Any] = {"val_samples": 4, "cache_dir": str(tmp_path / "index"), "memory_limit": 0}
    return ShardData("cached", urls, RESOLUTION, **settings | changes)


def model(parts: Path, text: bool = True):
    torch.manual_seed(0)
    autoencoder = load_component(parts / "autoencoder", "autoencoder")[0]
    assert isinstance(autoencoder, KL)
    conditioner = Pretrained(str(parts / "clip"), WIDTH, 16) if text else None
    changes = {} if conditioner is None else {"conditioner": conditioner}
    return diffusion_model(
        autoencoder, network=unet(in_channels=4, resolution=4), objective=objective(), caption_dropout=0.3, **changes
    )


def losses(data: ShardData, model, use: Use) -> list[float]:
    loader = data.train_loader(8, use=use)
    with torch.no_grad():
        return [model.loss(batch)["loss"].item() for batch in loader]


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
@pytest.mark.parametrize("text", [True, False])
def test_the_losses_are_those_without_a_cache(make, parts, tmp_path, text, dtype, tolerance):
    """Same samples, same noise, same dropped captions: the cached shards have the same keys, so the same order."""
    folder = make(f"dtype={dtype}", text=text)
    one = model(parts, text)
    with torch.no_grad():
        for parameter in one.predictor.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))  # a network that begins as zero hears no text
    with_cache = data(tmp_path, f"{folder}/*.tar")
    pictures = losses(with_cache, one, "pictures")
    cached = losses(with_cache, one, "latents_and_text" if text else "latents")
    assert len(pictures) == len(cached) >= 3
    assert cached == pytest.approx(pictures, rel=tolerance)
    assert len(set(pictures)) == len(pictures)


def contents(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: file.read() for member in tar if (file := tar.extractfile(member)) is not None}


def test_shards_hold_what_they_held_and_the_cache(make, capsys):
    folder = make()
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == "3 of 3 shards made now, in cached; samples left out: no_caption 1, not_an_image 1"
    members = contents(folder / "0.tar")
    for name, content in contents(Path("plain/0.tar")).items():
        assert members.pop(name) == content
    made_of = json.loads(members.pop("__made_of__/shard.json"))
    assert sorted(members) == [f"{k:03d}.cache.npz" for k in range(12)]
    assert made_of.items() > json.loads(facts_of(members["003.cache.npz"])).items()
    facts = json.loads(facts_of(members["003.cache.npz"]))
    assert facts["resolution"] == RESOLUTION and facts["crop"] == "center" and facts["max_length"] == 16
    assert all(len(facts[name]) == 64 for name in ("autoencoder", "encoder", "tokenizer"))
    keys = [sample["__key__"] for sample in WebDataset(str(folder / "1.tar"), shardshuffle=False)]
    assert keys == [f"{k:03d}" for k in range(12, 24) if k not in (13, 14)]


def test_what_is_there_is_left_and_what_others_make_too(make, parts, capsys):
    folder = make()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    (folder / "2.tar").unlink()
    with FileLock(folder / ".2.tar.lock"):
        make()
    assert "0 of 3 shards made now" in capsys.readouterr().out
    make()
    assert "1 of 3 shards made now" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("[01].tar")} == {
        k: before[k] for k in ("0.tar", "1.tar")
    }
    with pytest.raises(UserError, match=r"0\.tar was made with something else \(autoencoder\)"):
        make(f"part.autoencoder={parts}/other")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("data.filters.min_width=2", "eligible"),
        ("data.caption=other", "source, caption"),
        ("data.max_pixels=70", "max_pixels"),
        ("pictures", "source"),
    ],
)
def test_shards_made_of_something_else_are_not_taken_for_made(make, write_shard, sample, change, field):
    """Of other samples of the same shard, other captions, or a shard that is another by now."""
    facts = {"other": "x"}
    write_shard("plain/0.tar", {str(k): sample(k, {"width": 1 + k, **facts}) for k in range(3)})
    given = ["data.urls=plain/0.tar", "data.val_samples=1"]
    make(*given, text=False)
    if change == "pictures":
        write_shard("plain/0.tar", {str(k): sample(k + 3, {"width": 1 + k, **facts}) for k in range(3)})
        change = "data.filters.min_width=null"
    with pytest.raises(UserError, match=rf"0\.tar was made with something else \({field}\)"):
        make(*given, change, text=False)


def test_keys_that_are_no_utf8_stay_as_they_are(make, sample):
    names = ["caf\udce9", "caf\udce8", "x" * 95]
    with tarfile.open("plain/0.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        for name in names:
            for suffix, content in sample(1).items():
                member = tarfile.TarInfo(f"{name}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    folder = make("data.urls=plain/0.tar", "data.val_samples=1", text=False)
    index = scan(str(folder / "0.tar"))
    assert index.problems == []
    assert [key.decode("utf-8", "surrogateescape") for key in index.keys.tolist()] == names


def config(parts: Path, autoencoder: str = "autoencoder") -> dict:
    return {"diffusion": {}, "part": {"autoencoder": str(parts / autoencoder)}}


def test_a_cache_is_used_where_it_fits(make, parts, tmp_path):
    folder = make()
    one = model(parts)
    modules = {"autoencoder": one.autoencoder, "conditioner": one.predictor.conditioner}
    there = data(tmp_path, f"{folder}/*.tar")
    assert usable_cache(config(parts), there, one, modules) == "latents_and_text"
    assert (
        usable_cache(config(parts), there, one, {**modules, "conditioner": model(parts, False).predictor.conditioner})
        == "latents"
    )
    assert usable_cache({"part": {}}, there, one, {}) == "pictures"  # pixels are learnt from pictures
    one.takes_latents = False
    assert usable_cache(config(parts), there, one, modules) == "pictures"
    one.takes_latents = True
    assert usable_cache(config(parts), data(tmp_path, "plain/*.tar"), one, modules) == "pictures"
    assert usable_cache(config(parts), data(tmp_path, f"{folder}/*.tar", use_cache=False), one, modules) == "pictures"


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("autoencoder", {"part": "other"}),
        ("resolution", {"resolution": 24}),
        ("crop", {"crop": "none"}),
        ("encoder", {"text": "bert"}),
        ("max_length", {"max_length": 9}),
        ("caption", {"caption": "other"}),
    ],
)
def test_a_cache_of_something_else_is_refused_by_the_field(make, parts, tmp_path, field, changes):
    folder = make()
    settings: dict[str, Any] = {
        "val_samples": 4,
        "cache_dir": str(tmp_path / "index"),
        "crop": changes.get("crop", "center"),
        "caption": changes.get("caption", ".txt"),
    }
    there = ShardData("x", f"{folder}/*.tar", changes.get("resolution", RESOLUTION), **settings)
    conditioner = Pretrained(str(parts / changes.get("text", "clip")), WIDTH, changes.get("max_length", 16))
    one = model(parts)
    modules = {"autoencoder": one.autoencoder, "conditioner": conditioner}
    with pytest.raises(UserError, match=rf"cache was made with {field}=.* data\.use_cache=false"):
        usable_cache(config(parts, changes.get("part", "autoencoder")), there, one, modules)


def test_a_tokenizer_of_another_vocabulary_is_noticed(make, parts, tmp_path, monkeypatch):
    folder = make()
    conditioner = Pretrained(str(parts / "clip"), WIDTH, 16)
    tokenize = conditioner.tokenize

    def other(captions):
        ids, mask = tokenize(captions)
        return ids + 1, mask

    monkeypatch.setattr(conditioner, "tokenize", other)
    one = model(parts)
    modules = {"autoencoder": one.autoencoder, "conditioner": conditioner}
    with pytest.raises(UserError, match="made with tokenizer="):
        usable_cache(config(parts), data(tmp_path, f"{folder}/*.tar"), one, modules)


def test_shards_of_two_caches_are_refused(make, parts, tmp_path):
    folder = make()
    make("out=half", "dtype=float16")
    with pytest.raises(UserError, match=r"0\.tar and .*0\.tar were not made alike"):
        _ = data(tmp_path, f"[{folder}/0.tar,half/0.tar]").cached
    with pytest.raises(UserError, match="not made alike"):
        _ = data(tmp_path, f"[{folder}/0.tar,plain/1.tar]").cached


@pytest.mark.parametrize(
    "changes", [{"flip": True}, {"stages": [lambda s: s]}, {"bucket_aspect": 2.0, "bucket_multiple": 4}]
)
def test_what_changes_pictures_does_not_go_with_a_cache(make, parts, tmp_path, changes):
    folder = make()
    one = model(parts)
    modules = {"autoencoder": one.autoencoder}
    with pytest.raises(UserError, match=r"data\.use_cache=false"):
        usable_cache(config(parts), data(tmp_path, f"{folder}/*.tar", **changes), one, modules)


def test_a_broken_cache_costs_its_sample(make, parts, tmp_path):
    folder = make()
    path = folder / "0.tar"
    content = bytearray(path.read_bytes())
    place = content.find(b"mean.npy")
    content[place + 60 : place + 400] = bytes(340)
    path.write_bytes(content)
    skipped = [
        batch["skipped"] for batch in data(tmp_path, f"{folder}/*.tar", val_samples=1).train_loader(11, use="latents")
    ]
    assert sum(one.get("broken_cache", 0) for one in skipped) == 1


def test_a_sample_whose_cache_was_made_with_something_else_is_left_out(make, parts, tmp_path):
    members = {}
    make()
    make("out=half", "dtype=float16")
    for folder in ("cached", "half"):
        with tarfile.open(tmp_path / folder / "0.tar") as tar:
            members[folder] = [(one, tar.extractfile(one).read()) for one in tar]  # type: ignore[union-attr]
    (tmp_path / "mixed").mkdir()
    replaced = max(k for k, (one, _) in enumerate(members["half"]) if one.name.endswith(".cache.npz"))
    with tarfile.open(tmp_path / "mixed" / "0.tar", "w") as tar:
        for k, (one, content) in enumerate(members["cached"]):
            one, content = members["half"][k] if k == replaced else (one, content)
            tar.addfile(one, io.BytesIO(content))
    loader = data(tmp_path, f"{tmp_path}/mixed/*.tar", val_samples=1).train_loader(5, use="latents", steps_per_epoch=4)
    assert {reason for batch in loader for reason in batch["skipped"]} == {"other_cache"}


def test_what_a_language_model_of_ones_own_says_is_kept(make, tmp_path):
    torch.manual_seed(0)
    node = compose(CONF, "train", ["model=language_model", "size=demo", "language_model.width=16"]).config
    lm = build(node["language_model"])
    lm.tokenizer.train_on(["a big red disc", "a blue disc"])

    def write_exported(folder: Path) -> None:
        lm.save_pretrained(folder / EXPORTED)

    card = {"fingerprint": "", "data": {}, "scores": {}}
    save_component(tmp_path / "lm", "language_model", node["language_model"], lm, card, write_exported)
    make(
        "conditioner=language_model",
        "language_model.width=16",
        "language_model.max_length=48",
        f"part.language_model={tmp_path}/lm",
        text=False,
    )
    found = data(tmp_path, f"{tmp_path}/cached/*.tar").cached
    assert found is not None and found["text_width"] == 16 and found["encoder"] is not None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["out=null"], "out=FOLDER: where the shards of do=cache go"),
        (["part.autoencoder=null"], "part.autoencoder=…"),
        (["data.flip=true"], r"data\.flip, "),
        (["dtype=int8"], "dtype=int8 is not known"),
        (["conditioner=text"], "only frozen text encoders"),
        (["conditioner=language_model"], r"part\.language_model=auto: do=cache trains none; name the component"),
    ],
)
def test_mistakes_are_named(make, overrides, message):
    with pytest.raises(UserError, match=message):
        make(*overrides, text=False)


def test_the_auto_encoder_of_cached_shards_is_named_before_another_is_trained(make, parts, tmp_path):
    folder = make(text=False)
    there = data(tmp_path, f"{folder}/*.tar")
    run = compose(CONF, "train", ["data=laion", f"data.resolution={RESOLUTION}", "part.evaluator=null", "size=demo"])
    run.config["autoencoder"] = NODE
    run.config["network"] |= {"in_channels": 4, "resolution": 4}
    [auto] = needed_parts(CONF, run, there.fingerprint)
    with pytest.raises(UserError, match=r"name theirs with part\.autoencoder=…, or set data\.use_cache=false"):
        check_cache(run.config, [auto], there)
    check_cache(run.config, [auto], data(tmp_path, f"{folder}/*.tar", use_cache=False))
    check_cache(run.config, [auto], data(tmp_path, "plain/*.tar"))
    named = [Part("autoencoder", parts / name, architecture=NODE) for name in ("autoencoder", "other")]
    check_cache(run.config, named[:1], there)
    with pytest.raises(UserError, match=r"cache was made with autoencoder="):
        check_cache(run.config, named[1:], there)


def test_nothing_is_trained_for_cached_shards_of_another_auto_encoder(make, tmp_path):
    folder = make(text=False)
    given = ["data=laion", f"data.resolution={RESOLUTION}", f"data.urls={folder}/*.tar", "data.val_samples=4"]
    run = compose(CONF, "train", [*given, "part.evaluator=null", "size=demo"])
    run.config["autoencoder"] = NODE
    run.config["network"] |= {"in_channels": 4, "resolution": 4}
    started: list[Path] = []
    with pytest.raises(UserError, match=r"name theirs with part\.autoencoder=…, or set data\.use_cache=false"):
        train(Job(CONF, run, ()), lambda folder, devices: started.append(folder))
    assert started == []


def test_what_is_kept_in_memory_is_counted_as_it_is_kept(make, tmp_path):
    """Tokens are many times as large as the picture that they are beside."""
    folder = make()
    one = data(tmp_path, f"{folder}/*.tar")
    sample = one.train_loader(1, use="latents_and_text").samples.load(0)
    assert sample.cached is not None and one.cached is not None
    sizes = [array.nbytes for array in sample.cached if array is not None]
    uses: tuple[Use, ...] = ("latents", "latents_and_text")
    each = {use: decoded_bytes(one.cached, use == "latents_and_text") for use in uses}
    assert sum(sizes[:2]) == each["latents"] and sum(sizes) <= each["latents_and_text"]
    for use, bytes_each in each.items():
        for spare, kept in ((0, True), (-1, False)):
            limited = data(tmp_path, f"{folder}/*.tar", memory_limit=bytes_each * one.num_train + spare)
            assert limited.train_loader(1, use=use).samples.keep == kept
