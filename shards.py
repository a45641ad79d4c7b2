"""Makes and checks shards: `python shards.py do=make|inspect`; `--help` says more."""

from pathlib import Path

from carrara.command.shards import main
from carrara.command_line import cli

if __name__ == "__main__":
    cli(lambda argv: main(Path(__file__).parent / "conf", argv))
