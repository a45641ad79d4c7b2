"""A run's architectures on PyTorch's meta device: what they are and whether they fit, without memory or data."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import hydra.utils
import torch
from torch import Tensor, nn

from carrara.autoencoder.base import Autoencoder
from carrara.autoencoder.identity import Identity
from carrara.build import ARCHITECTURES, read_language_model
from carrara.conditioner.base import Conditioner
from carrara.conditioner.pretrained import check_layer
from carrara.config import Config, build
from carrara.data.buckets import bucket_sizes
from carrara.errors import UserError
from carrara.model.base import Model
from carrara.network.conditioning import Conditioning
from carrara.network.generator import Generator
from carrara.network.tarflow import TarFlow
from carrara.network.variational import Variational


def meta_modules(config: Config) -> tuple[dict[str, nn.Module], Model]:
    """The run's architectures by node, parts it does not train frozen, and the LightningModule that holds them.

    All are on PyTorch's meta device: shapes without memory.
    """
    node = config["model"]
    parameters = inspect.signature(hydra.utils.get_object(node["_target_"])).parameters.values()
    with torch.device("meta"):
        modules = {name: _build(config, name) for name in ARCHITECTURES if _is_used(config, name)}
        for name in (config.get("part") or {}).keys() & modules.keys():
            modules[name].requires_grad_(False)
        # what is neither a setting nor an architecture (an objective, say) has no parameters to count
        rest = {p.name: modules.get(p.name) for p in parameters if p.name not in node}
        model: Model = build(node, **rest)
    known = {id(p) for module in modules.values() for p in module.parameters()}
    others = nn.ParameterList(p for p in model.parameters() if id(p) not in known)
    if len(others):
        modules["other"] = others  # a discriminator, say
    return modules, model


def check_trained(config: Config, modules: Mapping[str, nn.Module]) -> None:
    """What a model takes as it is has been trained: random weights would be others at every start.

    Args:
        config: of the run.
        modules: of `meta_modules`.

    Raises:
        UserError: an auto-encoder or CLIP that is frozen and that no part is named for.
    """
    part = config.get("part") or {}
    for name in ("autoencoder", "clip"):
        parameters = list(modules[name].parameters()) if name in modules else []
        if parameters and part.get(name) is None and not any(one.requires_grad for one in parameters):
            if name not in part:
                raise UserError(f"{name}: model={config['name']} takes none that has to be trained; leave {name}=… out")
            raise UserError(
                f"part.{name}=null: model={config['name']} needs a trained one and does not train it: auto, or a "
                "component or finished run"
            )


def check_fit(config: Config, modules: Mapping[str, nn.Module]) -> None:
    """Calls a noise predictor, a network that restores, a flow or a generator once on shapes without numbers.

    Args:
        config: of the run.
        modules: of `meta_modules`.

    Raises:
        UserError: it does not fit the latents or pictures, or the conditioner's tokens.
    """
    if isinstance(own := modules.get("autoencoder"), Autoencoder):
        _check_downsampling(own, "resolution", config["data"]["resolution"])
        if config["data"]["bucket_aspect"] != 1:
            _check_downsampling(own, "bucket_multiple", config["data"]["bucket_multiple"])
    if config["data"]["resolution"] % (factor := config["model"].get("factor", 1)):
        raise UserError(f"model.factor={factor} does not divide data.resolution={config['data']['resolution']}")
    if "corruption" in config:
        _check_restoration(config, modules)
        return
    if "autoencoder" in modules and ("diffusion" in config or isinstance(modules.get("network"), TarFlow)):
        autoencoder: nn.Module = modules["autoencoder"]
    else:
        if isinstance(modules.get("network"), Generator | Variational):
            _check_generator(config, modules)
        return
    network, conditioner = modules["network"], modules["conditioner"]
    assert isinstance(autoencoder, Autoencoder) and isinstance(conditioner, Conditioner)
    data, width = config["data"], conditioner.width
    for height_px, width_px in bucket_sizes(data["resolution"], data["bucket_aspect"], data["bucket_multiple"]):
        shape = autoencoder.latent_shape(height_px, width_px)
        time: tuple[tuple[int, ...], ...] = () if isinstance(network, TarFlow) else ((),)
        problem = _problem(network, (shape, *time), shape, width)
        if problem is None:
            continue
        if height_px == width_px:
            raise UserError(
                f"network: it does not fit latents of {shape} and captions of width {width} ({problem}); its "
                "in_channels, resolution, context_width and pooled_width follow from them and need not be given"
            )
        raise UserError(
            f"data.bucket_aspect: the network does not fit pictures of {height_px} × {width_px} ({problem}); take a "
            "larger data.bucket_multiple, or networks without learned positions"
        )


def _check_downsampling(autoencoder: Autoencoder, key: str, pixels: int) -> None:
    if pixels % autoencoder.downsampling:
        raise UserError(
            f"data.{key}={pixels}: such pictures do not become latents, for autoencoder.downsampling="
            f"{autoencoder.downsampling} does not divide it"
        )


def _check_restoration(config: Config, modules: Mapping[str, nn.Module]) -> None:
    data = config["data"]
    for height, width in bucket_sizes(data["resolution"], data["bucket_aspect"], data["bucket_multiple"]):
        shape = (3, height, width)
        problem = _of_answer(partial(modules["network"], torch.empty(1, *shape, device="meta")), shape)
        if problem is not None:
            raise UserError(f"network: it does not restore pictures of {shape} ({problem}); network=drunet does")


def _check_generator(config: Config, modules: Mapping[str, nn.Module]) -> None:
    network, conditioner, data = modules["network"], modules["conditioner"], config["data"]
    assert isinstance(network, Generator | Variational) and isinstance(conditioner, Conditioner)
    if data["bucket_aspect"] != 1:
        raise UserError(f"data.bucket_aspect: model={config['name']} makes square pictures; leave it 1.0")
    side, width = data["resolution"], conditioner.width
    autoencoder = modules.get("autoencoder", Identity())  # a variational auto-encoder has no other
    assert isinstance(autoencoder, Autoencoder)
    shape = autoencoder.latent_shape(side, side)
    problem = _problem(network, (network.noise_shape,), shape, width)
    if problem is not None:
        raise UserError(
            f"network: it does not fit latents of {shape} and captions of width {width} ({problem}); "
            "pyramid.in_channels, pyramid.resolution, pyramid.context_width and pooled_width follow from them and "
            "need not be given"
        )


def _problem(network: nn.Module, inputs: tuple[tuple[int, ...], ...], shape: tuple[int, ...], width: int) -> str | None:
    """Why it does not answer inputs of these shapes, told with captions of this width, with `shape`; None if it does.

    All shapes are of one sample.
    """
    with torch.device("meta"):
        mask = torch.ones(1, 2, dtype=torch.bool)
        texts = Conditioning(torch.empty(1, 2, width), mask, torch.empty(1, width))
        conditioning = texts.with_picture(torch.empty(1, 3, *shape[1:]), torch.empty(1))  # for networks that take one
        return _of_answer(lambda: network(*(torch.empty(1, *one) for one in inputs), conditioning), shape)


def _of_answer(call: Callable[[], Tensor | tuple[Tensor, ...]], shape: tuple[int, ...]) -> str | None:
    """Why a call fails, or what else than one sample of this shape is answered; None if nothing is wrong."""
    try:
        answer = call()
    except (RuntimeError, ValueError, TypeError) as mistake:  # TypeError: of a network with other inputs
        return str(mistake).partition("\n")[0].rstrip(".")
    found = tuple((answer[0] if isinstance(answer, tuple) else answer).shape[1:])  # a flow's has its log-determinant
    return None if found == shape else f"it answers with {found}"


def optimizer_bytes(model: nn.Module) -> int:
    """Bytes of the optimizer's state, from one step on tensors without memory."""
    optimizer = model.configure_optimizers()["optimizer"]  # type: ignore[operator]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.numel() * value.element_size() for value in states if isinstance(value, torch.Tensor))


def _build(config: Config, name: str) -> nn.Module:
    if name == "conditioner" and (part := read_language_model(config)) is not None:
        if not Path(part).exists():  # or it is asked itself, once it is read
            check_layer("this language model", config[name].get("layer"), config["language_model"]["depth"])
        return Conditioner(config[name]["width"])  # has no weights but the part's, which may not be trained yet
    module = build(config[name])
    assert isinstance(module, nn.Module)
    return module


def _is_used(config: Config, name: str) -> bool:
    node = config.get(name)
    return isinstance(node, Mapping) and "_target_" in node
