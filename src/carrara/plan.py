"""What a run would do, on one screen, with nothing started: `dry_run=true`."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from carrara.architecture import meta_modules, optimizer_bytes
from carrara.config import Config
from carrara.data.module import ShardData
from carrara.errors import UserError
from carrara.parts import Part, in_order, with_architectures
from carrara.precision import choose_precision

_GIB = 2**30


def describe(config: Config, parts: list[Part], data: ShardData | UserError) -> str:
    """The plan as lines of text.

    Args:
        config: of the run.
        parts: that it needs.
        data: its data, or why they are not there.
    """
    trainer = config["trainer"]
    devices, nodes, accumulate, batch = (trainer[k] for k in ("devices", "num_nodes", "accumulate", "batch_size"))
    modules, model = meta_modules(with_architectures(config, parts))
    lines = [f"{config['name']} on {config['data']['name']}, size {config.get('size')}: the plan, nothing is started"]
    for part in in_order(parts):
        lines.append(_row(part.node, part.kind, _state_of(part)))
        if part.doubt:
            lines.append(_row("", "", part.doubt))
    for name, module in modules.items():
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in module.parameters() if not p.requires_grad)
        counts = [f"{n:,} {word}" for n, word in ((trained, "trained"), (frozen, "frozen")) if n]
        lines.append(_row("parameters", name, ", ".join(counts) or "none"))
    micro = batch // (devices * nodes * accumulate)
    made = f"{nodes} nodes × {devices} devices × {accumulate} accumulated × {micro} a micro-batch"
    lines.append(_row("batch", f"{batch:,}", f"images a step = {made}"))
    lines += _epochs(trainer, data)
    precision, reason = choose_precision(trainer["precision"], trainer["accelerator"])
    lines.append(_row("precision", precision, reason if trainer["precision"] != "auto" else f"here: {reason}"))
    lines += _memory(modules, model)
    return "\n".join(lines)


def _state_of(part: Part) -> str:
    if part.published is not None:
        return f"to be imported from {part.published.reference}"
    if part.is_ready():
        return f"found in {part.folder}"
    trainer = part.config["trainer"]
    steps = f"{trainer['max_steps']:,} steps of {trainer['batch_size']:,} images"
    if part.run is None:
        return f"found once the data are there, or trained first: {steps}"
    return f"to be trained first in {part.run}: {steps}"


def _epochs(trainer: Mapping[str, Any], data: ShardData | UserError) -> list[str]:
    batch, steps = trainer["batch_size"], trainer["max_steps"]
    total = _row("length", f"{steps:,}", f"steps = {steps * batch:,} images") if steps else ""
    images = trainer.get("epoch_samples") or (None if isinstance(data, UserError) else data.num_train)
    if images is None:
        return [
            _row("data", "missing", str(data)),
            _row("epoch", "unknown", "images, until the data are there"),
            total,
        ]
    per_epoch = max(1, images // batch)
    found = [] if isinstance(data, UserError) else [_row("data", f"{data.num_train:,}", "images to train on")]
    missing = [_row("data", "missing", str(data))] if isinstance(data, UserError) else []
    return [*found, *missing, _row("epoch", f"{per_epoch * batch:,}", f"images = {per_epoch:,} steps"), total]


def _memory(modules: Mapping[str, nn.Module], model: nn.Module) -> list[str]:
    """Bytes a device holds all the time; every device holds all of it (DDP copies, it does not split)."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for module in modules.values() for p in module.parameters() if not p.requires_grad)
    sizes = {
        "weights": 4 * trained,
        "gradients": 4 * trained,
        "EMA": 4 * trained,
        "optimizer": optimizer_bytes(model),
        "frozen": 4 * frozen,
    }
    listed = " + ".join(f"{name} {size / _GIB:.2f}" for name, size in sizes.items())
    return [
        _row("memory", f"{sum(sizes.values()) / _GIB:.2f} GiB", f"a device = {listed}"),
        _row("", "", "and activations, which grow with the micro-batch and are not estimated"),
    ]


def _row(title: str, number: str, text: str) -> str:
    return f"  {title:<11} {number:<14} {text}".rstrip()
