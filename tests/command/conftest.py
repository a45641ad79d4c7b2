"""A small tree of configs beside the repository's own train.yaml, and a worker that trains nothing."""

import os
import shutil
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

SHAPES = """
    # @package _global_
    defaults: [override /size: demo]
    data:
      _target_: carrara.data.module.ShardData
      name: shapes
      root: data/shapes
      make:
        _target_: carrara.data.shapes_shards.write_shapes
        _partial_: true
        num_train: 24
        num_val: 4
        num_val_seen: 4
        resolution: ${data.resolution}
      urls: ${data.root}/train-*.tar
      val_urls: ${data.root}/val-*.tar
      resolution: ${size.resolution}
      seed: ${seed}
      cache_dir: ${runs_dir}/cache
      num_workers: 0
      bucket_aspect: 1.0
"""
KL = """
    _target_: carrara.autoencoder.kl.KL
    latent_channels: ${size.latent_channels}
    downsampling: 2
    channels: [8, 8]
    num_blocks: 1
    patch: 1
    kl_weight: 1.0e-6
"""
TRAINED = """
    optimizer: {_target_: carrara.model.optimizer.Muon, _partial_: true, lr: 0.001, momentum: 0.9, betas: [0.9, 0.9], weight_decay: 0.0}
    warmup_steps: 1
    cooldown: 0.5
    max_steps: ${trainer.max_steps}
    seed: ${seed}
"""  # noqa: E501
MODEL = """
    model:
      _target_: carrara.model.autoencoder.AutoencoderModel
      perceptual: null
      perceptual_weight: 0.0
      adversarial_weight: 0.0
      adversarial_start: 0
"""
AUTOENCODER = (
    """
    # @package _global_
    defaults: [/autoencoder: kl, /model/base: default]
    name: autoencoder
    seed: 11
    part: {}
    trainer: {batch_size: 8, max_steps: 3}
    callback: {}
"""
    + MODEL
)
LATENT = (
    """
    # @package _global_
    defaults: [/autoencoder: kl, /model/base: default]
    name: latent_unet
    part: {autoencoder: auto}
    trainer: {batch_size: 8, max_steps: 5}
    network: {in_channels: '${autoencoder.latent_channels}'}
    callback: {num_images: 8}
"""
    + MODEL
)
TRAINER = """
    devices: 1
    num_nodes: 1
    accelerator: auto
    precision: auto
    batch_size: ???
    accumulate: 1
    max_steps: ???
    epoch_samples: null
    max_restarts: 0
    compile: false
    timeout_s: 600
    checkpoint_minutes: 10
    keep_checkpoints: 2
    keep_every: null
    keep_best: 0
    best_score: null
    best_is_highest: true
    deterministic: false
    log_steps: 50
"""
FILES = {
    "trainer/default.yaml": TRAINER,
    "size/demo.yaml": "{name: demo, resolution: 32, latent_channels: 3}",
    "size/base.yaml": "{name: base, resolution: 64, latent_channels: 4}",
    "data/shapes.yaml": SHAPES,
    "data/laion.yaml": SHAPES.replace("demo", "base").replace("shapes\n", "laion\n", 1),
    "autoencoder/kl.yaml": KL,
    "model/base/default.yaml": "# @package model" + TRAINED,
    "model/autoencoder.yaml": AUTOENCODER,
    "model/latent_unet.yaml": LATENT,
}
WORKER = """
    import os, time
    from pathlib import Path
    from carrara.component import save_component
    from carrara.config import build
    from carrara.rank import rank_main
    from carrara.run_folder import component_folder, load_config

    def run(folder):
        config = load_config(folder)
        with (folder / "trained.txt").open("a") as log:  # one letter a start, kept when a run goes on
            log.write(os.environ["RANK"])
        with (folder.parent / "order.txt").open("a") as log:
            log.write(f"{folder.name}\\n")
        wait = Path("hold")
        while wait.exists():
            time.sleep(0.02)
        if Path("fail").exists():
            raise SystemExit(3)
        if os.environ["RANK"] == "0":
            node = config["autoencoder"]
            card = {"fingerprint": "", "data": {}, "scores": {}, "steps": config["trainer"]["max_steps"]}
            save_component(component_folder(folder), "autoencoder", node, build(node), card)

    if __name__ == "__main__":
        rank_main(run)
"""


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of configs; the working directory is an empty one, and `stub_worker` can be imported."""
    folder = tmp_path / "conf"
    for name, text in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text).strip() + "\n")
    for name in ("train.yaml", "logger/wandb.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "conf" / name, folder / name)
    (folder / "experiment").mkdir()
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "stub_worker.py").write_text(textwrap.dedent(WORKER))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{tmp_path / 'modules'}")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return folder
