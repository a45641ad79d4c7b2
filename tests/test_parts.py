import json
from pathlib import Path

import pytest

from carrara.build import exported_config
from carrara.component import save_component
from carrara.config import Composed, build, compose
from carrara.errors import UserError
from carrara.parts import Part, find_component, in_order, needed_parts, train_missing, with_parts
from carrara.run_folder import save_config

CONF = Path(__file__).parents[1] / "conf"
NODE = {
    "_target_": "carrara.autoencoder.kl.KL",
    "latent_channels": 3,
    "downsampling": 2,
    "channels": [8, 8],
    "num_blocks": 1,
    "patch": 1,
    "kl_weight": 1e-6,
}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run below `runs`, seen from the folder above."""
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/components/autoencoder-0123456789ab")
    card = {"fingerprint": "", "data": {}, "scores": {}}
    save_component(folder / "component", "autoencoder", NODE, build(NODE), card)
    return folder


def composed(part: object, **node: object) -> Composed:
    return Composed({"runs_dir": "runs", "part": {"autoencoder": part}, "autoencoder": {**NODE, **node}}, {})


@pytest.mark.parametrize("reference", ["{run}/component", "{run}", "autoencoder-0123456789ab"])
def test_a_part_is_named_in_three_ways(run, reference):
    [part] = needed_parts(Path(), composed(reference.format(run=run)), None)
    assert part.is_ready()
    assert part.folder == run / "component"
    assert with_parts(composed("x").config, [part])["part"] == {"autoencoder": f"{run}/component"}


def test_a_part_elsewhere_has_its_whole_path(run, monkeypatch):
    (run / "inner").mkdir()
    monkeypatch.chdir(run / "inner")
    [part] = needed_parts(Path(), composed(".."), None)
    config = with_parts(composed("x").config, [part])
    assert config["part"] == {"autoencoder": str(Path("../component").resolve())}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("nowhere", r"part\.autoencoder=nowhere: there is no such folder; name a component's folder"),
        ("runs", r"part\.autoencoder=runs: it has no finished component"),
    ],
)
def test_a_missing_part_is_named(run, reference, message):
    with pytest.raises(UserError, match=message):
        find_component(reference, "autoencoder", Path("runs"))


def test_a_part_of_another_kind_is_refused(run):
    with pytest.raises(UserError, match="of kind autoencoder, where kind evaluator is needed"):
        find_component(str(run), "evaluator", Path("runs"))


STAGE = {  # small, and of a class that the kind may be of
    "noise_predictor": ("prior", "model=prior"),
    "generator": ("prior", "model=autoregressive_prior"),
    "evaluator": ("clip", "model=clip"),
}


@pytest.mark.parametrize("kind", STAGE)
def test_a_part_may_be_named_otherwise_than_its_kind(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    name, model = STAGE[kind]
    config = compose(CONF, "train", [model, "size=demo"]).config
    node = config["evaluator"] if kind == "evaluator" else exported_config(config, kind)
    save_component(Path("run/component"), kind, node, build(node), {"fingerprint": "", "data": {}, "scores": {}})
    save_config(Path("run"), config)
    [part] = needed_parts(Path(), Composed({"runs_dir": "runs", "part": {name: "run"}}, {}), None)
    assert part.folder == Path("run/component") and part.kind == name
    with pytest.raises(UserError, match=f"of kind {kind}, where kind autoencoder is needed"):
        find_component("run", "autoencoder", Path("runs"))


def test_a_part_that_several_models_can_be_names_all_their_kinds(run):
    with pytest.raises(UserError, match="of kind autoencoder, where kind noise_predictor or generator is needed"):
        find_component(str(run), "prior", Path("runs"))


@pytest.mark.parametrize(
    ("key", "number"), [("latent_channels", 4), ("downsampling", 8)]
)  # of the run's network; the part has 3 and 2
def test_a_part_of_another_width_is_refused(run, key, number):
    message = f"has {key} {NODE[key]}, this run's autoencoder has {number}: pass autoencoder.{key}={NODE[key]}"
    with pytest.raises(UserError, match=message):
        needed_parts(Path(), composed(str(run), **{key: number}), None)


def test_a_part_with_another_number_of_codes_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = compose(CONF, "train", ["model=dalle", "size.autoencoder.channels=[16,16]", "size=demo"]).config
    node, folder = config["autoencoder"], Path("runs/components/vq")
    save_component(folder, "autoencoder", node, build(node), {"fingerprint": "", "data": {}, "scores": {}})
    config |= {"part": {"autoencoder": str(folder)}, "autoencoder": {**node, "num_codes": 99}}
    with pytest.raises(UserError, match=f"has num_codes {node['num_codes']}, this run's autoencoder has 99"):
        needed_parts(CONF, Composed(config, {}), None)


READS_ONE = ["model=pixel_unet", "conditioner=language_model", "part.evaluator=null", "data=laion", "size=demo"]


def language_model_of(*overrides: str) -> Part:
    [part] = needed_parts(CONF, compose(CONF, "train", [*READS_ONE, *overrides]), "of the data")
    assert part.kind == "language_model" and part.run is not None
    return part


def test_a_language_model_is_a_part_of_the_run_that_reads_it_alone():
    part = language_model_of()
    assert part.config["name"] == "language_model" and part.config["language_model"]["objective"] == "masked"
    for conditioner in ("text", "none", "bert"):
        composed = compose(CONF, "train", [f"conditioner={conditioner}", "size=demo"])
        assert [p.kind for p in needed_parts(CONF, composed, None)] == ["autoencoder", "evaluator"]
        assert "language_model" not in composed.config


def test_a_language_model_is_found_by_what_shapes_it():
    def run(*overrides: str) -> Path | None:
        return language_model_of(*overrides).run

    assert run() == run("seed=5", "trainer.max_steps=7", "model/optimizer=sgd", "network.num_blocks=2")
    others = [
        run(), run("language_model=causal"), run("language_model.width=64"), run("size.language_model.max_steps=9")
    ]  # fmt: skip
    assert len(set(others)) == len(others)


def test_a_language_model_of_another_width_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    node = compose(CONF, "train", ["model=language_model", "size=demo"]).config["language_model"]
    save_component(
        Path("lm"), "language_model", node, build(node), {"fingerprint": "", "data": {}, "scores": {}}
    )  # 128 wide
    composed = compose(CONF, "train", [*READS_ONE, "part.language_model=lm"])
    [part] = needed_parts(CONF, composed, None)
    assert with_parts(composed.config, [part])["part"]["language_model"] == "lm"
    for key, there, here in (("width", 128, 64), ("max_length", 48, 20)):
        composed = compose(CONF, "train", [*READS_ONE, "part.language_model=lm", f"language_model.{key}={here}"])
        with pytest.raises(UserError, match=f"has {key} {there}, this run's language_model has {here}"):
            needed_parts(CONF, composed, None)


def saved_clip(folder: str, **changes: object) -> dict[str, object]:
    """The node of a small evaluator that lies in the folder from now on."""
    sizes = [f"size.evaluator.{key}=16" for key in ("image_width", "text_width", "embedding_width")]
    node = {**compose(CONF, "train", ["model=clip", "size=demo", *sizes]).config["evaluator"], **changes}
    save_component(Path(folder), "evaluator", node, build(node), {"fingerprint": "", "data": {}, "scores": {}})
    return node


def test_a_clip_of_another_width_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved_clip("clip")
    for model in ("prior", "autoregressive_prior", "dalle2"):
        composed = compose(CONF, "train", [f"model={model}", "part.clip=clip", "size=demo"])
        with pytest.raises(UserError, match=r"part\.clip=clip has embedding_width 16, this run's clip has 128: pass"):
            needed_parts(CONF, composed, None)


def test_the_clip_that_made_the_embeddings_does_not_judge_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    node = saved_clip("clip")
    saved_clip("other")
    config = {"runs_dir": "runs", "clip": node, "evaluator": node}
    with pytest.raises(UserError, match=r"part\.evaluator=clip is part\.clip, too, which would judge what it has made"):
        needed_parts(Path(), Composed({**config, "part": {"clip": "clip", "evaluator": "clip"}}, {}), None)
    parts = needed_parts(Path(), Composed({**config, "part": {"clip": "clip", "evaluator": "other"}}, {}), None)
    assert [part.folder for part in parts] == [Path("clip"), Path("other")]


@pytest.mark.parametrize(("named", "found"), [("clip", "evaluator"), ("evaluator", "clip")])
def test_the_clip_that_is_named_is_not_the_evaluator_that_is_found(tmp_path, monkeypatch, named, found):
    monkeypatch.chdir(tmp_path)
    composed = compose(CONF, "train", ["model=dalle2", "size=demo"])
    [part] = [one for one in needed_parts(CONF, composed, "of the data") if one.kind == found]
    assert part.folder is not None
    node = part.config["evaluator"]
    save_component(part.folder, "evaluator", node, build(node), {"fingerprint": "", "data": {}, "scores": {}})
    composed.config["part"][named] = str(part.folder)
    with pytest.raises(UserError, match=r"part\.evaluator=.* is part\.clip, too, which would judge what it has made"):
        needed_parts(CONF, composed, "of the data")


WITHOUT = ["model=evaluator", "model=clip", "model=language_model", "model=vae", "model=classifier"]


@pytest.mark.parametrize("overrides", [[model] for model in WITHOUT])
def test_what_learns_from_captions_needs_some(overrides):
    composed = compose(CONF, "train", [*overrides, "data=laion", "size=demo", "data.caption=null"])
    with pytest.raises(UserError, match=r"data\.caption=null leaves model=\w+ nothing to learn from") as told:
        needed_parts(CONF, composed, None)
    judges = composed.config["name"] in ("evaluator", "vae")  # a run goes without a judge, and without nothing else
    assert ("part.evaluator=null" in str(told.value)) == judges


def test_a_mistake_in_a_part_is_told_with_the_name_of_its_settings():
    for model, kind, size in (("latent_unet", "autoencoder", "autoencoder"), ("prior", "clip", "evaluator")):
        overrides = [f"model={model}", "size=demo", "trainer.devices=3", "trainer.batch_size=9"]
        with pytest.raises(
            UserError, match=rf"part\.{kind}=auto: .*cannot be divided.*; its settings are size\.{size}\.…"
        ):
            needed_parts(CONF, compose(CONF, "train", overrides), None)


def test_no_part_is_no_part(run):
    assert needed_parts(Path(), composed(None), None) == []


def test_parts_of_parts_are_trained_before_them(tmp_path):
    def part(kind: str, *parts: Part) -> Part:
        run = tmp_path / kind
        return Part(kind, run / "component", run, {"name": kind}, parts)

    inner = part("evaluator")
    outer = part("autoencoder", inner)
    trained = []

    def train(folder: Path) -> None:
        trained.append(folder.name)
        (folder / "component").mkdir()
        (folder / "component" / "card.json").write_text(json.dumps({"kind": folder.name}))

    assert in_order([outer, inner]) == [inner, outer]
    train_missing([outer, inner], train)
    assert trained == ["evaluator", "autoencoder"]
    train_missing([outer, inner], train)
    assert trained == ["evaluator", "autoencoder"]


def test_a_part_that_exports_nothing_is_told(tmp_path):
    part = Part("evaluator", tmp_path / "e" / "component", tmp_path / "e")
    with pytest.raises(UserError, match="was trained and not exported"):
        train_missing([part], lambda folder: None)


def test_a_stage_is_a_whole_run(tmp_path, monkeypatch):
    """A component alone does not say how its pictures are sampled."""
    monkeypatch.chdir(tmp_path)
    node = {
        "_target_": "carrara.model.conditioned.Conditioned",
        "network": {"_target_": "carrara.network.caption_mean.CaptionMean", "channels": 3, "context_width": 4},
        "conditioner": {"_target_": "carrara.conditioner.text.Unconditional", "width": 4},
    }
    folder = Path("runs/small")
    save_component(
        folder / "component", "noise_predictor", node, build(node), {"fingerprint": "", "data": {}, "scores": {}}
    )
    with pytest.raises(UserError, match=r"part\.small_pictures=runs/small is a component alone; name its run"):
        find_component("runs/small", "small_pictures", Path("runs"))
    (folder / "config.yaml").write_text("{name: small_pictures}")
    for reference in ("runs/small", "runs/small/component"):
        assert find_component(reference, "small_pictures", Path("runs")) == folder / "component"


def test_all_stages_read_captions_in_the_same_way():
    composed = compose(CONF, "train", ["model=imagen", "conditioner=text", "conditioner.depth=2"])
    [stage] = [part for part in needed_parts(CONF, composed, "data") if part.kind == "small_pictures"]
    assert stage.config["conditioner"] == composed.config["conditioner"]


def test_all_stages_have_one_judge_or_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved_clip("judge")
    for judge in ("judge", "null"):
        overrides = ["model=imagen", "size=demo", "conditioner=none", f"part.evaluator={judge}"]
        parts = needed_parts(CONF, compose(CONF, "train", overrides), "data")
        [stage] = [part for part in parts if part.kind == "small_pictures"]
        there = [Path("judge")] if judge == "judge" else []
        assert [part.folder for part in (*parts, *stage.parts) if part.kind == "evaluator"] == 2 * there
    assert stage.config["name"] == "small_pictures" and "language_model" not in stage.config["part"]
    composed = compose(CONF, "train", ["model=imagen", "language_model=causal"])
    [stage] = [part for part in needed_parts(CONF, composed, "data") if part.kind == "small_pictures"]
    [read] = [part for part in stage.parts if part.kind == "language_model"]
    assert read.config["language_model"]["objective"] == "causal"


def test_a_model_does_not_train_a_part_that_is_trained():
    config = compose(CONF, "train", ["model=autoencoder", "autoencoder=pretrained", "part.autoencoder=x"])
    with pytest.raises(UserError, match=r"part\.autoencoder=x: model=autoencoder trains its own"):
        needed_parts(CONF, config, None)
