"""`python shards.py do=cache`: shards that hold, beside each picture, what frozen parts make of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from carrara.autoencoder.base import Autoencoder
from carrara.build import read_language_model
from carrara.cache_use import latent_facts, text_facts
from carrara.command.rewrite import Members, rewrite, source
from carrara.component import load_component
from carrara.conditioner.pretrained import Pretrained
from carrara.config import Config, build
from carrara.data.cached import SUFFIX, Cached, Facts, pack
from carrara.data.reader import Decoding, Sample
from carrara.errors import UserError
from carrara.parts import find_component
from carrara.parts_composed import AUTO
from carrara.precision import default_device


def cache(order: Config) -> None:
    """Writes a shard into `out` for each of `data.urls`, see `rewrite`.

    Raises:
        UserError: a mistake in the command, or shards in `out` that were made with something else.
    """
    if order["part"]["autoencoder"] is None:
        raise UserError("part.autoencoder=…: the auto-encoder that encodes the pictures of do=cache")
    folder = find_component(str(order["part"]["autoencoder"]), "autoencoder", Path(order["runs_dir"]))
    data = source(order)
    encoder = _Encoder.load(folder, order, data.decoding)
    rewrite(data, Path(order["out"]), encoder, order["batch_size"], encoder.facts)


def _read_by_it(order: Config) -> dict[str, str]:
    """What a conditioner that reads a language model of one's own is built with besides."""
    reference = read_language_model(order)
    if reference is None:
        return {}
    if reference == AUTO:
        raise UserError("part.language_model=auto: do=cache trains none; name the component or run that reads captions")
    return {"model": str(find_component(reference, "language_model", Path(order["runs_dir"])))}


@dataclass(frozen=True)
class _Encoder:
    autoencoder: Autoencoder
    text: Pretrained | None
    facts: Facts

    @classmethod
    def load(cls, folder: Path, order: Config, decoding: Decoding) -> "_Encoder":
        autoencoder, _ = load_component(folder, "autoencoder")
        text = build(order["conditioner"] | _read_by_it(order))
        assert isinstance(autoencoder, Autoencoder)
        facts = latent_facts(folder, autoencoder, decoding)
        if isinstance(text, Pretrained):
            facts |= text_facts(text, decoding)
        elif order["conditioner"]["_target_"] != "carrara.conditioner.text.Unconditional":
            raise UserError("conditioner: only frozen text encoders can be cached: clip, t5, bert, gpt2, or none")
        facts = {**facts, "dtype": order["dtype"]}
        if order["dtype"] not in ("float16", "float32"):
            raise UserError(f"dtype={order['dtype']} is not known; it is float16 or float32")
        device = default_device()
        return cls(
            autoencoder.to(device).eval(), text.to(device).eval() if isinstance(text, Pretrained) else None, facts
        )

    @torch.no_grad()
    def __call__(self, samples: list[Sample], originals: list[Members]) -> Iterator[Members]:
        """Each as it is, with one member more."""
        autoencoder = self.autoencoder
        pixels = torch.from_numpy(np.stack([sample.image for sample in samples])).to(autoencoder.latent_mean.device)
        mean, logvar = autoencoder.posterior(pixels.float() / 127.5 - 1)
        scale = autoencoder.latent_std[:, None, None]
        mean = (mean - autoencoder.latent_mean[:, None, None]) / scale
        std = (0.5 * logvar).exp() / scale
        encoded = None if self.text is None else self.text([sample.caption for sample in samples])
        for k, original in enumerate(originals):
            cached = Cached(mean[k].cpu().numpy(), std[k].cpu().numpy())
            if encoded is not None:
                tokens = encoded.tokens[k][encoded.mask[k]].cpu().numpy()
                cached = cached._replace(tokens=tokens, pooled=encoded.pooled[k].cpu().numpy())
            yield original | {SUFFIX.removeprefix("."): pack(cached, self.facts)}
