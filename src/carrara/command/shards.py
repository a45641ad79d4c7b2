"""`python shards.py do=…`: writes shards and says what is in them, what is wrong, and where something is."""

from pathlib import Path
from typing import Any

from carrara.command.cache import cache
from carrara.command.restore import corrupt, restore
from carrara.command.search import search
from carrara.command_line import RunFailed, quote_free_text, show_error, split_flags
from carrara.config import build, compose
from carrara.data.cache import ShardCache
from carrara.data.doctor import examine
from carrara.data.manifest import scan_all
from carrara.data.module import ShardData
from carrara.data.reader import Decoding
from carrara.data.source import expand, unpacked
from carrara.errors import UserError

NAME = "shards"
_LEAST = {"num_captions": 0, "num_processes": 1, "num_results": 1, "batch_size": 1}


def main(conf_dir: Path, argv: list[str]) -> None:
    """Does as `argv` says.

    Raises:
        UserError: a mistake in the command, or shards that cannot be used.
    """
    flags, overrides = split_flags(quote_free_text(argv))
    if flags:
        print((conf_dir / f"{NAME}.yaml").read_text())
        return
    order = compose(conf_dir, NAME, overrides).config
    actions = {
        "make": _make, "inspect": _inspect, "doctor": _doctor, "search": search, "cache": cache, "restore": restore,
        "corrupt": corrupt,
    }  # fmt: skip
    if order["do"] not in actions:
        raise UserError(f"do={order['do']} is not known; it is {', '.join(actions)}")
    for key, least in _LEAST.items():
        value = order[key]
        if not ((type(value) is int and value >= least) or (key == "num_processes" and value is None)):
            raise UserError(f"{key} must be a whole number from {least} on, not {value!r}")
    actions[order["do"]](order)


def _make(order: dict[str, Any]) -> None:
    data = order["data"]
    if data.get("make") is None:
        raise UserError(f"data={data['name']} is not made here: its shards are somebody's files; take data=shapes")
    build(data["make"])(data["root"])
    _inspect(order)


def _inspect(order: dict[str, Any]) -> None:
    _scan_remote(order["data"])
    data: ShardData = build({key: value for key, value in order["data"].items() if key not in ("make", "root")})
    for line in data.report():
        print(line)
    for shard in data.manifest.shards:
        problems = ", ".join(f"{reason} {count}" for reason, count in shard.problems.items())
        size = f"{shard.num_samples} samples, {shard.bytes / 1e6:.1f} MB"
        print(f"  {shard.name}: {size}{'; ' if problems else ''}{problems}")
    print("captions:")
    for caption in data.captions(order["num_captions"]):
        print(f"  {caption}")


def _scan_remote(node: dict[str, Any]) -> None:
    """Remote shards become known: fetched, scanned, and kept as far as there is room.

    Raises:
        UserError: some cannot be read; all others are known then.
    """
    cache = ShardCache(node["cache_dir"], node["cache_bytes"])
    for key in ("urls", "val_urls"):
        if node[key] is not None:
            paths = unpacked(expand(node[key], f"data.{key}"), node["cache_dir"])
            mistakes = [
                found
                for found in scan_all(paths, node["cache_dir"], node["caption"], cache)
                if isinstance(found, UserError)
            ]
            if mistakes:
                others = f" (and {len(mistakes) - 1:,} more, see do=doctor)" if len(mistakes) > 1 else ""
                raise UserError(f"{mistakes[0]}{others}")


def _doctor(order: dict[str, Any]) -> None:
    node = order["data"]
    decoding = Decoding(node["resolution"], node["caption"], node["crop"], node["flip"], node["max_pixels"])
    cache = ShardCache(node["cache_dir"], node["cache_bytes"])
    paths = unpacked(expand(node["urls"]), node["cache_dir"])
    report = None if order["out"] is None else Path(order["out"])
    if report is not None:  # that it can be written is known before hours of decoding
        try:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.open("a").close()
        except OSError as error:
            raise UserError(f"out={report} cannot be written: {error.strerror}") from None
    health = examine(paths, node["cache_dir"], cache, decoding, node["filters"], order["num_processes"])
    if report is not None:
        report.write_text(health.as_json() + "\n", encoding="utf-8")
    for line in health.lines():
        print(line)
    if health.exceeds(node["max_bad_fraction"]):
        show_error(UserError(f"more is wrong than data.max_bad_fraction={node['max_bad_fraction']:g} allows"))
        raise RunFailed(1)
