"""Where the files of a text encoder lie, and what may be wrong with them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from carrara.errors import UserError
from carrara.network.hugging_face import EXPORTED, NotFetched, fetch

CONFIG, _WEIGHTS, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "vocab.txt", "vocab.json", "spiece.model")  # one of them is enough
NEEDED = (
    CONFIG, _WEIGHTS, _INDEX, "model-*.safetensors", *_TOKENIZERS,
    "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
_TEXT_ENCODER, _TOKENIZER = "text_encoder", "tokenizer"  # folders of a pipeline in the layout of `diffusers`


def local(model: str, needed: Sequence[str]) -> tuple[Path, Path]:
    """The folders of the model and of its tokenizer: itself, some in it, or its copy in the hub's cache.

    Args:
        needed: patterns of file names, which are downloaded if they are missing in the cache.
    """
    if Path(model).is_dir():
        inner = (Path(model) / name for name in (EXPORTED, f"component/{EXPORTED}"))
        return _of_pipeline(next((folder for folder in inner if folder.is_dir()), Path(model)))
    of_pipeline = [f"{folder}/{name}" for folder in (_TEXT_ENCODER, _TOKENIZER) for name in needed]
    try:
        return _of_pipeline(fetch(model, [*needed, *of_pipeline]))
    except NotFetched as problem:
        raise mistake(model, str(problem)) from None


def _of_pipeline(folder: Path) -> tuple[Path, Path]:
    """The two folders in that of a pipeline, or twice the model's own."""
    if folder.name == _TEXT_ENCODER and (folder.parent / _TOKENIZER).is_dir():
        folder = folder.parent
    inner = folder / _TEXT_ENCODER
    return (inner, folder / _TOKENIZER) if inner.is_dir() else (folder, folder)


def check_files(model: str, folder: Path, tokenizer: Path) -> None:
    """
    Raises:
        UserError: no weights that are read, or no tokenizer.
    """
    with reading(model, _INDEX):
        missing = [name for name in weight_files(folder) if not (folder / name).is_file()]
    if missing:
        raise mistake(
            model,
            f"it has no {missing[0]}; pickled weights are not read, since they can run code: "
            "take a model with safetensors, or convert it with save_pretrained",
        )
    if not any((tokenizer / name).is_file() for name in _TOKENIZERS):
        raise mistake(
            model, f"it has no tokenizer ({' or '.join(_TOKENIZERS)}): save that of the model in the same folder"
        )


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold the weights, whether they are there or not."""
    if (folder / _WEIGHTS).is_file() or not (folder / _INDEX).is_file():
        return [_WEIGHTS]
    return sorted(set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values()))


@contextmanager
def reading(model: str, what: str) -> Iterator[None]:
    """Whatever is wrong with a file of somebody else's: `transformers` has no exception of its own for it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise mistake(model, f"{what} cannot be read ({' '.join(str(error).split())[:200]})") from error


def mistake(model: str, problem: str) -> UserError:
    return UserError(f"conditioner.model={model}: {problem}")
