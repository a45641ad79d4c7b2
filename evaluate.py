"""Scores a run or a folder of pictures: `python evaluate.py run=DIR`; `--help` says more."""

from pathlib import Path

from carrara.command.evaluate import main
from carrara.command_line import cli

if __name__ == "__main__":
    cli(lambda argv: main(Path(__file__).parent / "conf", argv))
