"""What stands between the shell and Hydra: free text, flags, and one way to fail.

Hydra's override grammar gives braces, commas, apostrophes, brackets and `=` a meaning. In a prompt, a shard spec
or a path they have none, so those values are quoted here before the grammar sees them.
"""

import logging
import re
import signal
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from typing import NoReturn

from hydra.core.override_parser.types import Quote, QuotedString

from carrara.errors import MachineError, UserError, full_disk
from carrara.signals import SIGNALS, exit_on_signal

FREE_TEXT = frozenset(
    {
        "prompt",
        "query",
        "data.urls",
        "data.val_urls",
        "image",
        "images",
        "mask",
        "run",
        "resume",
        "weak",
        "runs_dir",
        "out",
        "export",
        "start.network",
    }
)  # and every key below `part.`
LISTS = frozenset({"prompt", "query", "data.urls", "data.val_urls", "image", "images"})  # `[a,b]` is a list here
TEXT_ALONE = frozenset({"prompt", "query"})  # here even `null` is a word

_OVERRIDE = re.compile(r"(?P<sign>\+\+|\+)?(?P<key>[A-Za-z_][\w./@-]*)=(?P<value>.*)", re.DOTALL)
_QUOTED = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_INTERPOLATION = re.compile(r"(\\*)\$\{")
_FLAGS_WITH_VALUE = frozenset({"--cfg", "-c", "--package", "-p"})
_FLAGS = frozenset({"--multirun", "-m", "--help", "-h", "--hydra-help", "--resolve", "--version"})


class RunFailed(Exception):
    """A run ended with an exit code other than 0, and what was wrong is already on the screen."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


def quote(text: str) -> str:
    """`text` as one quoted value of the override grammar; `${` in it is text, not an interpolation."""
    literal = _INTERPOLATION.sub(r"\1\1\\${", text)  # OmegaConf: \${ is literal, and backslashes before it double
    return QuotedString(literal, Quote.single).with_quotes()


def quote_free_text(argv: Sequence[str]) -> list[str]:
    """Quotes the values of free-text keys; other arguments and values already quoted come back as they are."""
    return [_quote_argument(argument) for argument in argv]


def _quote_argument(argument: str) -> str:
    match = _OVERRIDE.fullmatch(argument)
    if match is None:
        return argument
    key, value = match["key"], match["value"]
    if key not in FREE_TEXT and not key.startswith("part."):
        return argument
    if value == "null" and key not in TEXT_ALONE:
        return argument
    # choice(...) stays a sweep, so that `-m part.autoencoder=choice(A,B)` can be said at all
    if value.startswith("choice(") and value.endswith(")") and key not in TEXT_ALONE:
        return argument
    items = _list_items(value) if key in LISTS else None
    quoted = _quote_once(value) if items is None else "[" + ",".join(map(_quote_once, items)) + "]"
    return f"{match['sign'] or ''}{key}={quoted}"


def _quote_once(text: str) -> str:
    return text if _QUOTED.fullmatch(text) else quote(text)


def _list_items(value: str) -> list[str] | None:
    """The items of `[a,b]`, or None where the value is not one bracketed list.

    Commas in braces (`{0,1}.tar`), in inner brackets and in items that are quoted do not split.
    """
    if not (value.startswith("[") and value.endswith("]")):
        return None
    depth = 0
    for position, char in enumerate(value):
        depth += {"[": 1, "]": -1}.get(char, 0)
        if depth == 0 and position < len(value) - 1:
            return None  # "[a] and [b]" is text
    inner = value[1:-1]
    if not inner.strip():
        return []
    items = _split(inner, openers="{[", closers="}]")
    return _split(inner, openers="", closers="") if items is None else items


def _split(text: str, openers: str, closers: str) -> list[str] | None:
    """Splits at commas outside brackets and outside quoted items; None where a bracket is left open."""
    items: list[str] = []
    start = position = depth = 0
    while position < len(text):
        if not text[start:position].strip() and (quoted := _QUOTED.match(text, position)):
            position = quoted.end()  # an item that starts with a quote is read to the quote's end
            continue
        char = text[position]
        if char in openers:
            depth += 1
        elif char in closers:
            depth -= 1
        elif char == "," and depth == 0:
            items.append(text[start:position].strip())
            start = position + 1
        position += 1
    items.append(text[start:].strip())
    return items if depth == 0 else None


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates Hydra's flags from overrides: `["-m", "seed=1,2"]` gives `(["-m"], ["seed=1,2"])`.

    Raises:
        UserError: an unknown flag, or a word that is neither a flag nor `key=value`.
    """
    flags: list[str] = []
    overrides: list[str] = []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if word in _FLAGS:
            flags.append(word)
        elif word in _FLAGS_WITH_VALUE:
            if not rest:
                raise UserError(f"{word} needs a value, for example '--cfg job'")
            flags += [word, rest.pop(0)]
        elif word.startswith("-"):
            raise UserError(f"unknown option {word}; settings are written key=value, and --help lists them")
        elif "=" not in word and not word.startswith("~"):
            raise UserError(f"{word!r} is not key=value; a value with spaces needs quotes: prompt='a red circle'")
        else:
            overrides.append(word)
    return flags, overrides


def cli(main: Callable[[list[str]], None]) -> NoReturn:
    """Runs a command on `sys.argv` and exits without a traceback.

    The code is 0, 2 for a user's mistake, 1 for a `MachineError` or a full disk, 128 + n for signal n, or that of a
    `RunFailed`.
    """
    for signum in SIGNALS:
        signal.signal(signum, exit_on_signal)
    show_log()
    if isinstance(sys.stdout, TextIOWrapper):  # a file's name or a caption may have what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    code = 0
    try:
        main(sys.argv[1:])
    except UserError as mistake:
        show_error(mistake)
        code = 2
    except MachineError as failure:
        show_error(failure)
        code = 1
    except RunFailed as failure:
        code = failure.code
    except OSError as error:
        full = full_disk(error)
        if full is None:
            raise
        show_error(full)
        code = 1
    sys.exit(code)


def show_error(mistake: UserError | MachineError) -> None:
    """One line on stderr."""
    sys.stderr.write(f"error: {mistake}\n")
    sys.stderr.flush()


def show_log() -> None:
    """Sends what `carrara` logs to stderr as plain lines; other packages keep their own settings."""
    log = logging.getLogger("carrara")
    if not log.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
