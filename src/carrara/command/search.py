"""`python shards.py do=search`: pictures in shards by a sentence or a picture, and near-duplicates."""

import hashlib
import json
import logging
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from carrara.component import load_component
from carrara.config import Config, build
from carrara.data.decode import DecodeError, decode_image
from carrara.data.module import ShardData
from carrara.data.reader import Samples
from carrara.errors import UserError
from carrara.evaluator.clip import CLIP
from carrara.parts import find_component
from carrara.pipeline.pictures import save_grid
from carrara.precision import default_device
from carrara.run_folder import made_folder
from carrara.search.embeddings import embed_images, embed_shards, embed_texts
from carrara.search.index import near_duplicates, open_index

_log = logging.getLogger(__name__)
_COLUMNS = 8
_SENTENCES = 64  # that an index is tuned by


def search(order: Config) -> None:
    """Embeds what is not embedded yet, and answers.

    Raises:
        UserError: a mistake in the command.
    """
    asked = [key for key in ("query", "image", "duplicates") if order[key] is not None]
    if len(asked) != 1:
        raise UserError("say what to search for: query='…', image=FILE, or duplicates=0.98 for pictures that are alike")
    least = order["duplicates"]
    if least is not None and not (type(least) in (int, float) and -1 <= least <= 1):
        raise UserError(f"duplicates={least} is a cosine from -1 to 1, say 0.98")
    if order["part"]["evaluator"] is None:
        raise UserError(
            "part.evaluator=…: name the evaluator that looks at the pictures, a component's or a run's folder"
        )
    folder = find_component(str(order["part"]["evaluator"]), "evaluator", Path(order["runs_dir"]))
    evaluator, card = load_component(folder, "evaluator")
    assert isinstance(evaluator, CLIP)
    evaluator.to(default_device()).eval()
    node = order["data"]
    data: ShardData = build({key: value for key, value in node.items() if key not in ("make", "root")})
    place = Path(node["cache_dir"]) / "search" / f"{card['sha256'][:16]}-{node['resolution']}-{node['crop']}"
    samples = data.samples()
    embeddings = embed_shards(data.manifest, samples, evaluator, place, order["batch_size"], node["num_workers"])
    if embeddings is None:
        raise UserError("not all shards are embedded yet: ask again when the other processes are done")
    name = hashlib.sha256("".join(shard.digest for shard in data.manifest.shards).encode()).hexdigest()[:16]

    def sentences() -> NDArray[np.float32]:
        captions = [caption for caption in data.captions(_SENTENCES) if caption]
        return embed_texts(evaluator, captions) if captions else np.empty((0, embeddings.width), dtype=np.float32)

    index = open_index(embeddings, place, name, sentences)
    out = made_folder(Path(order["out"] or Path(order["runs_dir"]) / "search" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"))
    if asked == ["duplicates"]:
        groups = near_duplicates(embeddings, index, least)
        keys = [[samples.reader.key(k) for k in group] for group in groups]
        (out / "duplicates.json").write_text(json.dumps(keys, indent=1), encoding="utf-8")
        extra = sum(len(group) - 1 for group in groups)
        print(f"{len(groups):,} groups: {extra:,} of {len(embeddings):,} pictures are like another")
        _log.info("%s", out / "duplicates.json")
        return
    scores, ids = index.search(_asked(order, evaluator), order["num_results"])
    found = [(score, k) for score, k in zip(scores[0].tolist(), ids[0].tolist(), strict=True) if k >= 0]
    if not found:
        raise UserError("data.urls: not one picture can be decoded; shards.py do=doctor says why")
    results = []
    for score, k in found:
        results.append({"key": samples.reader.key(k), "cosine": score, "caption": _caption(samples, k)})
        print(f"{score:.3f}  {results[-1]['key']}  {results[-1]['caption']}")
    (out / "results.json").write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
    pictures = Samples(samples.reader, replace(samples.decoding, caption=None))
    images = torch.stack([torch.from_numpy(np.array(pictures.load(k).image)) for _, k in found])
    save_grid(out / "grid.png", images, _COLUMNS, [{"caption": one["caption"], "correct": None} for one in results])
    _log.info("%s", out / "grid.png")


def _caption(samples: Samples, k: int) -> str:
    """Of a result, or in brackets why it has none."""
    try:
        return samples.caption(k)
    except DecodeError as error:
        return f"({error.reason})"


def _asked(order: dict[str, Any], evaluator: CLIP) -> NDArray[np.float32]:
    if order["query"] is not None:
        return embed_texts(evaluator, [str(order["query"])])
    try:
        picture = decode_image(Path(str(order["image"])).read_bytes(), order["data"]["resolution"])
    except OSError as error:
        raise UserError(f"image={order['image']} cannot be read: {error.strerror}") from None
    except DecodeError as error:
        raise UserError(f"image={order['image']} is no picture that can be used: {error}") from None
    return embed_images(evaluator, torch.from_numpy(picture)[None])
