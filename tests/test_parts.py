import json
from pathlib import Path

import pytest

from carrara.component import save_component
from carrara.config import Composed, build
from carrara.errors import UserError
from carrara.parts import Part, find_component, in_order, needed_parts, train_missing, with_parts

NODE = {
    "_target_": "carrara.autoencoder.kl.KL",
    "latent_channels": 3,
    "downsampling": 2,
    "channels": [8, 8],
    "num_blocks": 1,
    "patch": 1,
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


@pytest.mark.parametrize(
    ("key", "number"), [("latent_channels", 4), ("downsampling", 8)]
)  # of the run's network; the part has 3 and 2
def test_a_part_of_another_width_is_refused(run, key, number):
    message = f"has {key} {NODE[key]}, this run's autoencoder has {number}: pass autoencoder.{key}={NODE[key]}"
    with pytest.raises(UserError, match=message):
        needed_parts(Path(), composed(str(run), **{key: number}), None)


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

    assert list(in_order([outer, inner])) == [inner, outer, inner]
    train_missing([outer, inner], train)
    assert trained == ["evaluator", "autoencoder"]
    train_missing([outer, inner], train)
    assert trained == ["evaluator", "autoencoder"]


def test_a_part_that_exports_nothing_is_told(tmp_path):
    part = Part("evaluator", tmp_path / "e" / "component", tmp_path / "e")
    with pytest.raises(UserError, match="was trained and not exported"):
        train_missing([part], lambda folder: None)
