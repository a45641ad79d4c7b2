"""Numbers as people read them."""

from math import isfinite, sqrt

NARROW_SPACE = "\u202f"
MINUS = "\u2212"
EN_DASH = "\u2013"


def format_value(value: float, unit: str = "") -> str:
    """A number for people, with its unit: 0.875 as a share is 87.5 %."""
    if not isfinite(value):
        return "not a number"
    if unit == "share":
        return f"{100 * value:.1f}{NARROW_SPACE}%".replace("-", MINUS)
    if unit == "dB":
        return f"{value:.1f}{NARROW_SPACE}dB".replace("-", MINUS)
    digits = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
    return digits.replace(",", NARROW_SPACE).replace("-", MINUS)


def format_count(value: float) -> str:
    """A short count for an axis: 12800 -> 12.8k."""
    if not isfinite(value):
        return "not a number"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """3725 -> 1 h 02 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share observed on `count` images (Wilson 1927)."""
    z = 1.96
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(middle - half, 0.0), min(middle + half, 1.0)
