"""The checks on a config: known keys with "did you mean", types, ranges, and whose classes it may build."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_loader import ConfigLoader
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override

from carrara.errors import UserError

PACKAGES = (
    "autoencoder", "callback", "classifier", "conditioner", "corruption", "data", "diffusion",
    "evaluator", "language_model", "metric", "model", "network", "pipeline",
)  # fmt: skip
PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed")
ACCELERATORS = ("auto", "cpu", "gpu")  # not mps: it has no float64, which the metrics need

# of the trainer's settings
_LEAST = dict.fromkeys(
    (
        "devices", "num_nodes", "batch_size", "accumulate", "max_steps", "epoch_samples", "keep_checkpoints",
        "keep_every", "max_skipped_steps", "log_steps",
    ),
    1,
) | {"keep_best": 0, "max_restarts": 0}  # fmt: skip
_POSITIVE = ("gradient_clip", "checkpoint_minutes", "timeout_s", "learning_rate")
_MAY_BE_NULL = ("epoch_samples", "gradient_clip", "keep_every")

_TARGET = re.compile(rf"carrara\.({'|'.join(PACKAGES)})(\.[A-Za-z]\w*)+")


# --- keys ---


def is_group(loader: ConfigLoader, override: Override) -> bool:
    """Whether the override chooses an option of a group of ours, or drops it: `model=…`, `~experiment`."""
    return not (is_hydras(override) or override.is_add()) and bool(_options(loader, override.key_or_group))


def refuse_sweeps(overrides: Sequence[Override]) -> None:
    """One run takes one value of each key.

    Raises:
        UserError: `seed=1,2` where a single run is composed.
    """
    for override in overrides:
        if override.is_sweep_override():
            key, line = override.key_or_group, override.input_line
            raise UserError(f"{line} gives several values: add -m to sweep over them; one list is {key}=[a,b]")


def check_groups(loader: ConfigLoader, overrides: Sequence[Override]) -> None:
    """Every chosen option exists.

    Raises:
        UserError: an unknown option, or an unknown group in a key with `/`.
    """
    for override in overrides:
        if is_hydras(override):
            continue
        if not override.key_or_group:
            raise UserError(f"{override.input_line!r} has no key before its '='")
        group, options = override.key_or_group, _options(loader, override.key_or_group)
        if not options:
            if "/" in group:
                raise UserError(f"there is no group {group}{did_you_mean(group, list(groups(loader)))}")
            continue
        value = override.value()
        for option in value if isinstance(value, list) else [value]:
            if not override.is_delete() and str(option) not in options:
                hint = did_you_mean(str(option), options) or f"; there are {', '.join(options)}"
                raise UserError(f"{group} has no option {str(option)!r}{hint}")


def check_keys(loader: ConfigLoader, overrides: Sequence[Override], base: Mapping[str, Any]) -> None:
    """Every key set on the command line exists in `base`, the config before values were set, `+` or not.

    Raises:
        UserError: an unknown key, with the nearest known one.
    """
    known = dict(flatten(base))
    names = [*known, *groups(loader)]
    for override in overrides:
        if is_hydras(override):
            continue
        key = override.key_or_group
        if override.is_add() and key in names:
            raise UserError(f"{key} is known and set without the '+': {key}=…")
        if key not in known or override.package is not None:
            raise UserError(f"unknown key {key}{did_you_mean(key, names) or '; --cfg job shows all keys'}")


def check_experiment(path: Path, base: Mapping[str, Any]) -> None:
    """Every key that an experiment's file sets exists in `base`, the same choices without the experiment.

    Raises:
        UserError: an unknown key, named with the file.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    known = dict(flatten(base))
    for key, _ in flatten({k: v for k, v in content.items() if k != "defaults"}):
        if key not in known:
            raise UserError(f"{path.name}: unknown key {key}{did_you_mean(key, list(known))}")


def check_types(overrides: Sequence[Override], base: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """A number stays a number, a switch a switch, a group of settings a group.

    `null` and a list are left to the constructor that reads them, which says if it takes one; `null` in place of a
    group that none reads, as `callback.score`, is refused.

    Raises:
        UserError: a value of another kind than the one it replaces.
    """
    before, after = dict(flatten(base)), dict(flatten(config))
    for key in dict.fromkeys(o.key_or_group for o in overrides if not is_hydras(o) and o.key_or_group in before):
        old, new = before[key], after.get(key)
        parent = after.get(key.rpartition(".")[0])
        read = isinstance(parent, Mapping) and "_target_" in parent
        if new is None and isinstance(old, Mapping) and not read:
            raise UserError(f"{key} is a group of settings, which cannot be null")
        if new is None or old is None or (list in (type(old), type(new)) and read):
            continue
        kind = _kind(old)
        if kind is not None and _kind(new) != kind:
            group = f"; choose one with {key.replace('.', '/')}=…" if kind == "a group of settings" else ""
            raise UserError(f"{key} is {kind} (now {_short(old)}), not {new!r}{group}")


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`; did you mean 'x'?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:  # `devices` for `trainer.devices`, also misspelt
        last = {re.split(r"[./]", name)[-1]: name for name in reversed(known)}
        near = [last[n] for n in difflib.get_close_matches(re.split(r"[./]", word)[-1], list(last), n=1, cutoff=0.75)]
    return f"; did you mean {near[0]!r}?" if near else ""


def flatten(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All dotted keys with their values, inner nodes and positions in lists included."""
    for key, value in node.items():
        path = f"{prefix}{key}"
        yield path, value
        if isinstance(value, Mapping):
            yield from flatten(value, f"{path}.")
        elif isinstance(value, list):
            yield from flatten(dict(enumerate(value)), f"{path}.")


def groups(loader: ConfigLoader, parent: str = "") -> Iterator[str]:
    """Names of all our groups, nested ones as `diffusion/schedule`."""
    for name in loader.list_groups(parent):
        path = f"{parent}/{name}" if parent else name
        if path != "hydra":
            yield path
            yield from groups(loader, path)


def _options(loader: ConfigLoader, group: str) -> list[str]:
    return loader.get_group_options(group, ObjectType.CONFIG)


def is_hydras(override: Override) -> bool:
    return override.key_or_group.split(".")[0].split("/")[0] == "hydra"


def _kind(value: object) -> str | None:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    return "a group of settings" if isinstance(value, Mapping) else None


def _short(value: object) -> str:
    return "several" if isinstance(value, Mapping) else str(value).lower() if isinstance(value, bool) else str(value)


# --- values ---


def refuse_environment(content: object, key: str = "") -> None:
    """No interpolation reads the environment: what it resolves to is written into the run's folder.

    Raises:
        UserError: `${oc.env:…}` anywhere in the plain data (or string) `content`.
    """
    if isinstance(content, Mapping):
        for name, value in content.items():
            refuse_environment(value, f"{key}.{name}" if key else str(name))
    elif isinstance(content, list):
        for number, value in enumerate(content):
            refuse_environment(value, f"{key}.{number}")
    elif isinstance(content, str) and re.search(r"(?<!\\)\$\{\s*(oc\.)?(env|dict\.env)\b", content):
        where = key or content.partition("=")[0]
        raise UserError(f"{where}: environment variables are not read into configs (they may be secrets)")


def refuse_interpolations(content: Mapping[str, Any], place: str = "") -> None:
    """What is built is read as it is written: Hydra would resolve an interpolation, also of the environment, then.

    Args:
        place: what the keys lie in, for the message: `runs/x/config.yaml: `.

    Raises:
        UserError: `${` in a value of the plain data.
    """
    for key, value in flatten(content):
        if isinstance(value, str) and "${" in value:
            raise UserError(f"{place}{key}: ${{…}} is not looked up here; write the value itself")


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Ranges of the `trainer` node.

    Raises:
        UserError: the key, and what it must be.
    """
    if not isinstance(trainer, Mapping):
        raise UserError(f"trainer is a group of settings, not {trainer!r}")
    for key, value in trainer.items():
        if value is None and key in _MAY_BE_NULL:
            continue
        if key in _LEAST and not (type(value) is int and value >= _LEAST[key]):
            raise UserError(f"trainer.{key} must be a whole number from {_LEAST[key]} on, not {value!r}")
        if key in _POSITIVE and not (type(value) in (int, float) and 0 < value < float("inf")):
            raise UserError(f"trainer.{key} must be a positive number, not {value!r}")
        if key == "ema_decay" and not (type(value) in (int, float) and 0 <= value <= 1):
            raise UserError(f"trainer.{key} must be a number from 0 to 1, not {value!r}")
    for key, names in (("precision", PRECISIONS), ("accelerator", ACCELERATORS)):
        if key in trainer and trainer[key] not in names:
            raise UserError(f"trainer.{key} must be one of {', '.join(names)}, not {trainer[key]!r}")


def check_batch(trainer: Mapping[str, Any]) -> None:
    """The global batch can be dealt out.

    Raises:
        UserError: it cannot; the nearest that can.
    """
    if trainer.get("batch_size") is None:
        return
    keys = ("devices", "num_nodes", "accumulate")
    numbers = [int(trainer.get(key, 1)) for key in keys]
    parts = numbers[0] * numbers[1] * numbers[2]
    batch = int(trainer["batch_size"])
    if batch % parts:
        below, above = batch // parts * parts, (batch // parts + 1) * parts
        near = f"{below} or {above}" if below else str(above)
        product = " · ".join(f"trainer.{key}={number}" for key, number in zip(keys, numbers, strict=True))
        raise UserError(f"trainer.batch_size={batch} cannot be divided by {product}: pass {near}")


def targets(content: object) -> Iterator[str]:
    """All `_target_`s in plain data, nested ones too."""
    for node in nodes(content):
        yield str(node["_target_"])


def nodes(content: object) -> Iterator[Mapping[str, Any]]:
    """All that has a `_target_` in plain data, nested ones too."""
    if isinstance(content, Mapping):
        if "_target_" in content:
            yield content
        for value in content.values():
            yield from nodes(value)
    elif isinstance(content, (list, tuple)):
        for value in content:
            yield from nodes(value)


def check_targets(config: Mapping[str, Any]) -> None:
    """Every `_target_` of a config is ours, and those below the node of a group lie in the group's package.

    Raises:
        UserError: the target that does not.
    """
    for node, content in config.items():
        for target in targets({node: content} if node == "_target_" else content):
            check_target(target, *([node] if node in PACKAGES else PACKAGES))


def check_target(target: str, *packages: str) -> None:
    """One target, by its name alone, before any import: `carrara.<package>.…`, of these packages or any.

    Raises:
        UserError: a name outside.
    """
    match = _TARGET.fullmatch(target)
    if match is None or match[1] not in (packages or PACKAGES):
        where = f"carrara.{packages[0]}" if len(packages) == 1 else "the packages of carrara it may come from"
        raise UserError(f"_target_ {target!r} lies outside {where}; it will not be built")
