"""`python shards.py do=restore|corrupt`: shards of restored pictures, or of noisy ones to try that on."""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from carrara.command.rewrite import Members, Rewrite, rewrite, source
from carrara.component import load_component, read_component
from carrara.config import Config, build
from carrara.corruption.base import Corruption
from carrara.data.cached import Facts
from carrara.data.reader import Decoding, Sample
from carrara.errors import UserError
from carrara.model.restoration import restored
from carrara.parts import find_component
from carrara.pipeline.pictures import to_uint8
from carrara.precision import default_device

_PICTURES = ("jpg", "png", "webp")


def restore(order: Config) -> None:
    """Writes a shard into `out` for each of `data.urls`: pictures restored, captions and JSON as they are.

    Raises:
        UserError: a mistake in the command, or a folder `out` that holds something else.
    """
    if order["part"]["restoration"] is None:
        raise UserError("part.restoration=…: the part or run of model=restoration that restores the pictures")
    folder = find_component(str(order["part"]["restoration"]), "restoration", Path(order["runs_dir"]))
    data = source(order)
    network = load_component(folder, "restoration")[0].to(default_device())
    facts = {"restoration": read_component(folder).card["sha256"]}

    def pictures(images: Tensor, samples: list[Sample]) -> Tensor:
        return restored(network, images)

    rewrite(data, Path(order["out"]), _anew(pictures), order["batch_size"], _facts(order, facts, data.decoding))


def corrupt(order: Config) -> None:
    """The same with version 0 of the pictures, which `corruption` makes: one of the two that a restoration learns from.

    Raises:
        UserError: as `restore`.
    """
    data = source(order)
    corruption = build(order["corruption"])
    assert isinstance(corruption, Corruption)

    def pictures(images: Tensor, samples: list[Sample]) -> Tensor:
        return corruption(images, [sample.key for sample in samples], 0)

    facts = _facts(order, {"corruption": json.dumps(order["corruption"])}, data.decoding)
    rewrite(data, Path(order["out"]), _anew(pictures), order["batch_size"], facts)


def _anew(pictures: Callable[[Tensor, list[Sample]], Tensor]) -> Rewrite:
    """Writes pictures in [−1, 1] that are made of pictures in [−1, 1] and their samples; the rest stays."""

    @torch.no_grad()
    def anew(samples: list[Sample], originals: list[Members]) -> Iterator[Members]:
        images = torch.from_numpy(np.stack([sample.image for sample in samples])).to(default_device())
        made = to_uint8(pictures(images.float() / 127.5 - 1, samples)).permute(0, 2, 3, 1).cpu().numpy()
        for picture, original in zip(made, originals, strict=True):
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "PNG", compress_level=1)
            yield {"png": file.getvalue()} | {key: data for key, data in original.items() if key not in _PICTURES}

    return anew


def _facts(order: Config, facts: Facts, decoding: Decoding) -> Facts:
    return {"do": order["do"], **facts, "resolution": decoding.resolution, "crop": decoding.crop}
