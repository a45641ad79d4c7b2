import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from carrara.command_line import FREE_TEXT, LISTS, quote, quote_free_text, split_flags
from carrara.errors import UserError

HARD = [
    "a red circle, left of a blue square",
    "data/laion/{00000..00006}.tar",
    "{a,b}/{0..3}.tar",
    "it's a dog's life",
    'the "small" one',
    "'round' and 'square'",
    "a = b",
    "key=value",
    "50% off (today only)",
    "x: [1, 2]",
    "[a], [b]",
    "C:\\pictures\\",
    "ends with a backslash \\",
    "costs ${5} or ${oc.env:HOME}",
    "\\${x} and \\\\${y}",
    "$HOME ~ + # @ | ? * ! ; & < >",
    " spaces around ",
    "two\nlines\tand a tab",
    "ein größerer Kreis — 赤い丸 🔴",
    "null",
    "true",
    "3.0",
    "choice(a,b)",
    "range(1,3)",
    "",
    "'",
    '"',
    "'\\'",
]


def value(argument: str) -> object:
    """What a run finds under the key once Hydra has read the argument and OmegaConf has resolved it."""
    override = OverridesParser.create().parse_override(argument)
    assert not override.is_sweep_override()
    config = OmegaConf.create({"key": override.value()})
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return resolved["key"]


@pytest.mark.parametrize("text", HARD)
def test_a_prompt_arrives_as_it_was_typed(text):
    assert value(quote_free_text([f"prompt={text}"])[0]) == text


def test_random_text_arrives_as_it_was_typed():
    generator = random.Random(0)
    characters = [*"ab '\"\\{}[](),=:$%&#@!?*+-./~|<>\t\n", "${", "\\'", "é", "…", "🔴"]
    for _ in range(400):
        text = "".join(generator.choices(characters, k=generator.randrange(12)))
        assert value(f"query={quote(text)}") == text
        assert value(quote_free_text([f"query=x{text}y"])[0]) == f"x{text}y"


@pytest.mark.parametrize("key", [*sorted(FREE_TEXT), "part.autoencoder", "part.evaluator", "++run", "+data.urls"])
def test_every_free_key_is_quoted(key):
    text = "runs/{a, b}=it's"
    assert value(quote_free_text([f"{key}={text}"])[0]) == text


@pytest.mark.parametrize("key", sorted(LISTS))
@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("[a,b]", ["a", "b"]),
        ("[a red circle, it's blue]", ["a red circle", "it's blue"]),
        ("[x/{0..3}.tar,y/{1,2}.tar]", ["x/{0..3}.tar", "y/{1,2}.tar"]),
        ("['a, b', \"c, d\" ,e]", ["a, b", "c, d", "e"]),
        ("[a [1, 2], b]", ["a [1, 2]", "b"]),
        ("[:-{ one, two]", [":-{ one", "two"]),
        ("[alone]", ["alone"]),
        ("[]", []),
    ],
)
def test_a_list_is_written_in_brackets(key, text, items):
    assert value(quote_free_text([f"{key}={text}"])[0]) == items


def test_brackets_elsewhere_are_text():
    assert value(quote_free_text(["run=[old]"])[0]) == "[old]"


def test_quoted_values_pass():
    arguments = ["prompt='a, b'", 'run="x y"', "prompt=['a',\"b\"]"]
    assert quote_free_text(arguments) == arguments


def test_null_is_null_for_paths_only():
    assert value(quote_free_text(["resume=null"])[0]) is None
    assert value(quote_free_text(["prompt=null"])[0]) == "null"


def test_other_arguments_pass():
    arguments = [
        "-m",
        "seed=1,2",
        "trainer.devices=2",
        "part.x=choice(a,b)",
        "~part.x",
        "name={a:1}",
        "prompt",
    ]
    assert quote_free_text(arguments) == arguments


def test_flags_are_told_from_overrides():
    assert split_flags(["seed=1", "-m", "--cfg", "job", "~x"]) == (["-m", "--cfg", "job"], ["seed=1", "~x"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-path", "/etc"], "unknown option --config-path"),
        (["red"], "'red' is not key=value"),
        (["--cfg"], "--cfg needs a value"),
    ],
)
def test_other_words_are_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        split_flags(arguments)


FULL = "error: the disk is full (No space left on device): make room, then start the same command again\n"


def run_cli(body: str) -> subprocess.CompletedProcess[str]:
    code = f"""
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
from carrara.command_line import RunFailed, cli
from carrara.errors import UserError
def main(argv):
    {body}
cli(main)
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("body", "code", "shown"),
    [
        ("pass", 0, ""),
        ("print(chr(0xdce9))", 0, ""),  # of a file's name that is no UTF-8
        ("raise UserError('part.x: none')", 2, "error: part.x: none\n"),
        ("raise RunFailed(137)", 137, ""),
        ("open('/dev/full', 'w').write('x' * 10000)", 1, FULL),
        ("os.kill(os.getpid(), signal.SIGTERM)", 128 + signal.SIGTERM, ""),
        ("os.kill(os.getpid(), signal.SIGINT)", 128 + signal.SIGINT, ""),
    ],
)
def test_a_command_ends_without_a_traceback(body, code, shown, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "src"))
    process = run_cli(body)
    assert (process.returncode, process.stderr) == (code, shown)
