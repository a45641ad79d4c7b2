"""Every YAML of conf/diffusion builds the class it names, with arguments that class has."""

import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig

from carrara.diffusion.guidance import Guidance
from carrara.diffusion.parameterization import Parameterization
from carrara.diffusion.sampler import Ancestral, Sampler
from carrara.diffusion.schedule import NoiseSchedule
from carrara.diffusion.spacing import Spacing
from carrara.diffusion.thresholding import Thresholding
from carrara.diffusion.time_sampling import TimeSampler
from carrara.diffusion.weighting import LossWeighting

CONF = Path(__file__).parents[2] / "conf" / "diffusion"
GROUPS = {
    "schedule": NoiseSchedule,
    "parameterization": Parameterization,
    "time_sampling": TimeSampler,
    "weighting": LossWeighting,
    "sampler": Sampler,
    "spacing": Spacing,
    "guidance": Guidance,
    "thresholding": Thresholding,
}
FILES = sorted(path for group in GROUPS for path in (CONF / group).glob("*.yaml"))


def load(path: Path) -> DictConfig:
    with initialize_config_dir(str(CONF.parent), version_base="1.3"):
        return compose(f"diffusion/{path.parent.name}/{path.stem}").diffusion[path.parent.name]


def test_every_group_has_a_config():
    assert {path.parent.name for path in FILES} == set(GROUPS)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_config_builds_a_part_of_its_group(path: Path):
    config = load(path)
    part = instantiate(config)
    assert isinstance(part, GROUPS[path.parent.name])
    assert set(config) - {"_target_"} <= set(inspect.signature(get_class(config._target_)).parameters)


def test_ddpm_ddim_and_euler_ancestral_are_one_class():
    built = {
        name: instantiate(load(CONF / "sampler" / f"{name}.yaml"))
        for name in ("ddpm", "ddpm_large", "ddim", "euler_ancestral")
    }
    assert {type(part) for part in built.values()} == {Ancestral}
    assert {(part.eta, part.variance) for part in built.values()} == {
        (1, "posterior"),
        (1, "beta"),
        (0, "posterior"),
    }
