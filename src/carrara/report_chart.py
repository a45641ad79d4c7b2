"""Line charts as inline SVG, readable without a script; report_script.js adds values under the pointer."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from markupsafe import Markup

from carrara.report_number import MINUS, format_count

WIDTH, HEIGHT = 340, 200
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 14, 38
MAX_POINTS = 240
FEW_POINTS = 40  # up to here every point gets a dot, and no smoothing

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line: points (x, y) in order, x finite; a y that is not finite breaks the line and is marked."""

    name: str
    points: Sequence[Point]
    smooth: bool = False
    dashed: bool = False

    def finite(self) -> list[Point]:
        return [point for point in self.points if isfinite(point[1])]


@dataclass(frozen=True)
class Chart:
    """Lines over one x axis. `percent` fixes the y axis to shares from 0 to 1; `logarithmic` counts only
    where the values span enough."""

    title: str
    series: Sequence[Series]
    x_label: str
    write: Callable[[float], str]  # a y value for people, unit included
    note: str = ""
    percent: bool = False
    logarithmic: bool = False


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """At most about `most` of the points, evenly taken; the last stays, and so does everything not finite."""
    stride = max(1, ceil(len(points) / most))
    last = len(points) - 1
    return [p for i, p in enumerate(points) if (last - i) % stride == 0 or not isfinite(p[1])]


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Exponential moving average over about 1/40 of the line, without the bias towards its start."""
    keep = 1 - 1 / max(len(points) / 40, 1)
    total = weight = 0.0
    line: list[Point] = []
    for x, y in points:
        if isfinite(y):
            total, weight = keep * total + (1 - keep) * y, keep * weight + (1 - keep)
            line.append((x, total / weight))
        else:
            line.append((x, y))
    return line


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2, 5 times a power of ten) between low and high, low < high."""
    rough = (high - low) / about
    power = 10.0 ** floor(log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.75)
    return [k * step for k in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis, 0 < low < high: powers of ten, 2 and 5 between where few fit."""
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    inside = [f * 10.0**p for p in powers for f in factors if low * 0.999 <= f * 10.0**p <= high * 1.001]
    return inside[:: ceil(len(inside) / 6) or 1]


class _Frame:
    """The axes: data to the SVG's own coordinates."""

    def __init__(self, chart: Chart) -> None:
        xs = [x for line in chart.series for x, _ in line.points]
        ys = [y for line in chart.series for _, y in line.finite()] or [0.0, 1.0]
        self.x_low, self.x_high = min(0.0, *xs), max(xs)
        if self.x_high <= self.x_low:
            self.x_high = self.x_low + 1.0
        low, high = (0.0, 1.0) if chart.percent else (min(ys), max(ys))
        self.logarithmic = chart.logarithmic and low > 0 and high / low > 20
        if self.logarithmic:
            low, high = low / 1.2, high * 1.2
        elif not chart.percent:
            room = 0.08 * (high - low) or abs(high) * 0.1 or 1.0
            low, high = (low - room if low < 0 or low > 2 * room else 0.0), high + room
        self.low, self.high = low, high
        self.y_ticks = decades(low, high) if self.logarithmic else ticks(low, high)
        self.x_ticks = ticks(self.x_low, self.x_high)

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = log10(low), log10(high), log10(max(value, low))
        share = min(max((value - low) / (high - low), 0.0), 1.0)
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * share

    def path(self, points: Sequence[Point]) -> str:
        """The `d` of a path, begun anew after every gap."""
        steps: list[str] = []
        pen = "M"
        for x, y in points:
            if isfinite(y):
                steps.append(f"{pen}{self.x(x):.1f} {self.y(y):.1f}")
                pen = "L"
            else:
                pen = "M"
        return "".join(steps)


def _axes(frame: _Frame, chart: Chart) -> list[Markup]:
    floor_y, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in frame.y_ticks:
        y = frame.y(value)
        parts.append(Markup('<line class="rule" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(LEFT, right, y, y))
        text = f"{100 * value:.0f}%" if chart.percent else _tick(value)
        parts.append(Markup('<text x="{}" y="{:.1f}" class="end">{}</text>').format(LEFT - 6, y + 4, text))
    parts.append(Markup('<line class="axis" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(LEFT, right, floor_y, floor_y))
    for value in frame.x_ticks:
        kind = "end" if frame.x(value) > right - 12 else "mid"
        x = min(frame.x(value), right)
        text = format_count(value)
        parts.append(Markup('<text x="{:.1f}" y="{}" class="{}">{}</text>').format(x, floor_y + 16, kind, text))
    middle = (LEFT + right) / 2
    parts.append(Markup('<text x="{}" y="{}" class="mid">{}</text>').format(middle, HEIGHT - 5, chart.x_label))
    return parts


def _tick(value: float) -> str:
    if abs(value) >= 1e4:
        return format_count(value)
    small = 0 < abs(value) < 1e-4
    return (f"{value:.0e}".replace("e-0", "e-") if small else f"{round(value, 10):g}").replace("-", MINUS)


def _line(frame: _Frame, chart: Chart, series: Series, index: int) -> tuple[list[Markup], list[Point]]:
    """The SVG of one line, and the points it shows."""
    parts: list[Markup] = []
    many = len(series.points) > FEW_POINTS
    raw = thin(series.points)
    shown = thin(smoothed(series.points)) if series.smooth and many else raw
    if shown is not raw:
        parts.append(Markup('<path class="raw" d="{}"/>').format(frame.path(raw)))
    dashes = " dashed" if series.dashed else ""
    parts.append(Markup('<path class="line{}" d="{}"/>').format(dashes, frame.path(shown)))
    finite = [point for point in shown if isfinite(point[1])]
    for x, y in [] if many else finite:
        text = f"{series.name}: {chart.write(y)} at {format_count(x)} {chart.x_label}"
        dot = Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.5"><title>{}</title></circle>')
        parts.append(dot.format(frame.x(x), frame.y(y), text))
    for x, _ in [point for point in raw if not isfinite(point[1])][:MAX_POINTS]:
        cross = Markup('<text class="lost mid" x="{:.1f}" y="{}">&times;<title>not a number</title></text>')
        parts.append(cross.format(frame.x(x), HEIGHT - BOTTOM - 3))
    if finite:
        x, y = finite[-1]
        parts.append(Markup('<circle class="last" cx="{:.1f}" cy="{:.1f}" r="4"/>').format(frame.x(x), frame.y(y)))
        if len(chart.series) == 1:
            room_above = frame.y(y) > TOP + 16
            place = (min(frame.x(x) + 8, WIDTH - 4), frame.y(y) - 9) if room_above else (frame.x(x) - 9, TOP + 3)
            label = Markup('<text class="value end" x="{:.1f}" y="{:.1f}">{}</text>')
            parts.append(label.format(*place, chart.write(y)))
    return [Markup('<g class="c{}">').format(index % 7), *parts, Markup("</g>")], finite


def draw(chart: Chart) -> Markup | None:
    """A `<figure>` with the chart and a legend that carries the final values; None if nothing was logged."""
    if not any(series.points for series in chart.series):
        return None
    frame = _Frame(chart)
    body, hover, legend = _axes(frame, chart), [], []
    for index, series in enumerate(chart.series):
        if not series.points:
            continue
        svg, shown = _line(frame, chart, series, index)
        body += svg
        places = [[round(frame.x(x), 1), round(frame.y(y), 1), format_count(x), chart.write(y)] for x, y in shown]
        hover.append(places)
        name = series.name + (" (smoothed)" if series.smooth and len(series.points) > FEW_POINTS else "")
        value = chart.write(shown[-1][1]) if shown else "not a number"
        entry = Markup('<li class="c{}{}"><i></i>{} <b>{}</b></li>')
        legend.append(entry.format(index % 7, " dashed" if series.dashed else "", name, value))
    ends = ", ".join(f"{s.name} ends at {chart.write(s.finite()[-1][1])}" for s in chart.series if s.finite())
    return Markup(
        '<figure class="chart"><figcaption><strong>{}</strong> <span>{}</span><ul>{}</ul></figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" data-hover="{}">{}'
        '<line class="cursor" y1="{}" y2="{}" visibility="hidden"/></svg></figure>'
    ).format(
        chart.title,
        chart.note,
        Markup("").join(legend),
        WIDTH,
        HEIGHT,
        f"{chart.title} over {chart.x_label}. {ends}",
        json.dumps(hover, separators=(",", ":")),
        Markup("").join(body),
        TOP,
        HEIGHT - BOTTOM,
    )
