"""Whether a run and the parts it names belong together, by what their configs and cards say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from carrara.component import read_component
from carrara.config import Config
from carrara.errors import UserError

_INTERFACE = {  # what the network is built to fit
    "autoencoder": ("latent_channels", "downsampling", "num_codes"),
    "language_model": ("width", "max_length"),
    "clip": ("embedding_width",),
}
_OF_CAPTIONS = ("evaluator", "clip", "language_model", "classifier")


def check_interface(kind: str, name: str, theirs: Config, config: Mapping[str, Any]) -> None:
    """A part is what the run's network is built to fit.

    Args:
        kind, name: of the part.
        theirs: the node that it was built from.
        config: of the run.

    Raises:
        UserError: it is not; with the setting that would make it fit.
    """
    node = config.get(kind) or {}
    for key in _INTERFACE.get(kind, ()):
        other, ours = theirs.get(key), node.get(key)
        if other is not None and ours is not None and other != ours:
            raise UserError(
                f"part.{kind}={name} has {key} {other}, this run's {kind} has {ours}: "
                f"pass {kind}.{key}={other}, or another part"
            )


def check_judge(folders: Mapping[str, Path]) -> None:
    """The evaluator is not the CLIP that a generator works with, which would judge itself.

    Args:
        folders: of the components that are there, by kind.

    Raises:
        UserError: they are one.
    """
    hashes = {read_component(folders[kind]).card["sha256"] for kind in ("clip", "evaluator") if kind in folders}
    if {"clip", "evaluator"} <= folders.keys() and len(hashes) == 1:
        raise UserError(
            f"part.evaluator={folders['evaluator']} is part.clip, too, which would judge what it has made: take auto, "
            "or one of another seed"
        )


def check_captions(config: Config) -> None:
    """What learns from captions has some.

    Raises:
        UserError: an evaluator, a classifier or a language model of shards whose captions are not read.
    """
    name = config.get("name")
    if name in _OF_CAPTIONS and config["data"].get("caption", "") is None:
        without = "goes without it (part.evaluator=null), or " if name == "evaluator" else ""
        raise UserError(
            f"data.caption=null leaves model={name} nothing to learn from; a run that would use one {without}"
            f"names a trained one with part.{name}=RUN"
        )
