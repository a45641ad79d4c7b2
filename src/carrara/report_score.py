"""What every score means in plain words, and how it is written on the page of a run."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

from carrara.report_folder import Metrics, number

NARROW_SPACE = "\u202f"
MINUS = "\u2212"
EN_DASH = "\u2013"
SPLITS = {"val": "held-out", "val_seen": "seen", "train": "train"}


@dataclass(frozen=True)
class Score:
    """How to read one metric. With under `few` images its value should not be trusted much."""

    label: str
    meaning: str = ""
    better: str = ""  # "higher", "lower" or "" where neither is
    unit: str = ""  # "share" (0 to 1, shown in per cent), "dB" or nothing
    few: int = 0
    warning: str = ""  # what goes wrong with few images
    logarithmic: bool = False


_NOISY = "few images: the last digits are chance"
_BIASED = "few images: it reads too high"


def _share(label: str, meaning: str = "") -> Score:
    return Score(label, meaning, better="higher", unit="share", few=200, warning=_NOISY)


def _frechet(label: str, features: str, few: int) -> Score:
    meaning = f"How far the crowd of generated pictures is from the real ones, in {features}."
    return Score(label, meaning, better="lower", few=few, warning=_BIASED, logarithmic=True)


def _kernel(label: str) -> Score:
    meaning = "Like the Fréchet distance, but unbiased with few images; around 0, even below, for the same crowd."
    return Score(label, meaning, better="lower", few=500, warning=_NOISY)


# In the order of importance, which tiles, tables and charts keep.
SCORES: dict[str, Score] = {
    "prompt_accuracy/all": _share(
        "Prompt accuracy",
        "Share of generated pictures that show everything their caption says, read back by an exact parser.",
    ),
    "prompt_accuracy/count": _share("Number of objects"),
    "prompt_accuracy/shape": _share("Shapes"),
    "prompt_accuracy/color": _share("Colours"),
    "prompt_accuracy/size": _share("Sizes"),
    "prompt_accuracy/relation": _share("Relations"),
    "prompt_accuracy/background": _share("Backgrounds"),
    "psnr": Score(
        "PSNR",
        "How close a picture comes back from the auto-encoder, or from noise. 30 dB is good, 40 dB hard to tell apart.",
        better="higher",
        unit="dB",
        few=64,
        warning=_NOISY,
    ),
    "psnr_bicubic": Score(
        "PSNR, bicubic", "How close bicubic enlargement of the shrunken picture comes.", better="higher", unit="dB"
    ),
    "denoised_psnr": Score(
        "PSNR, denoised",
        "How close the estimate of a noisy picture comes to the one without noise; read that of the noisy beside it.",
        better="higher",
        unit="dB",
        few=64,
        warning=_NOISY,
    ),
    "noisy_psnr": Score(
        "PSNR, noisy", "How close the noisy picture is: what there is to gain on.", better="higher", unit="dB"
    ),
    "reconstruction_accuracy": _share(
        "Reconstruction accuracy",
        "Share of pictures that show what their caption says after the auto-encoder too, read by a parser.",
    ),
    "codebook_use": _share("Codebook use", "Share of the codes that occur in the tokens of the pictures."),
    "codebook_perplexity": Score(
        "Codebook perplexity",
        "As many codes, all chosen equally often, would tell as much; at most the number of codes.",
        better="higher",
    ),
    "accuracy": _share("Accuracy", "How often the classifier names a picture's label."),
    "bits_per_token/image": Score(
        "Bits per image token",
        "How many yes-or-no questions about a token are open, once the caption and the tokens before it are known.",
        better="lower",
    ),
    "bits_per_token/image_unigram": Score(
        "Bits per image token, unigram", "The same on the same tokens by counting them alone.", better="lower"
    ),
    "perplexity": Score(
        "Perplexity",
        "How many equally likely tokens the language model would have to choose from, on average.",
        better="lower",
        logarithmic=True,
    ),
    "unigram_perplexity": Score(
        "Unigram perplexity", "The same on the same tokens by counting them alone.", better="lower", logarithmic=True
    ),
    "recall_at_1": _share("Recall at 1", "How often a picture's own caption is the first choice among all candidates."),
    "recall_at_5": _share("Recall at 5", "How often a picture's own caption is among the first five choices."),
    "r_precision": _share(
        "R-precision", "How often the evaluator picks a picture's own caption out of a list of others."
    ),
    "clip_score": Score(
        "CLIP score",
        "How similar picture and caption are to the evaluator, on average.",
        better="higher",
        few=200,
        warning=_NOISY,
    ),
    "prior_cosine": Score(
        "Prior, cosine",
        "Between the prior's embeddings and the pictures' own; 1 is the same direction.",
        better="higher",
    ),
    "quantised_cosine": Score(
        "Tokens, cosine", "The same of the pictures' embeddings once they are tokens: the most that can be had."
    ),
    "text_cosine": Score("Captions, cosine", "The same of the captions' embeddings: what there is to beat."),
    "shuffled_cosine": Score("Other captions, cosine", "The same of the prior's embeddings of other captions."),
    "bits_per_dim": Score(
        "Bits a dimension",
        "A bound on what storing a held-out picture costs, for each of its values; 8 without any model.",
        better="lower",
    ),
    "fid_inception": _frechet("FID (Inception)", "Inception features. 0 is equal", few=10_000),
    "fd_evaluator": _frechet("Fréchet distance", "our evaluator's features. Not an FID", few=2_000),
    "fd_evaluator_bicubic": _frechet("Fréchet distance, bicubic", "the same of bicubic enlargement", few=2_000),
    "fd_cnn": _frechet("Fréchet distance (CNN)", "the features of a classifier trained here. Not an FID", few=2_000),
    "kd_inception": _kernel("Kernel distance (Inception)"),
    "kd_evaluator": _kernel("Kernel distance"),
    "kd_cnn": _kernel("Kernel distance (CNN)"),
    "loss": Score("Loss", "The training objective at fixed, evenly spread times.", better="lower", logarithmic=True),
    "learning_rate": Score("Learning rate"),
    "gradient_norm": Score("Gradient norm", logarithmic=True),
    "images_per_second": Score("Images a second", better="higher"),
}
ATTRIBUTES = [key for key in SCORES if key.startswith("prompt_accuracy/") and key != "prompt_accuracy/all"]


def split_name(name: str) -> tuple[str, str]:
    """`val_seen/psnr` -> (`val_seen`, `psnr`). A score without its split counts as held-out."""
    head, slash, tail = name.partition("/")
    if slash and head in SPLITS:
        return head, tail
    return "val", name


def is_score(name: str) -> bool:
    """Whether a metric was measured on validation data."""
    return name.startswith(("val/", "val_seen/")) and not name.endswith("/num_images")


def score_of(name: str) -> Score:
    """How to read the metric `name` (with or without its split); an unknown one goes under its own name."""
    key = split_name(name)[1]
    return SCORES.get(key) or Score(key.removeprefix("data/").replace("_", " ").replace("/", ": ").capitalize())


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


@dataclass(frozen=True)
class Value:
    """The last value of a score, the number of images it was measured on (None: not recorded), and when."""

    name: str  # with its split: val/psnr
    value: float
    images: int | None
    when: str

    @property
    def score(self) -> Score:
        return score_of(self.name)

    @property
    def text(self) -> str:
        return format_value(self.value, self.score.unit)

    @property
    def interval(self) -> str:
        """The 95 % interval, where the score is a share of images."""
        if self.score.unit != "share" or not self.images or not 0 <= self.value <= 1:
            return ""
        low, high = interval(self.value, self.images)
        return f"{100 * low:.1f}{EN_DASH}{format_value(high, 'share')}"

    @property
    def share(self) -> float | None:
        """The length of its bar, 0 to 1, where it has one."""
        return self.value if self.score.unit == "share" and 0 <= self.value <= 1 else None

    @property
    def warning(self) -> str:
        if not isfinite(self.value):
            return "not a number: see the curves"
        return self.score.warning if self.images is not None and self.images < self.score.few else ""


def _images(name: str, given: Mapping[str, object], metrics: Metrics) -> int | None:
    """The images behind a score: listed by its name or split, else the fewest listed, else logged."""
    split = split_name(name)[0]
    listed = {key: int(value) for key, value in given.items() if isinstance(value, int | float) and isfinite(value)}
    if listed:
        return listed.get(name, listed.get(split, min(listed.values())))
    logged = metrics.last(f"{split}/num_images") or metrics.last("val/num_images")
    return int(logged) if logged and isfinite(logged) else None


def read_values(metrics: Metrics, final: Mapping[str, Any]) -> dict[str, Value]:
    """The scores by full name, the important first: from `final` (scores.json, a card) or last logged."""
    values: dict[str, Value] = {}
    for name in metrics.names():
        row = next(row for row in reversed(metrics.rows) if name in row)
        if is_score(name):
            when = f"epoch {format_count(row['epoch'])}" if "epoch" in row else "last logged"
            values[name] = Value(name, row[name], _images(name, {}, metrics), when)
    scores, counts = final.get("scores"), final.get("num_images")
    for given, entry in scores.items() if isinstance(scores, dict) else ():
        value, name = number(entry), "/".join(split_name(str(given)))
        if value is not None and is_score(name):
            images = _images(name, counts if isinstance(counts, dict) else {}, metrics)
            values[name] = Value(name, value, images, "final scores")
    rank = {key: place for place, key in enumerate(SCORES)}
    return dict(sorted(values.items(), key=lambda item: rank.get(split_name(item[0])[1], len(rank))))


def headline(values: Mapping[str, Value]) -> list[Value]:
    """The scores on held-out data that deserve a tile; the loss only where there is nothing better."""
    major = [f"val/{key}" for key in SCORES if key not in ATTRIBUTES and key != "loss"]
    return [values[name] for name in major if name in values] or [v for k, v in values.items() if k == "val/loss"]


@dataclass(frozen=True)
class Row:
    """Held-out beside seen; the gap between them is what the model has not learned to generalise."""

    key: str
    held_out: Value | None
    seen: Value | None

    @property
    def score(self) -> Score:
        return score_of(f"val/{self.key}")

    @property
    def is_attribute(self) -> bool:
        return self.key in ATTRIBUTES

    @property
    def images(self) -> str:
        """The number of images beside the scores: one number, or two where the splits differ."""
        counts = [value.images for value in (self.held_out, self.seen) if value]
        return " / ".join(dict.fromkeys(format_value(count) if count is not None else "?" for count in counts))

    @property
    def gap(self) -> str:
        if not self.held_out or not self.seen or not isfinite(self.held_out.value - self.seen.value):
            return ""
        difference = self.held_out.value - self.seen.value
        text = f"{100 * difference:+.1f} pt" if self.score.unit == "share" else f"{difference:+.3g}"
        return text.replace("-", MINUS) if difference else "0"


def score_rows(values: Mapping[str, Value]) -> list[Row]:
    keys = dict.fromkeys(split_name(name)[1] for name in values)
    return [Row(key, values.get(f"val/{key}"), values.get(f"val_seen/{key}")) for key in keys]
