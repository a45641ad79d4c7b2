"""Hydra and OmegaConf as the configs use them: mistakes in one line, and nothing of the environment."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.resolvers import oc

from carrara import config_check
from carrara.errors import UserError


@contextmanager
def hydra_of(conf_dir: Path) -> Iterator[ConfigLoader]:
    """Hydra's loader over `conf_dir`; whatever it or OmegaConf or YAML finds wrong comes out as one UserError."""
    if not conf_dir.is_dir():
        raise UserError(f"the folder of configs {conf_dir} does not exist")
    running = GlobalHydra.instance()  # of the sweep whose run this is, if it is one
    outer, running.hydra = running.hydra, None
    try:
        with initialize_config_dir(str(conf_dir.resolve()), version_base="1.3"):
            yield GlobalHydra.instance().config_loader()
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError(in_words(error)) from None
    finally:
        GlobalHydra.instance().hydra = outer


def parse(loader: ConfigLoader, overrides: Sequence[str]) -> list[Override]:
    parser = OverridesParser.create(config_loader=loader)
    parsed = []
    for override in overrides:
        config_check.refuse_environment(override)
        try:
            parsed.append(parser.parse_override(override))
        except HydraException as error:
            raise UserError(f"{override!r} is not understood: {in_words(error)}; quote the value: key='…'") from None
    return parsed


def plain(config: DictConfig) -> dict[str, Any]:
    """A config to look keys and types up in: resolved, except for what is still missing."""
    with no_environment():
        try:
            content = OmegaConf.to_container(config, resolve=True)
        except OmegaConfBaseException:  # an interpolation that only an override of the user's completes
            content = OmegaConf.to_container(config, resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


@contextmanager
def no_environment() -> Iterator[None]:
    """While it lasts, `oc.env` raises, however the interpolation to it is spelled."""

    def refused(name: str, default: object = None) -> str:
        raise UserError(f"an interpolation reads the environment variable {name}; write the value itself")

    OmegaConf.register_new_resolver("oc.env", refused, replace=True)
    try:
        yield
    finally:
        OmegaConf.register_new_resolver("oc.env", oc.env, replace=True)


def in_words(error: Exception) -> str:
    """Hydra's message in one line, without search paths, links and hints for its own developers."""
    if missing := re.search(r"Could not override '([^']+)'", str(error)):
        return f"there is no {missing[1]} to choose here: leave {missing[1]}=… out"
    lines: list[str] = []
    for line in f"{error}\n{error.__cause__ or ''}".splitlines():
        line = line.strip()
        if line.startswith("Config search path"):
            break
        if (
            line
            and line != "None"
            and not line.startswith(("See https", "full_key:", "object_type=", "Set the environment"))
        ):
            lines.append(line)
    return "; ".join(dict.fromkeys(lines))
