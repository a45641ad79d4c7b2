"""What a run cannot be, told before anything is trained or has a folder."""

import logging
from collections.abc import Iterator

from carrara import run_folder
from carrara.architecture import check_fit, check_trained, meta_modules
from carrara.autoencoder.base import Autoencoder
from carrara.build import (
    Stage,
    build_model,
    build_objective,
    build_pipeline,
    build_sampling,
    doubtful_start,
    score_makers,
    stages_of,
)
from carrara.cache_use import latent_facts, latents_of
from carrara.config import Config, build, check_settings
from carrara.data.cached import check_facts
from carrara.data.module import ShardData
from carrara.errors import UserError
from carrara.parts import STAGES, Part, folders, in_order, with_architectures

_log = logging.getLogger(__name__)


def check_modules(config: Config, needed: list[Part]) -> None:
    """What cannot be built, or does not fit, is told now, not after the parts are trained."""
    check_settings(config)
    modules, model = meta_modules(with_architectures(config, needed))
    check_trained(config, modules)
    if "diffusion" in config:
        doubt = doubtful_start(build_objective(config), build_sampling(config, modules.get("autoencoder")))
        if doubt is not None:
            _log.warning("%s", doubt)
    for one in (config, *(part.config for part in in_order(needed))):
        for doubt in unreached(one):
            _log.warning("%s", doubt)
    if "corruption" in config:
        build(config["corruption"])
    check_fit(config, modules)
    score_makers(config)
    if "pipeline" not in config:
        return
    stages: dict[str, Stage] = {}
    for part in needed:
        if part.kind in STAGES:  # they may not be trained yet
            theirs = part.config if part.folder is None else run_folder.load_config(part.folder.parent)
            their_modules, their_model = meta_modules(theirs)
            stages[part.kind] = build_pipeline(theirs, their_modules, stages={}), their_model
    build_pipeline(config, modules, stages=stages)(model)


def unreached(config: Config) -> Iterator[str]:
    """What the training of an auto-encoder is too short for."""
    if config.get("name") != "autoencoder":
        return
    steps, model, own = config["trainer"]["max_steps"], config["model"], config["autoencoder"]
    if own.get("anneal_steps", 0) > steps:
        yield (
            f"autoencoder.anneal_steps={own['anneal_steps']} are more than trainer.max_steps={steps}: to the end the "
            "decoder learns from mixtures of codes, and then it gets single ones"
        )
    if model.get("adversarial_weight") and model["adversarial_start"] >= steps:
        yield (
            f"model.adversarial_start={model['adversarial_start']} is after the last of trainer.max_steps={steps}: the "
            "adversary is trained, and nothing learns from it"
        )


def check_cache(config: Config, needed: list[Part], data: ShardData) -> None:
    """Latents that the shards hold are of the run's auto-encoder; one that is still to be trained never made them.

    Raises:
        UserError: they are of another, or settings that latents do not go with.
    """
    if data.cached is None:
        return
    modules, model = meta_modules(with_architectures(config, needed))
    found = latents_of(config, data, model)
    if found is None:
        return
    folder = folders(needed).get("autoencoder")
    if folder is None:
        raise UserError(
            "the shards hold latents, and part.autoencoder=auto would train another auto-encoder than made them: name "
            "theirs with part.autoencoder=…, or set data.use_cache=false"
        )
    autoencoder = modules["autoencoder"]
    assert isinstance(autoencoder, Autoencoder)
    check_facts(found, latent_facts(folder, autoencoder, data.decoding))


def check_stages(config: Config) -> None:
    """Trained stages whose weights do not belong together are told before the run has a folder."""
    if "pipeline" in config and stages_of(config):
        model, modules = build_model(config)
        build_pipeline(config, modules)(model)
