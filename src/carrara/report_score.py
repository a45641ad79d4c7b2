"""What every score means in plain words."""

from dataclasses import dataclass

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
