"""What of the latents and texts that shards hold a run trains on."""

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from carrara.autoencoder.base import Autoencoder
from carrara.component import read_component
from carrara.conditioner.pretrained import Pretrained
from carrara.config import Config
from carrara.data.cached import Facts, check_facts, shape_text
from carrara.data.module import ShardData
from carrara.data.reader import Decoding, Use
from carrara.errors import UserError
from carrara.model.base import Model


def usable_cache(config: Config, data: ShardData, model: Model, modules: Mapping[str, nn.Module]) -> Use:
    """What of the shards' cache a run trains on.

    Raises:
        UserError: there is a cache, made with something else than the run has.
    """
    autoencoder, conditioner = modules.get("autoencoder"), modules.get("conditioner")
    found = latents_of(config, data, model)
    if found is None:
        return "pictures"
    assert isinstance(autoencoder, Autoencoder)
    check_facts(found, latent_facts(Path(config["part"]["autoencoder"]), autoencoder, data.decoding))
    if not isinstance(conditioner, Pretrained) or found.get("encoder") is None:
        return "latents"
    check_facts(found, text_facts(conditioner, data.decoding))
    return "latents_and_text"


def latents_of(config: Config, data: ShardData, model: Model) -> Facts | None:
    """What the latents that a run would train on were made with; None if there are none, or it learns from pictures.

    Raises:
        UserError: settings that latents do not go with.
    """
    found = data.cached
    if found is None or not model.takes_latents or (config.get("part") or {}).get("autoencoder") is None:
        return None
    if data.stages or data.decoding.flip or len(data.sizes) > 1:
        raise UserError(
            "data.stages, data.flip and data.bucket_aspect change pictures, and the shards hold them encoded: leave "
            "them out, or set data.use_cache=false"
        )
    return found


def latent_facts(folder: Path, autoencoder: Autoencoder, decoding: Decoding) -> Facts:
    """What cached latents depend on; `folder` is the auto-encoder's component."""
    return {
        "autoencoder": read_component(folder, "autoencoder").card["sha256"],
        "resolution": decoding.resolution,
        "crop": decoding.crop,
        "latent_shape": shape_text(autoencoder.latent_shape(decoding.resolution, decoding.resolution)),
    }


def text_facts(conditioner: Pretrained, decoding: Decoding) -> Facts:
    """What cached texts depend on: the encoder, and which caption of a sample it has read."""
    return {**conditioner.facts(), "caption": decoding.caption, "text_width": conditioner.width}
