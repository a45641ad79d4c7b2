import multiprocessing
from pathlib import Path
from typing import Any

import pytest

from carrara.errors import UserError
from carrara.run_folder import (
    claim,
    component_folder,
    continued,
    create_run_folder,
    create_sweep_folder,
    find_run,
    load_config,
    save_config,
)

CONFIG = {"name": "x", "seed": 1, "trainer": {"devices": 1, "batch_size": 8, "max_steps": 5}}


def make(runs_dir: Path) -> str:
    return create_run_folder(runs_dir, "latent_unet", "shapes").name


def test_runs_that_start_together_have_their_folders(tmp_path):
    with multiprocessing.get_context("fork").Pool(4) as pool:
        names = pool.map(make, [tmp_path] * 16)
    assert len(set(names)) == 16
    assert sorted(names) == sorted(path.name for path in (tmp_path / "latent_unet-shapes").iterdir())
    assert create_sweep_folder(tmp_path).parent == tmp_path / "sweeps"


def test_a_claimed_folder_is_refused(tmp_path):
    with (
        claim(tmp_path),
        pytest.raises(UserError, match="is being trained by another process"),
        claim(tmp_path),
    ):
        pass
    with claim(tmp_path):
        pass


def test_a_config_is_checked_when_it_is_read(tmp_path):
    save_config(tmp_path, CONFIG)
    assert load_config(tmp_path) == CONFIG
    save_config(tmp_path, {**CONFIG, "network": {"_target_": "subprocess.run", "_args_": ["true"]}})
    with pytest.raises(UserError, match=r"subprocess\.run"):
        load_config(tmp_path)
    with pytest.raises(UserError, match="is no run"):
        load_config(tmp_path / "other")


def test_a_run_is_found_by_its_path_or_its_place(tmp_path, monkeypatch):
    folder = create_run_folder(tmp_path / "runs", "x", "shapes")
    save_config(folder, CONFIG)
    monkeypatch.chdir(tmp_path)
    assert find_run(str(folder), Path("elsewhere")) == folder
    assert find_run(f"x-shapes/{folder.name}", tmp_path / "runs") == folder
    with pytest.raises(UserError, match="there is no run x-shapes"):
        find_run("x-shapes", tmp_path / "runs")
    (part := component_folder(folder)).mkdir()
    (part / "card.json").touch()
    save_config(part, {"network": {}})
    with pytest.raises(UserError, match="is a trained part; name the run's folder, which component/ lies in"):
        find_run(str(part), tmp_path / "runs")


def test_what_may_change_in_a_resumed_run():
    now = {"trainer": {"devices": 2, "batch_size": 4, "max_steps": 7, "timeout_s": 9.0}, "data": {"urls": "elsewhere"}}
    keys = ("trainer.devices", "trainer.max_steps", "trainer.timeout_s", "data.urls")
    saved: dict[str, Any] = {**CONFIG, "data": {"urls": "here", "resolution": 32}}
    assert continued(saved, now, keys) == {
        **saved,
        "trainer": {"devices": 2, "batch_size": 8, "max_steps": 7, "timeout_s": 9.0},
        "data": {"urls": "elsewhere", "resolution": 32},
    }
    assert saved["trainer"] == {"devices": 1, "batch_size": 8, "max_steps": 5} and saved["data"]["urls"] == "here"
    with pytest.raises(UserError, match="seed cannot change"):
        continued(saved, {"seed": 2}, ["seed"])


def test_a_longer_run_has_its_learning_rate_fall_at_the_new_end():
    saved = CONFIG | {"model": {"max_steps": 5}}  # resolved from ${trainer.max_steps} when the run began
    assert continued(saved, {"trainer": {"max_steps": 7}}, ["trainer.max_steps"])["model"]["max_steps"] == 7
    assert saved["model"] == {"max_steps": 5}
