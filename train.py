"""Trains a model: `python train.py [model=…] [data=…] [key=value …]`; `--help` says more."""

from pathlib import Path

from carrara.command.train import main
from carrara.command_line import cli

if __name__ == "__main__":
    cli(lambda argv: main(Path(__file__).parent / "conf", argv))
