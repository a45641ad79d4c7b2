"""One process of a run: reads the run's config, trains, exports. Started by `carrara.launch`, once per device."""

import itertools
import logging
import os
import warnings
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn

from carrara.build import build_model, build_scores, exported_config, part_hashes
from carrara.cache_use import usable_cache
from carrara.callback.checkpoint import Checkpoints, best_score, retention
from carrara.callback.checkpoint_file import VerifiedCheckpointIO, checkpoint_step, newest_valid
from carrara.callback.components import MeasureComponents
from carrara.callback.ema import EMA
from carrara.callback.evaluation import Evaluation
from carrara.callback.export import Export
from carrara.callback.guard import Guard
from carrara.callback.inputs import Inputs
from carrara.callback.json_lines import cut_back
from carrara.callback.log import JsonLines, Wandb
from carrara.callback.progress import Progress
from carrara.callback.stop import Stop
from carrara.callback.vocabulary import LearnVocabularies
from carrara.config import Config, build, fingerprint
from carrara.data.module import ShardData
from carrara.data.workers import workers_explained
from carrara.model.base import Model
from carrara.model.diffusion import DiffusionModel
from carrara.network.unet import UNet
from carrara.precision import choose_precision, set_arithmetic
from carrara.published.adapter import write_adapter
from carrara.rank import rank_main
from carrara.report import write_report
from carrara.run_folder import load_config
from carrara.score_card import score_card
from carrara.start import begin

_log = logging.getLogger("carrara.worker")  # by name: this module runs as __main__

_VOCABULARY_CAPTIONS = 1_000_000  # more add nothing to a vocabulary
_MEASURED_IMAGES = 4096  # for the latents' mean and standard deviation, and the components of embeddings
_MEASURED_AT_ONCE = 16  # on one device, however many share a batch in training, and the same numbers for any of them


def run(folder: Path) -> None:
    """Trains the run in `folder` from its newest checkpoint, or from the start, to its end."""
    _quieten()
    config = load_config(folder)
    settings = config["trainer"]
    set_arithmetic()
    torch.manual_seed(config["seed"])  # the same initial weights on every rank
    data: ShardData = build(config["data"])
    model, modules = build_model(config)
    if settings["compile"]:
        for module in model.hot:
            module.compile()  # in place: no prefix in the state dict
    checkpoint = newest_valid(folder / "checkpoints")
    if checkpoint is None or config["model"].get("lora") is not None:  # a checkpoint has all else
        begin(config, model)
    position = 0 if checkpoint is None else checkpoint_step(checkpoint) * settings["batch_size"]
    epoch_steps = max(1, (settings["epoch_samples"] or data.num_train) // settings["batch_size"])
    log = JsonLines(folder / "metrics.jsonl", settings["batch_size"], epoch_steps)
    precision, reason = choose_precision(settings["precision"], settings["accelerator"])
    trainer = lightning.Trainer(
        accelerator=_accelerator(settings["accelerator"]),
        devices=settings["devices"],
        num_nodes=settings["num_nodes"],
        strategy=_strategy(settings),
        precision=precision,  # type: ignore[arg-type]
        max_steps=settings["max_steps"],
        max_epochs=-1,
        accumulate_grad_batches=settings["accumulate"],
        gradient_clip_val=settings["gradient_clip"],
        callbacks=_callbacks(config, folder, data, model, modules, log, precision),
        plugins=_plugins(),
        logger=[log, *_wandb(config, folder, epoch_steps)],
        deterministic=settings["deterministic"],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    if trainer.is_global_zero:
        for line in data.report():
            _log.info("%s", line)
        _log.info("precision %s: %s", precision, reason)
        if config["callback"]["score"].get("inception", "") is None:
            _log.info("no val/fid_inception: no weights (callback.score.inception=…/inception-2015-12-05.pt)")
        cut_back(log.path, 0 if checkpoint is None else checkpoint_step(checkpoint))
        if checkpoint is not None:
            _log.info("going on from %s", checkpoint)
    use = usable_cache(config, data, model, modules)
    if data.cached is not None and trainer.is_global_zero:
        rest = "; their latents are left alone" if use == "pictures" else ""
        _log.info("training on the %s in the shards%s", use.replace("_", " "), rest)
    loader = data.train_loader(
        settings["batch_size"],
        trainer.global_rank,
        trainer.world_size,
        settings["accumulate"],
        settings["max_steps"],
        position,
        use,
    )
    try:
        with workers_explained():
            trainer.fit(model, loader, ckpt_path=checkpoint, weights_only=True)
    finally:
        loader.close()
    for logger in trainer.loggers:
        if isinstance(logger, Wandb):
            logger.finish()
    if trainer.is_global_zero:
        _log.info("report: %s", write_report(folder).resolve())


def _callbacks(
    config: Config,
    folder: Path,
    data: ShardData,
    model: Any,
    modules: dict[str, nn.Module],
    log: JsonLines,
    precision: str,
) -> list[Callback]:
    settings, node = config["trainer"], config["callback"]
    batch_size, epoch_steps = settings["batch_size"], log.steps_per_epoch
    ema = EMA(settings["ema_decay"])
    scores = build_scores(config, data, modules)
    evaluation = Evaluation(scores, data.validation, epoch_steps, ema, folder / "samples", log)
    guard = Guard(folder / "skipped_steps.jsonl", settings["max_skipped_steps"])
    keep = retention(
        settings["keep_checkpoints"],
        settings["keep_every"],
        settings["keep_best"],
        lambda: best_score(log.scores(), settings["best_score"], settings["best_is_highest"]),
    )
    checkpoints = Checkpoints(
        folder / "checkpoints", settings["checkpoint_minutes"], epoch_steps, keep, batch_size, ema
    )
    parts = part_hashes(config)
    card: dict[str, Any] = {
        "fingerprint": fingerprint(config),
        "data": {"name": data.name, "fingerprint": data.fingerprint},
        "parts": parts,
    }
    if "diffusion" in config:
        card["diffusion"] = {key: config["diffusion"][key] for key in ("schedule", "parameterization")}

    images = partial(images_to_measure, data)
    return [
        Inputs(data, parts),
        LearnVocabularies(lambda: data.captions(_VOCABULARY_CAPTIONS), data.every_caption),
        MeasureComponents(images),
        ema,
        guard,
        Progress(settings["log_steps"], batch_size, evaluation, node["headline"], guard),
        checkpoints,
        Stop(checkpoints),
        evaluation,
        Export(
            folder,
            exported_config(config, model.kind),
            images,
            ema,
            evaluation,
            card,
            partial(score_card, config, data.validation.fingerprint, precision),
            partial(_write_adapter, config),
        ),
    ]


def images_to_measure(data: ShardData) -> Iterator[Tensor]:
    """The first training pictures in small batches, uint8; of each of the data's groups as many, as in training."""
    at_once = max(1, _MEASURED_AT_ONCE // data.groups) * data.groups
    batches = data.train_loader(at_once)
    yield from itertools.islice((batch["images"] for batch in batches), -(-_MEASURED_IMAGES // at_once))


def _write_adapter(config: Config, model: Model, folder: Path) -> None:
    """The additions of LoRA to a U-Net by themselves, too."""
    if isinstance(model, DiffusionModel) and model.lora is not None and isinstance(model.predictor.network, UNet):
        write_adapter(folder / "adapter", model.predictor.network, config["network"])


def _accelerator(setting: str) -> str:
    """Lightning's own `auto` would take Apple's MPS, which has no float64 for the metrics."""
    if setting != "auto":
        return setting
    return "cuda" if torch.cuda.is_available() else "cpu"


def _strategy(settings: dict[str, Any]) -> Strategy | str:
    if settings["devices"] * settings["num_nodes"] == 1:
        return "auto"
    return DDPStrategy(timeout=timedelta(seconds=settings["timeout_s"]), gradient_as_bucket_view=True)


def _plugins() -> list[Any]:
    # under srun Lightning would choose its own environment; torchrun's variables are set in every case
    return [VerifiedCheckpointIO(), *([TorchElasticEnvironment()] if "RANK" in os.environ else [])]


def _wandb(config: Config, folder: Path, epoch_steps: int) -> list[Wandb]:
    settings = config["logger"]["wandb"]
    if "disabled" in (settings["mode"], os.environ.get("WANDB_MODE")):
        return []
    return [Wandb(folder, config, config["trainer"]["batch_size"], epoch_steps)]


def _quieten() -> None:
    """Lightning's advice is for those who call it by hand."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")


if __name__ == "__main__":
    rank_main(run)
