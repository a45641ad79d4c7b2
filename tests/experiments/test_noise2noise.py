"""What the tables of Noise2Noise say of its runs."""

import json
from pathlib import Path

from experiments import noise2noise


def test_targets_are_compared_seed_by_seed(tmp_path, monkeypatch, capsys):
    """Seeds differ by more than targets do."""
    psnr = {"clean-0": 30.0, "clean-1": 32.0, "noisy-0": 29.9, "noisy-1": 31.9}

    def trained(name: str, label: str, overrides: list[str]) -> Path:
        target, seed = label.split("-")[1:]
        assert overrides == [f"model.target={target}", f"seed={seed}", "trainer.max_steps=2"]
        folder = tmp_path / label
        folder.mkdir()
        scores = {"val/psnr": psnr[f"{target}-{seed}"], "val/noisy_psnr": 20.0}
        (folder / "scores.json").write_text(json.dumps({"scores": scores}))
        return folder

    monkeypatch.setattr(noise2noise, "trained", trained)
    found = noise2noise.restorations(
        "it",
        {"gaussian": {"clean": ["model.target=clean"], "noisy": ["model.target=noisy"]}},
        (0, 1),
        ["trainer.max_steps=2"],
        noise2noise.of_pictures,
    )
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| gaussian | clean | 20.00 ± 0.00 | 31.00 ± 1.41 | 0.000 ± 0.000 |"
    assert lines[3] == "| gaussian | noisy | 20.00 ± 0.00 | 30.90 ± 1.41 | 0.100 ± 0.000 |"
    assert found["gaussian", "noisy"] == tmp_path / "gaussian-noisy-0"
