"""A published part, converted once into a component of ours."""

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn

from carrara.component import CARD, save_component
from carrara.config import build, fingerprint
from carrara.errors import UserError
from carrara.network.hugging_face import sha256_of
from carrara.published import autoencoder, scheduler, unet
from carrara.published.folder import Published, check_fit, find_published, is_published, read_tensors
from carrara.published.names import inverse, renamed

_KINDS: dict[str, ModuleType] = {"autoencoder": autoencoder, "network": unet}


def look_up(reference: str, kind: str) -> Published | None:
    """What a reference names, if it is something published of a kind that can be imported; no weights are fetched.

    Raises:
        UserError: it is published, and not of this kind.
    """
    if kind not in _KINDS or not is_published(reference):
        return None
    return find_published(reference, _KINDS[kind].PART, _KINDS[kind].CLASS)


def node_of(published: Published, kind: str) -> dict[str, Any]:
    """The node that builds it.

    Raises:
        UserError: our part cannot be what its config says.
    """
    file = published.config_file
    try:
        return _KINDS[kind].node_of(file, published.config)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # a text where a number is meant, say
        raise UserError(f"{file}: nothing can be built of it ({error})") from None


def trained_with(published: Published) -> dict[str, Any]:
    """`schedule` and `parameterization` of a published U-Net; nothing where its pipeline is not there.

    Raises:
        UserError: ours cannot be those.
    """
    if published.scheduler is None:
        return {}
    return scheduler.nodes_of(published.folder.parent / "scheduler" / scheduler.FILE, published.scheduler)


def import_published(published: Published, kind: str, runs_dir: Path) -> Path:
    """The component made of it, in `runs_dir/components/published`: found there, or written now.

    Raises:
        UserError: what is there cannot be read, or not by our part.
    """
    node = node_of(published, kind)
    diffusion = trained_with(published) if kind == "network" else {}
    files = published.weight_files()
    sha256 = sha256_of(files)
    name = fingerprint([sha256, published.config, diffusion])
    folder = runs_dir / "components" / "published" / f"{kind}-{name}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if not (folder / CARD).is_file():
            source = {"name": published.reference, "sha256": sha256}
            card: dict[str, Any] = {"fingerprint": name, "data": {}, "scores": {}, "source": source}
            if diffusion:
                card["diffusion"] = diffusion
            save_component(folder, kind, node, _converted(published, kind, node, files), card)
    return folder


def _converted(published: Published, kind: str, node: Mapping[str, Any], files: list[Path]) -> nn.Module:
    part = _KINDS[kind]
    with torch.device("meta"):
        module = build(node)
    state = {key: value.float() for key, value in part.tidied(read_tensors(files)).items()}
    built = {key: value for key, value in module.state_dict().items() if not key.startswith("latent_")}
    check_fit(files[0], state, renamed(built, inverse(part.modules(node))))
    module.load_state_dict(_ours(published, kind, state, node), strict=True, assign=True)
    return module


def _ours(published: Published, kind: str, state: Mapping[str, Tensor], node: Mapping[str, Any]) -> dict[str, Tensor]:
    if kind == "autoencoder":
        return autoencoder.from_published(state, node, published.config)
    return unet.from_published(state, node)
