"""The page of a run: `report.html`, one self-contained file made from nothing but the run's folder."""

import json
import os
import re
import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.resources import files
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from carrara.report_chart import Chart, Series, draw
from carrara.report_folder import (
    Metrics,
    Preview,
    Strip,
    read_config,
    read_json,
    read_metrics,
    read_previews,
    read_strip,
)
from carrara.report_number import format_count, format_duration, format_value
from carrara.report_score import ATTRIBUTES, SCORES, SPLITS, Score, is_score, score_of, split_name
from carrara.report_value import headline, read_values, score_rows

COUNTERS = {"step", "images_seen", "epoch", "time"}
DEFAULT_PROMPT = "a small red circle above a large blue square"


def charts(metrics: Metrics) -> list[tuple[str, list[Markup]]]:
    """All curves by group, empty groups left out."""
    against, label = ("images_seen", "images seen") if metrics.last("images_seen") else ("step", "steps")
    names = [name for name in metrics.names() if name not in COUNTERS and not name.endswith("/num_images")]

    def line(name: str, title: str, *, smooth: bool = False, dashed: bool = False) -> Series:
        return Series(title, metrics.points(name, against), smooth, dashed)

    def chart(title: str, score: Score, lines: list[Series]) -> Markup | None:
        note = f"{score.better} is better" if score.better else ""
        percent = score.unit == "share"

        def write(value: float) -> str:
            return format_value(value, score.unit)

        return draw(Chart(title, lines, label, write, note, percent, score.logarithmic))

    def both(key: str) -> list[Series]:
        return [line(f"val/{key}", "held-out"), line(f"val_seen/{key}", "seen", dashed=True)]

    loss = chart("Loss", SCORES["loss"], [line("train/loss", "train", smooth=True), *both("loss")])
    training = [
        chart(score_of(name).label, score_of(name), [line(name, "train", smooth=name != "train/learning_rate")])
        for name in sorted(names, key=lambda name: split_name(name)[1] in SCORES)
        if name.startswith("train/") and name != "train/loss"
    ]
    logged = dict.fromkeys(split_name(name)[1] for name in names if is_score(name))
    keys = [key for key in [*SCORES, *(key for key in logged if key not in SCORES)] if key in logged]
    scores = [
        chart(score_of(f"val/{key}").label, score_of(f"val/{key}"), both(key))
        for key in keys
        if key not in ATTRIBUTES and key != "loss"
    ]
    attributes = [line(f"val/{key}", SCORES[key].label.lower()) for key in ATTRIBUTES]
    scores.append(chart("By attribute", SCORES[ATTRIBUTES[0]], attributes))
    skipped = [line(name, name.removeprefix("data/skipped_")) for name in names if name.startswith("data/skipped_")]
    data = [chart("Skipped samples", Score("Skipped samples", better="lower"), skipped)]
    data += [
        chart(score_of(name).label, score_of(name), [line(name, "all devices", smooth=True)])
        for name in names
        if not name.startswith(("train/", "val/", "val_seen/", "data/skipped_"))
    ]
    groups = {"Loss and optimiser": [loss, *training], "Scores": scores, "Speed and data": data}
    drawn = ((title, [figure for figure in figures if figure]) for title, figures in groups.items())
    return [(title, figures) for title, figures in drawn if figures]


def epoch_table(metrics: Metrics) -> tuple[list[str], list[list[str]]]:
    """Every evaluation as a row, for those who want numbers: (column titles, cells)."""
    names = [name for name in metrics.names() if is_score(name)]
    rows = [row for row in metrics.rows if any(name in row for name in names)]
    titles = ["Epoch", "Images seen"]
    titles += [f"{score_of(name).label}, {SPLITS[split_name(name)[0]]}" for name in names]
    cells = [
        [format_count(row["epoch"]) if "epoch" in row else "", format_value(row.get("images_seen", 0.0))]
        + [format_value(row[name], score_of(name).unit) if name in row else "" for name in names]
        for row in rows
    ]
    return titles, cells


def flatten(content: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as (dotted key, text), for a table."""
    if isinstance(content, dict):
        for key, value in content.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        text = content if isinstance(content, str) else json.dumps(content, default=str)
        yield prefix, text if len(text) <= 400 else f"{text[:400]} …"


def parts(run_dir: Path, config: dict[str, Any]) -> list[dict[str, str]]:
    """The trained parts this run was built from: kind, reference, link to their own page, first score."""
    references = config.get("part")
    found = []
    for kind, reference in references.items() if isinstance(references, dict) else ():
        if not isinstance(reference, str):
            continue
        bases = [Path.cwd(), *run_dir.resolve().parents]
        folders = [base / reference for base in bases] if reference not in ("", "auto") else []
        folder = next((path for path in folders if path.is_dir()), None)
        entry = {"kind": str(kind).replace("_", " "), "reference": reference, "link": "", "score": ""}
        if folder is not None:
            home = folder.parent if folder.name == "component" else folder
            card = read_json(folder / "card.json") or read_json(folder / "component" / "card.json")
            best = headline(read_values(Metrics(), card))
            entry["score"] = f"{best[0].score.label} {best[0].text}" if best else ""
            if (home / "report.html").is_file():
                entry["link"] = quote(os.path.relpath(home.resolve() / "report.html", run_dir.resolve()))
        found.append(entry)
    return found


def _mapping(content: Any, key: str) -> dict[str, Any]:
    value = content.get(key)
    return value if isinstance(value, dict) else {}


def title(run_dir: Path, config: dict[str, Any]) -> str:
    name, data = config.get("name"), _mapping(config, "data").get("name")
    return f"{name} on {data}" if name and data else str(name or run_dir.resolve().name)


def facts(run_dir: Path, config: dict[str, Any], metrics: Metrics) -> list[tuple[str, str]]:
    """What one wants to know first: (word, value), beginning with the status."""
    found: list[tuple[str, str]] = []
    step, goal = metrics.last("step"), _mapping(config, "trainer").get("max_steps")
    seen, epoch = metrics.last("images_seen"), metrics.last("epoch")
    times = [row["time"] for row in metrics.rows if isfinite(row.get("time", float("nan")))]
    if isinstance(goal, int) and goal > 0 and step is not None:
        done, of = step >= goal, f" of {format_value(goal)}"
    else:
        done, of = (run_dir / "component" / "card.json").is_file(), ""
    found.append(("Status", "finished" if done else "unfinished" if metrics.rows else "nothing logged yet"))
    stamp = re.match(r"(\d{4}-\d\d-\d\d)_(\d\d)-(\d\d)", run_dir.resolve().name)
    if stamp:
        found.append(("Started", f"{stamp[1]} {stamp[2]}:{stamp[3]}"))
    elif times:
        found.append(("Started", datetime.fromtimestamp(times[0], UTC).strftime("%Y-%m-%d %H:%M UTC")))
    if step is not None:
        found.append(("Steps", format_value(step) + of))
    if seen is not None:
        found.append(("Images seen", format_value(seen)))
    if epoch is not None:
        found.append(("Epoch", format_value(epoch)))
    if len(times) > 1 and times[-1] > times[0]:
        found.append(("Wall time", format_duration(times[-1] - times[0])))
    return found


def notes(metrics: Metrics) -> list[str]:
    """What is wrong with the record, one sentence each."""
    found = []
    for name in metrics.names():
        lost = [row for row in metrics.rows if not isfinite(row.get(name, 0.0))]
        if lost:
            where = f", first at step {format_value(lost[0]['step'])}" if "step" in lost[0] else ""
            found.append(f"{name} was not a number {len(lost)} times{where}.")
    if metrics.damaged:
        lines = "1 line" if metrics.damaged == 1 else f"{metrics.damaged} lines"
        found.append(f"{lines} of metrics.jsonl could not be read and was left out (a kill cuts the last one).")
    return found


def commands(
    run_dir: Path, config: dict[str, Any], strip: Strip | None, samples: list[Preview]
) -> list[tuple[str, str]]:
    """What to type next: (purpose, command). A caption becomes the prompt only if it is plain words."""
    here = os.path.relpath(run_dir)
    run = shlex.quote(str(run_dir.resolve()) if here.startswith("..") else here)
    captions = [picture.caption for preview in samples[-1:] for picture in preview.pictures]
    plain = (caption for caption in captions if re.fullmatch(r"[A-Za-z][A-Za-z ,-]{3,80}", caption))
    prompt = next(plain, DEFAULT_PROMPT)
    found = []
    if strip or samples:
        found.append(("Make more pictures", f'python generate.py run={run} prompt="{prompt}"'))
    found.append(("Score it again", f"python evaluate.py run={run}"))
    found.append(("Go on training, if it was stopped", f"python train.py resume={run}"))
    return found


def render(run_dir: Path) -> str:
    """The page as text."""
    text, config = read_config(run_dir / "config.yaml")
    metrics = read_metrics(run_dir / "metrics.jsonl")
    final, card = read_json(run_dir / "scores.json"), read_json(run_dir / "component" / "card.json")
    samples, strip = read_previews(run_dir / "samples", "epoch"), read_strip(run_dir / "samples")
    values = read_values(metrics, final)
    here = files("carrara")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["count"] = format_value
    return environment.from_string(here.joinpath("report_template.html").read_text("utf-8")).render(
        style=Markup(here.joinpath("report_style.css").read_text("utf-8")),
        script=Markup(here.joinpath("report_script.js").read_text("utf-8")),
        title=title(run_dir, config),
        facts=facts(run_dir, config, metrics),
        notes=notes(metrics),
        headline=headline(values),
        rows=score_rows(values),
        samples=samples[::-1],
        strip=strip,
        reconstructions=read_previews(run_dir / "samples", "reconstruction", width=2)[::-1],
        denoised=read_previews(run_dir / "samples", "denoising", width=3)[::-1],
        enlarged=read_previews(run_dir / "samples", "enlarged", width=3)[::-1],
        charts=charts(metrics),
        epochs=epoch_table(metrics),
        parts=parts(run_dir, config),
        commands=commands(run_dir, config, strip, samples),
        config=text,
        fingerprint=list(flatten({"hash": final["hash"]} if "hash" in final else {}))
        + list(flatten(_mapping(final, "fingerprint"))),
        card=list(flatten({k: v for k, v in card.items() if k != "scores"})),
    )


def write_report(run_dir: Path) -> Path:
    """Writes `run_dir/report.html` and returns it; a reader sees the old page or the new one, never half."""
    path = run_dir / "report.html"
    temporary = run_dir / f".report.{os.getpid()}.tmp"
    try:
        with temporary.open("w", encoding="utf-8", errors="replace") as file:
            file.write(render(run_dir))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
