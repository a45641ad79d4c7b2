"""Makes pictures: `python generate.py run=DIR prompt="…"`; `--help` says more."""

from pathlib import Path

from carrara.command.generate import main
from carrara.command_line import cli

if __name__ == "__main__":
    cli(lambda argv: main(Path(__file__).parent / "conf", argv))
