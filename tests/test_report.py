"""The page of a run, made from a fake run folder: what it shows, what it survives, that it loads nothing."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from carrara.report import write_report
from carrara.report_folder import read_metrics
from carrara.report_value import read_values

TILE = 32
VOID = {"meta", "img", "input", "br", "hr", "link"}
ATTACK = "<script>alert('a')</script> \"x\" onerror=1 & </figcaption>"
COLORS = {"red": (214, 52, 44), "blue": (44, 94, 200), "green": (56, 150, 72), "yellow": (232, 190, 40)}


class Page(HTMLParser):
    """Checks that tags are balanced and collects what the tests ask for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in {"script", "style"}:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.attributes if name == tag]

    def headings(self) -> set[str | None]:
        return {attributes.get("id") for attributes in self.all("h2")}

    def values(self) -> dict[str, float]:
        """The headline tiles: metric name -> value."""
        return {str(a["data-name"]): float(str(a["value"])) for a in self.all("data")}


def shape_picture(index: int, clean: float) -> Image.Image:
    """One coloured shape, mixed with noise: `clean` 0 is all noise, 1 none."""
    image = Image.new("RGB", (TILE, TILE), (236, 233, 226))
    pen = ImageDraw.Draw(image)
    place = [6, 6, 26, 26] if index % 3 else [9, 9, 22, 22]
    color = list(COLORS.values())[index % 4]
    if index % 2:
        pen.ellipse(place, color)
    else:
        pen.rectangle(place, color)
    noise = torch.rand(TILE, TILE, 3, generator=torch.Generator().manual_seed(index)).mul(255).byte()
    return Image.blend(Image.fromarray(noise.numpy()), image, clean)


def shape_caption(index: int) -> str:
    size, color = ("small", "large")[index % 3 > 0], list(COLORS)[index % 4]
    return f"a {size} {color} {('square', 'circle')[index % 2]}"


def write_grid(samples: Path, stem: str, tiles: list[Image.Image], captions: list[object], columns: int) -> None:
    rows = math.ceil(len(tiles) / columns)
    grid = Image.new("RGB", (columns * TILE, rows * TILE))
    for index, tile in enumerate(tiles):
        grid.paste(tile, (index % columns * TILE, index // columns * TILE))
    grid.save(samples / f"{stem}.png")
    (samples / f"{stem}.json").write_text(json.dumps({"captions": captions, "columns": columns, "tile": TILE}))


def metric_lines(epochs: int, seen: bool = True) -> list[dict[str, float]]:
    lines: list[dict[str, float]] = []
    attributes = {
        "count": 0.99,
        "shape": 0.9,
        "color": 0.97,
        "size": 0.93,
        "relation": 0.8,
        "background": 1.0,
    }
    for step in range(20, epochs * 200 + 1, 20):
        done = step / (epochs * 200)
        common = {
            "step": step,
            "images_seen": step * 64,
            "epoch": (step - 1) // 200,
            "time": 1.79e9 + 0.5 * step,
        }
        wobble = math.sin(step * 12.9898) * 0.06
        lines.append(
            {
                **common,
                "train/loss": 0.9 * math.exp(-4 * done) + 0.25 + wobble,
                "train/learning_rate": min(step / 200, 1.0) * 2e-3,
                "train/gradient_norm": 1.5 * math.exp(-3 * done) + 0.4 + wobble,
                "images_per_second": 420 + 100 * wobble,
                "data/skipped_decode": step // 400,
            }
        )
        if step % 200:
            continue
        line = dict(common)
        for split, best in (("val", 0.72), ("val_seen", 0.81)) if seen else (("val", 0.72),):
            share = best * (1 - math.exp(-3 * done))
            line |= {f"{split}/prompt_accuracy/{k}": min(v * share / 0.76, 1.0) for k, v in attributes.items()}
            line |= {f"{split}/prompt_accuracy/all": share, f"{split}/r_precision": share * 1.1}
            line |= {
                f"{split}/fd_evaluator": 900 * math.exp(-4 * done) + 14,
                f"{split}/kd_evaluator": 0.4 - 0.4 * done,
            }
            line |= {
                f"{split}/clip_score": 0.3 + share / 2,
                f"{split}/loss": 0.9 * math.exp(-4 * done) + 0.27,
            }
            line |= {f"{split}/num_images": 256}
        lines.append(line)
    return lines


def make_run(root: Path, epochs: int = 6, attack: bool = False) -> Path:
    """A run folder as training leaves it, with shapes coming out of the noise."""
    run_dir = root / "runs" / "latent_unet-shapes" / "2026-10-02_14-30-05"
    samples = run_dir / "samples"
    samples.mkdir(parents=True)
    (run_dir / "component").mkdir()
    part = root / "runs" / "components" / "autoencoder-3fa9c1d2"
    (part / "component").mkdir(parents=True)
    (part / "component" / "card.json").write_text('{"scores": {"val/recon": 1, "val/psnr": 36.62}}')
    (part / "report.html").write_text("<p>part</p>")
    captions = [shape_caption(index) for index in range(24)]
    captions[1] = ATTACK if attack else captions[1]
    for epoch in range(epochs):
        clean = (epoch + 1) / epochs
        tiles = [shape_picture(index, clean) for index in range(24)]
        entries = [{"caption": c, "correct": (None, i / 20 < clean)[i != 2]} for i, c in enumerate(captions)]
        write_grid(samples, f"epoch={epoch:04d}", tiles, list(entries), 8)
    pairs = [shape_picture(index // 2, 1.0 if index % 2 == 0 else 0.93) for index in range(16)]
    write_grid(samples, f"reconstruction={epochs - 1:04d}", pairs, [{"caption": c} for c in captions[:8]], 4)
    triples = [shape_picture(index // 3, (0.5, 0.93, 1.0)[index % 3]) for index in range(24)]
    for way in ("denoising", "enlarged"):
        write_grid(samples, f"{way}={epochs - 1:04d}", triples, [{"caption": c} for c in captions[:8]], 9)
    steps = 12
    strip = Image.new("RGB", (steps * TILE, 4 * TILE))
    for row in range(4):
        for column in range(steps):
            strip.paste(shape_picture(row, column / (steps - 1)), (column * TILE, row * TILE))
    strip.save(samples / "strip.png")
    times = [1 - step / (steps - 1) for step in range(steps)]
    (samples / "strip.json").write_text(json.dumps({"captions": captions[:4], "t": times}))
    lines = metric_lines(epochs)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run_dir / "config.yaml").write_text(
        f"seed: 0\nname: latent_unet\ndata:\n  name: shapes\n  resolution: 32\n"
        f"  note: {json.dumps(captions[1])}\n"
        f"part:\n  autoencoder: runs/components/autoencoder-3fa9c1d2/component\n  evaluator: auto\n"
        f"trainer:\n  max_steps: {epochs * 200}\n  batch_size: 64\n"
    )
    card = {"fingerprint": "9b2e", "data": {"name": "shapes"}, "parts": {"autoencoder": "3fa9c1d2"}}
    (run_dir / "component" / "card.json").write_text(json.dumps(card))
    final = {name: value for name, value in lines[-1].items() if name.startswith("val") and "num" not in name}
    fields = {
        "extractor": "c41f",
        "sampling": {"sampler": "heun", "num_steps": 12, "guidance": {"scale": 2.0}},
        "ema": True,
        "seed": 0,
    }
    scores = {
        "scores": final,
        "fingerprint": fields,
        "hash": "d0c5a7",
        "num_images": {"val/num_images": 256, "val_seen/num_images": 64},
    }
    (run_dir / "scores.json").write_text(json.dumps(scores))
    return run_dir


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return make_run(tmp_path)


def test_page_has_every_section_and_balanced_tags(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    page = Page(path)
    wanted = {
        "scores",
        "pictures",
        "strip",
        "reconstructions",
        "denoised",
        "enlarged",
        "table",
        "curves",
        "parts",
        "commands",
        "record",
    }
    assert page.headings() == wanted
    assert "latent_unet on shapes" in page.text and "finished" in page.text and "2026-10-02 14:30" in page.text
    assert [p for p in run_dir.iterdir() if p.name.startswith(".")] == []


def test_page_loads_nothing(run_dir: Path) -> None:
    page = Page(write_report(run_dir))
    assert re.search(r"https?:|@import|url\(", page.source) is None
    for _, attributes in page.attributes:
        assert str(attributes.get("src") or "data:").startswith("data:")
        assert not {"srcset", "action", "poster", "background"} & attributes.keys()
    assert {tag for tag, _ in page.attributes}.isdisjoint({"link", "iframe", "object", "embed", "base", "form"})
    links = [str(attributes["href"]) for attributes in page.all("a")]
    assert links == ["../../components/autoencoder-3fa9c1d2/report.html"]
    assert (run_dir / links[0]).is_file()


def test_captions_and_config_are_escaped(tmp_path: Path) -> None:
    page = Page(write_report(make_run(tmp_path, attack=True)))
    assert len(page.all("script")) == 1
    assert "<script>alert" not in page.source
    assert page.text.count(ATTACK) >= 3  # caption, strip and configuration show it as text
    assert not any("onerror" in attributes for _, attributes in page.attributes)
    assert ATTACK in {attributes["alt"] for attributes in page.all("img")}


def test_headline_is_the_last_metrics(run_dir: Path) -> None:
    (run_dir / "scores.json").unlink()
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if "val/prompt_accuracy/all" in row)
    names = ["prompt_accuracy/all", "r_precision", "clip_score", "fd_evaluator", "kd_evaluator"]
    page = Page(write_report(run_dir))
    assert page.values() == {f"val/{name}": last[f"val/{name}"] for name in names}
    assert page.text.count("epoch 5, 256 images") == len(names)
    assert f"{100 * last['val/prompt_accuracy/all']:.1f}\u202f%" in page.text


def test_each_split_has_its_own_number_of_images(run_dir: Path) -> None:
    values = read_values(read_metrics(run_dir / "metrics.jsonl"), json.loads((run_dir / "scores.json").read_text()))
    assert values["val/fd_evaluator"].images == 256 and values["val_seen/fd_evaluator"].images == 64


def test_headline_prefers_final_scores_and_warns_of_few_images(run_dir: Path) -> None:
    content = {
        "scores": {"prompt_accuracy/all": 0.5, "fd_evaluator": 12.5},
        "num_images": {"generated": 100, "real": 900},
    }
    (run_dir / "scores.json").write_text(json.dumps(content))
    page = Page(write_report(run_dir))
    assert page.values()["val/prompt_accuracy/all"] == 0.5
    assert "final scores, 100 images95 % interval 40.4\u201359.6\u202f%" in page.text
    assert "it reads too high" in page.text


def test_page_of_an_autoencoder(tmp_path: Path) -> None:
    line = {
        "step": 9,
        "images_seen": 90,
        "epoch": 0,
        "val/psnr": 31.26,
        "val/reconstruction_accuracy": 0.5,
        "val/loss": 1,
    }
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    page = Page(write_report(tmp_path))
    assert page.values() == {"val/psnr": 31.26, "val/reconstruction_accuracy": 0.5}
    assert "number of images not recorded" in page.text and "31.3\u202fdB" in page.text


def test_cut_line_and_not_a_number(run_dir: Path) -> None:
    (run_dir / "scores.json").unlink()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1210, "images_seen": 77440, "train/loss": NaN, "val/clip_score": -Infinity}\n')
        file.write('{"step": 1220, "images_seen": 78080, "train/loss": null, "text": "a", "flag": true}\n')
        file.write('{"step": 1230, "images_se')
    metrics = read_metrics(run_dir / "metrics.jsonl")
    assert metrics.damaged == 1
    assert "text" not in metrics.names() and "flag" not in metrics.names()
    page = Page(write_report(run_dir))
    assert page.values()["val/clip_score"] == -math.inf
    assert "train/loss was not a number 2 times, first at step 1\u202f210." in page.text
    assert "1 line of metrics.jsonl could not be read" in page.text
    paths = [str(attributes["d"]) for attributes in page.all("path")]
    assert not any(re.search("nan|inf", path) for path in paths)


@pytest.mark.parametrize(
    ("missing", "section"),
    [
        ("metrics.jsonl", "curves"),
        ("samples/strip.json", "strip"),
        ("samples/strip.png", "strip"),
        ("samples/reconstruction=0005.png", "reconstructions"),
        ("samples/denoising=0005.png", "denoised"),
        ("samples/enlarged=0005.png", "enlarged"),
        ("config.yaml", "parts"),
    ],
)
def test_missing_file_leaves_its_section_out(run_dir: Path, missing: str, section: str) -> None:
    everything = Page(write_report(run_dir)).headings()
    (run_dir / missing).unlink()
    assert Page(write_report(run_dir)).headings() == everything - {section}


def test_damaged_files_do_not_stop_the_page(run_dir: Path) -> None:
    for path in [*run_dir.rglob("*.json"), *run_dir.rglob("*.png"), run_dir / "config.yaml"]:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] + b"\x00")
    assert Page(write_report(run_dir)).headings() >= {"curves", "commands"}


def test_empty_folder_has_a_page(tmp_path: Path) -> None:
    page = Page(write_report(tmp_path))
    assert page.headings() == {"commands"}
    assert "nothing logged yet" in page.text


def test_failure_keeps_the_old_page(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = write_report(run_dir).read_bytes()
    monkeypatch.setattr("carrara.report.render", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_report(run_dir)
    assert (run_dir / "report.html").read_bytes() == old
    assert [p.name for p in run_dir.glob(".*")] == []


def test_page_is_replaced_not_rewritten(run_dir: Path) -> None:
    path = write_report(run_dir)
    old = path.read_bytes()
    reader = run_dir / "reader"
    reader.hardlink_to(path)  # stands for a browser that has the old page open
    (run_dir / "config.yaml").unlink()
    assert write_report(run_dir).read_bytes() != old == reader.read_bytes()


def test_commands_never_carry_a_caption_that_is_not_plain_words(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path)
    for path in (run_dir / "samples").glob("epoch=*.json"):
        path.write_text(path.read_text().replace(shape_caption(0), "$(touch x)`y`"))
    text = Page(write_report(run_dir)).text
    command = next(line for line in text.splitlines() if "generate.py" in line)
    assert command.endswith(f'prompt="{shape_caption(1)}"')
