"""Configs: composed and checked, resolved once into plain dicts, built from our own classes only."""

import hashlib
import inspect
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra.utils
import yaml
from hydra import compose as hydra_compose
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from carrara import config_check, config_kind
from carrara.config_hydra import hydra_of, in_words, no_environment, parse, plain
from carrara.errors import UserError

Config = dict[str, Any]

# ${div:a,b}: whole division, for sizes that follow from one another
OmegaConf.register_new_resolver("div", lambda a, b: a // b, replace=True)


@dataclass(frozen=True)
class Composed:
    """A checked config.

    Attributes:
        choices: the option taken from each group (`{"model": "latent_unet", "size": "demo", ...}`).
        size: the numbers of the `size` node, of which the config keeps the name; the run's parts are of this size, too.
    """

    config: Config
    choices: dict[str, str]
    size: Config = field(default_factory=dict)


def compose(conf_dir: Path, name: str, overrides: Sequence[str], nodes: Mapping[str, Any] | None = None) -> Composed:
    """Composes `conf_dir/name.yaml` with overrides and checks all of it before anything is built.

    Args:
        nodes: values by dotted key, taken over whole before interpolations are resolved.

    Raises:
        UserError: an unknown key or option, a value of the wrong type, an environment variable, or a
            `_target_` that is not ours.
    """
    with hydra_of(conf_dir) as loader:
        parsed = parse(loader, overrides)
        config_check.refuse_sweeps(parsed)
        config_check.check_groups(loader, parsed)
        groups = [o for o in parsed if config_check.is_group(loader, o)]
        values = [o for o in parsed if o not in groups]
        base = plain(hydra_compose(name, [o.input_line or "" for o in groups]))
        config_check.check_keys(loader, values, base)
        composed = hydra_compose(name, list(overrides), return_hydra_config=True)
        choices = {k: v for k, v in composed.hydra.runtime.choices.items() if isinstance(v, str)}
        experiment = choices.get("experiment")
        if experiment is not None:
            rest = [f"{k}={v}" for k, v in choices.items() if k != "experiment" and not k.startswith("hydra/")]
            without = plain(hydra_compose(name, ["~experiment", *rest]))
            config_check.check_experiment(conf_dir / "experiment" / f"{experiment}.yaml", without)
        OmegaConf.set_struct(composed, False)
        for key, value in (nodes or {}).items():
            OmegaConf.update(composed, key, value, merge=False)
        config = resolve(composed)
    config_check.check_types(values, base, config)
    check(config)
    return Composed(config, choices, size_of(composed))


def sweep_overrides(conf_dir: Path, overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every run of a sweep, the last key fastest, as Hydra's basic sweeper takes them."""
    with hydra_of(conf_dir) as loader:
        runs: list[list[str]] = [[]]
        for override in parse(loader, overrides):
            if override.is_discrete_sweep():
                key = override.get_key_element()
                values = [f"{key}={value}" for value in override.sweep_string_iterator()]
            elif override.is_sweep_override():  # interval(...): another sweeper draws the values, run by run
                continue
            else:
                values = [override.input_line or ""]
            runs = [[*run, value] for run in runs for value in values]
        return runs


def check(config: Config) -> None:
    """What must hold of every config that is used: composed now, or read from a run's folder."""
    config_check.check_targets(config)
    trainer = config.get("trainer")
    if trainer is not None:
        config_check.check_trainer(trainer)
        if config.get("resume") in (None, "auto"):  # a run that is gone on with has a batch of its own
            config_check.check_batch(trainer)
    seed = config.get("seed", 0)
    if "model" in config and (type(seed) is not int or seed < 0):
        raise UserError(f"seed must be a whole number from 0 on, not {seed!r}")


def size_of(settings: DictConfig) -> Config:
    """The numbers of the `size` node, of a config that is about to be resolved."""
    size = OmegaConf.select(settings, "size")
    return plain(size) if isinstance(size, DictConfig) else {}


def resolve(settings: DictConfig) -> Config:
    """The plain dict: no interpolation, no `hydra` node, of `size` (numbers that others point at) the name alone.

    Raises:
        UserError: a missing value, an interpolation to nothing, or `${oc.env:…}`, which may write a secret to disk.
    """
    config = OmegaConf.masked_copy(settings, [str(key) for key in settings if key != "hydra"])
    config_check.refuse_environment(OmegaConf.to_container(config, resolve=False))
    with no_environment():
        try:
            content = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise UserError(f"{error.full_key or 'config'}: {in_words(error)}") from None
    assert isinstance(content, dict)
    size = content.get("size")
    if isinstance(size, dict):
        content["size"] = size.get("name")
    return {str(key): value for key, value in content.items()}


def build(node: Mapping[str, Any], /, *args: Any, **arguments: Any) -> Any:
    """The object that a node's `_target_` names, nested nodes built first; `arguments` join the node's own.

    Raises:
        UserError: a target that is no class or function of ours, a setting that it does not have or of another kind, an
            interpolation, or what a constructor says of its settings.
    """
    if "_target_" not in node:
        raise UserError(f"a node without _target_ cannot be built; it has {', '.join(node) or 'nothing'}")
    for inner in config_check.nodes(node):
        _check_node(inner, *((args, arguments) if inner is node else ((), {})))
    config_check.refuse_interpolations(node)
    try:  # Hydra builds the nested nodes; the outermost is called here, since Hydra would copy `arguments`
        outermost = hydra.utils.instantiate({**node, "_partial_": True, "_convert_": "all"})
        return outermost if node.get("_partial_") else outermost(*args, **arguments)
    except InstantiationException as error:
        cause = _cause(error)
    except ValueError as error:
        cause = error
    if isinstance(cause, ValueError):  # what our constructors say of their settings
        raise UserError(str(cause)) from cause
    raise cause


def _of_ours(target: str) -> Callable[..., Any]:
    """What a target names. `carrara.data.loader.os.system` has our prefix; what it names has not."""
    config_check.check_target(target)
    try:
        found = hydra.utils.get_object(target)
    except Exception as error:
        raise UserError(f"_target_ {target} cannot be found: {str(error).splitlines()[-1]}") from None
    if not str(getattr(found, "__module__", "")).startswith("carrara.") or not callable(found):
        raise UserError(f"_target_ {target} is not a class or function of carrara; it will not be built")
    return found


def check_settings(config: Mapping[str, Any]) -> None:
    """Every setting of a run is one that its class has, and of the kind that this says.

    Raises:
        UserError: the setting by its key that is not.
    """
    for place, node in config_check.flatten(config):
        if not (isinstance(node, Mapping) and "_target_" in node):
            continue
        for key, wanted in _misfits(node):
            if wanted is not None:
                raise UserError(f"{place}.{key} must be {wanted}, not {json.dumps(node[key])}")
            target, name = node["_target_"], config.get("name")  # the keys of a command line are known by now
            raise UserError(f"{place}.{key}: {target} has no such setting; model={name} goes with another {place}")


def _check_node(node: Mapping[str, Any], args: Sequence[Any], arguments: Mapping[str, Any]) -> None:
    """A node says what its class asks for and `args` and `arguments` do not, and no more: versions differ in that."""
    target = str(node["_target_"])
    parameters = inspect.signature(_of_ours(target)).parameters
    known, given = list(parameters), node.keys() | arguments.keys()
    for key, wanted in _misfits(node):
        if wanted is None:
            raise UserError(f"{target} has no setting {key}{config_check.did_you_mean(key, known)}")
        raise UserError(f"{key} of {target} must be {wanted}, not {json.dumps(node[key])}")
    lacking = [key for key in known[len(args) :] if parameters[key].default is inspect.Parameter.empty]
    if not node.get("_partial_") and (lacking := [key for key in lacking if key not in given]):
        raise UserError(f"{target} needs the setting {lacking[0]}")


def _misfits(node: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Settings of a node that are none of its class's, with None, or of another kind, with what they must be."""
    reader = _of_ours(str(node["_target_"]))
    known = inspect.signature(reader).parameters
    for key, value in node.items():
        if key not in known and not key.startswith("_"):
            yield key, None
        built = isinstance(value, Mapping) and "_target_" in value
        if not built and (wanted := config_kind.mismatch(reader, key, value)):
            yield key, wanted


def _cause(error: BaseException) -> BaseException:
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


# --- files and fingerprints ---


def save_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """Writes plain data, in its own order, whole or not at all, also where the power is cut."""
    text = yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=100)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_yaml(path: Path) -> Config:
    """Reads what `save_yaml` wrote.

    Raises:
        UserError: no such file, none that can be read, or not a mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no settings")
    return content


def fingerprint(content: object) -> str:
    """12 hexadecimal digits of SHA-256 over canonical JSON: keys sorted, 1.0 the same as 1."""
    text = json.dumps(_canonical(content), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _canonical(content: object) -> object:
    if isinstance(content, Mapping):
        return {str(key): _canonical(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_canonical(value) for value in content]
    if isinstance(content, float) and content.is_integer():
        return int(content)
    return content
