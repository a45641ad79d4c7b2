"""A run goes on with what it began with: the same shards in the same order, the same frozen parts."""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback

from carrara.callback.ranks import gather
from carrara.data.manifest import Manifest
from carrara.data.module import ShardData
from carrara.errors import UserError

Shards = list[list[str]]  # name and digest of each, in their order


class Inputs(Callback):
    """Every checkpoint says what the run is trained on, and is gone on from with nothing else.

    Where shards and parts lie does not matter, and nor does what is in no checkpoint yet. Stands before `Checkpoints`.

    Args:
        data: what is trained and validated on.
        parts: SHA-256 of the frozen parts' weights, by the keys of the run's `part`.
    """

    def __init__(self, data: ShardData, parts: Mapping[str, str]):
        self.inputs: dict[str, Any] = {
            "parts": dict(parts),
            "shards": {"urls": _shards(data.manifest), "val_urls": _shards(data.val_manifest)},
            "data": data.fingerprint,
        }

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Ranks that see other shards would each deal out an order of their own.

        Raises:
            UserError: on all ranks, which one does and in what.
        """
        seen = gather(trainer, {key: _digest(value) for key, value in _by_key(self.inputs).items()})
        for rank, theirs in enumerate(seen):
            differing = [key for key in theirs if theirs[key] != seen[0][key]]
            if differing:
                raise UserError(
                    f"{differing[0]} is not the same on all machines: rank {rank} finds other contents there than rank "
                    "0; copy them anew"
                )

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["inputs"] = self.inputs

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Every rank looks at its own.

        Raises:
            UserError: something is another than it was; what that is.
        """
        change = _change(checkpoint["inputs"], self.inputs)
        if change:
            raise UserError(
                f"this run cannot go on: {change}. Put back what it was trained with so far, or start a new run, "
                "without resume"
            )


def _by_key(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """By what a user would look at."""
    shards = {f"data.{key}": value for key, value in inputs["shards"].items()}
    return {**shards, **{f"part.{key}": value for key, value in inputs["parts"].items()}, "data": inputs["data"]}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _shards(manifest: Manifest) -> Shards:
    return [[shard.name, shard.digest] for shard in manifest.shards]


def change_of_parts(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which part has other weights than it had, by their SHA-256; nothing if all are as they were."""
    for kind in sorted(before.keys() | now.keys()):
        then, here = before.get(kind, "none"), now.get(kind, "none")
        if then != here:
            return f"part.{kind} has other weights than it had (SHA-256 {here[:12]}…, then {then[:12]}…)"
    return ""


def _change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What is not as it was; nothing if all is."""
    change = change_of_parts(before["parts"], now["parts"])
    if change:
        return change
    for key in now["shards"]:
        change = _change_of_shards(before["shards"][key], now["shards"][key])
        if change:
            return f"data.{key}: {change}"
    if before["data"] != now["data"]:
        return "other samples of the shards are taken than before, or they are decoded otherwise"
    return ""


def _change_of_shards(before: Shards, now: Shards) -> str:
    then, here = (Counter(map(tuple, shards)) for shards in (before, now))
    gone, come = ([name for name, _ in rest.elements()] for rest in (then - here, here - then))
    changed, gone, come = (
        [name for name in gone if name in come],
        [name for name in gone if name not in come],
        [name for name in come if name not in gone],
    )
    told = [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} {what}"
        for names, what in ((changed, "changed"), (gone, "gone"), (come, "new"))
        if names
    ]
    if not told and before != now:
        first = next(a for a, b in zip(before, now, strict=True) if a != b)
        return f"the shards are in another order, from {first[0]} on"
    return ", ".join(told)
