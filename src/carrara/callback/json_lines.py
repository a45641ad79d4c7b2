"""Files with one JSON object a line, each of a step."""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in their order, without a line that was cut by a kill; none if there is no file."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, KeyError):
            continue
        yield row


def append(path: Path, lines: Sequence[str]) -> None:
    """All of the lines at the end of the file; where there is no room for them it is left as it was.

    Raises:
        OSError: why they could not be written.
    """
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
    except OSError:
        if path.exists():
            os.truncate(path, before)  # the next line would go on where this one was cut
        raise


def cut_back(path: Path, step: int) -> None:
    """Forget what was written after `step`, before a resumed run writes it again."""
    if not path.exists():
        return
    kept = [json.dumps(row) + "\n" for row in rows(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    os.replace(temporary, path)
