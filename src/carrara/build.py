"""From a run's resolved config to its objects."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from carrara.autoencoder.base import Autoencoder
from carrara.callback.checkpoint_file import newest_valid
from carrara.callback.ema import trainable
from carrara.callback.inputs import change_of_parts
from carrara.callback.score import Score
from carrara.component import CONDITIONED, load_component, read_component
from carrara.config import Config, build
from carrara.data.module import ShardData
from carrara.diffusion.objective import Objective
from carrara.diffusion.thresholding import Unbounded
from carrara.errors import UserError
from carrara.model.base import Model
from carrara.model.denoising import DenoisingModel
from carrara.parts import STAGES
from carrara.parts_composed import kinds_of
from carrara.pipeline.base import Pipeline
from carrara.pipeline.denoising import Sampling
from carrara.run_folder import component_folder, is_finished, load_config
from carrara.start import begin

_HOPELESS = 1000.0  # sigma / alpha; the linear schedule of DDPM begins at 157, Stable Diffusion's at 15
_JUDGES = ("evaluator", "classifier")
ARCHITECTURES = (
    "network", "discriminator", "conditioner", "language_model", "autoencoder", "clip", "evaluator", "classifier"
)  # fmt: skip
"""In the order in which a plan shows them."""


def build_objective(config: Config) -> Objective:
    """Schedule, target, times and weights of a run; a singular combination is a `UserError`."""
    names = ("schedule", "parameterization", "time_sampling", "weighting")
    try:
        return Objective(**{name: build(config["diffusion"][name]) for name in names})
    except ValueError as error:
        raise UserError(f"diffusion: {error}") from None


def build_sampling(config: Config, autoencoder: nn.Module | None, weak: DenoisingModel | None = None) -> Sampling:
    """How a run samples; steps that its schedule does not have, or bounds on latents, are a `UserError`.

    Args:
        autoencoder: whose latents are sampled; None where it is something else.
        weak: guides.
    """
    node = config["diffusion"]
    sampler, spacing, guidance, thresholding = (
        build(node[name]) for name in ("sampler", "spacing", "guidance", "thresholding")
    )
    is_bounded = isinstance(autoencoder, Autoencoder) and autoencoder.is_bounded
    if not (isinstance(thresholding, Unbounded) or is_bounded):
        raise UserError(
            "diffusion/thresholding keeps pixels in [−1, 1], and the latents of an auto-encoder have no bounds: "
            "take diffusion/thresholding=unbounded, or a pixel model"
        )
    try:
        times = spacing(build(node["schedule"]), node["num_steps"])
    except ValueError as error:
        raise UserError(f"diffusion.spacing: {error}") from None
    return Sampling(sampler, times, guidance, thresholding, weak)


def doubtful_start(objective: Objective, sampling: Sampling) -> str | None:
    """What to expect where a target that tells nothing of x0 meets a first step of next to no signal; None if nothing.

    Not singular, but an error of the network counts sigma / alpha times in the first estimate of x0.
    """
    alpha, sigma = (of(sampling.times[:1].double()) for of in (objective.schedule.alpha, objective.schedule.sigma))
    says_of_x0, _ = objective.parameterization.weights(alpha, sigma)
    if says_of_x0.any() or sigma < _HOPELESS * alpha or not isinstance(sampling.thresholding, Unbounded):
        return None
    name, schedule = objective.parameterization.name, type(objective.schedule).__name__
    return (
        f"diffusion: {name} with the {schedule} schedule multiplies the network's error by {float(sigma / alpha):,.0f} "
        "in the first estimate of x0, and nothing bounds it: expect noise. Take parameterization v, x0 or flow, the "
        "linear or scaled_linear schedule, or in pixels a thresholding"
    )


def build_model(config: Config) -> tuple[Model, dict[str, nn.Module]]:
    """The LightningModule of a run, and its architectures by node; those named in `part` hold their trained weights.

    What the constructor asks for and the model's own node does not say is the node of that name.
    """
    modules: dict[str, nn.Module] = {}
    for name in ARCHITECTURES:
        reference = (config.get("part") or {}).get(name)
        if name == "language_model" and reference is not None:
            continue  # the conditioner has read it
        if reference is not None:
            modules[name] = load_component(Path(reference), *kinds_of(name))[0].requires_grad_(False)
        elif isinstance(config.get(name), Mapping):
            modules[name] = build(_node(config, name))
    node = config["model"]
    available: dict[str, Any] = dict(modules)
    if "diffusion" in config:
        available["objective"] = build_objective(config)
    if "corruption" in config:
        available["corruption"] = build(config["corruption"])
    model_class = build({"_target_": node["_target_"], "_partial_": True})
    rest = {name: value for name, value in available.items() if name not in node}
    return build(node, **_wanted(model_class, rest)), modules


Stage = tuple[Callable[[Model], Pipeline], Model]
"""What makes the pipeline of a part that is a whole run, and its model."""


def build_pipeline(
    config: Config,
    modules: Mapping[str, nn.Module],
    weak: DenoisingModel | None = None,
    stages: Mapping[str, Stage] | None = None,
) -> Callable[[Model], Pipeline]:
    """What makes a pipeline of the run's model as it is then: its `pipeline` node, with what that asks for.

    Args:
        config, modules: of the run.
        weak: guides.
        stages: the parts that are whole runs; by default those that the config names.

    Raises:
        UserError: the run trains nothing that makes pictures, or settings of its sampling that are impossible.
    """
    if "pipeline" not in config:
        raise UserError(f"model={config['name']} makes no pictures")
    if stages is None:
        stages = {name: _stage(Path(folder)) for name, folder in stages_of(config).items()}
    available: dict[str, Any] = {**_judges(config, modules), "resolution": config["data"]["resolution"]}
    if "diffusion" in config:
        available["sampling"] = build_sampling(config, modules.get("autoencoder"), weak)
    node = config["pipeline"]
    factory = build({**node, "_partial_": True})
    wanted = _wanted(factory, available)
    for name in STAGES:
        if name in inspect.signature(factory).parameters and name not in stages:
            raise UserError(f"part.{name}=null: model={config['name']} is sampled after it: auto, or a finished run")

    def pipeline(model: Model) -> Pipeline:
        made = {name: make(stage.to(model.device)) for name, (make, stage) in stages.items()}
        return build(node, model=model, **wanted, **made)

    return pipeline


def stages_of(config: Config) -> dict[str, str]:
    """The parts of a run that are whole runs, by name."""
    part = config.get("part") or {}
    return {name: part[name] for name in STAGES if part.get(name) is not None}


def _stage(component: Path) -> Stage:
    """Of the run that a component was trained in."""
    config, model, modules = load_trained(component.parent)
    return build_pipeline(config, modules), model.requires_grad_(False)


def build_scores(
    config: Config, data: ShardData, modules: Mapping[str, nn.Module], weak: DenoisingModel | None = None
) -> list[Score]:
    """The scores of every epoch, as many as `callback` has nodes; each takes what it asks for of what there is."""
    available: dict[str, Any] = {**_judges(config, modules), "check": data.prompt_check}
    if "pipeline" in config:
        available["pipeline"] = build_pipeline(config, modules, weak)
    made = score_makers(config)
    return [score(**_wanted(score, available)) if isinstance(score, partial) else score for score in made]


def score_makers(config: Config) -> list[Any]:
    """Scores, and of those that judge pictures what makes them of a pipeline and judges.

    Raises:
        UserError: settings that are impossible, or a classifier that none of them asks.
    """
    made = [build(node) for node in config["callback"].values() if isinstance(node, Mapping)]
    asking = [one for one in made if isinstance(one, partial) and "classifier" in inspect.signature(one).parameters]
    if (config.get("part") or {}).get("classifier") is not None and not asking:
        raise UserError(f"part.classifier: no score of model={config['name']} asks one; leave it out")
    return made


def _judges(config: Config, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module | None]:
    """The trained evaluator and classifier of a run; an untrained one never judges."""
    part = config.get("part") or {}
    return {kind: modules.get(kind) if part.get(kind) is not None else None for kind in _JUDGES}


def _wanted(factory: Callable[..., Any], available: Mapping[str, Any]) -> dict[str, Any]:
    """What of `available` a constructor asks for by name."""
    return {name: available[name] for name in available.keys() & inspect.signature(factory).parameters.keys()}


def exported_config(config: Config, kind: str) -> Config:
    """The node a run's exported part is built from."""
    if kind not in CONDITIONED:
        return dict(config["network" if kind == "restoration" else kind])
    return {
        "_target_": "carrara.model.conditioned.Conditioned",
        "network": config["network"],
        "conditioner": _node(config, "conditioner"),
    }


def read_language_model(config: Config) -> str | None:
    """Where the language model is that the run's conditioner reads (`part.language_model`); None if it reads none.

    Raises:
        UserError: it reads one, and none is named.
    """
    part = config.get("part") or {}
    if "language_model" not in part:
        return None
    if part["language_model"] is None:
        raise UserError("part.language_model=null, but the conditioner reads it: auto, or a component or finished run")
    return str(part["language_model"])


def _node(config: Config, name: str) -> Config:
    """What an architecture is built from: its node, and of a conditioner the language model that it reads."""
    folder = read_language_model(config) if name == "conditioner" else None
    return dict(config[name]) if folder is None else {**config[name], "model": folder}


def part_hashes(config: Config) -> dict[str, str]:
    """SHA-256 of the weights of the parts that a run's config names, by the keys of its `part`."""
    part = config.get("part") or {}
    return {name: read_component(Path(part[name])).card["sha256"] for name in part if part[name] is not None}


def _check_parts(folder: Path, config: Config, then: Mapping[str, str]) -> None:
    """What a run samples with is what it was trained with; its judges are named beside their scores."""
    before, now = ({k: v for k, v in one.items() if k not in _JUDGES} for one in (then, part_hashes(config)))
    change = change_of_parts(before, now)
    if change:
        raise UserError(f"{folder} cannot be sampled: {change}. Put back what it was trained with, or train it anew")


def load_trained(
    folder: Path, classifier: str | None = None, checkpoint: Path | None = None
) -> tuple[Config, Model, dict[str, nn.Module]]:
    """A run's config and its model in evaluation mode, with averaged weights: exported, or of the newest checkpoint.

    Args:
        classifier: the folder of one that judges instead of the run's own, or where it has none.
        checkpoint: of the run, to be taken instead.

    Raises:
        UserError: the run has neither, a part was replaced since, or a classifier has nothing to judge in it.
    """
    config = load_config(folder)
    if classifier is not None:
        if "pipeline" not in config:
            raise UserError(f"{config['name']} samples nothing: leave part.classifier out")
        config["part"]["classifier"] = classifier
    if checkpoint is None and is_finished(folder):
        if config["model"].get("lora") is not None:
            config["model"]["lora"] = None  # what is exported has the additions in its weights
        card = read_component(component_folder(folder)).card
        if "parts" in card:  # those of an earlier version do not say
            _check_parts(folder, config, card["parts"])
        model, modules = build_model(config)
        trained, _ = load_component(component_folder(folder), model.kind)
        model.exported.load_state_dict(trained.state_dict())
        return config, model.eval(), modules
    checkpoint = checkpoint or newest_valid(folder / "checkpoints")
    if checkpoint is None:
        raise UserError(f"{folder} has no checkpoint yet: train it with python train.py resume={folder}")
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    _check_parts(folder, config, state["inputs"]["parts"])
    model, modules = build_model(config)
    if config["model"].get("lora") is not None:
        begin(config, model)
        model.on_load_checkpoint(state)
    model.load_state_dict(state["state_dict"], strict=False)  # frozen parts are not in it
    average = state["callbacks"]["EMA"]["average"]
    with torch.no_grad():
        for name, parameter in trainable(model):
            parameter.copy_(average[name])
    return config, model.eval(), modules
