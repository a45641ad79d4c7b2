"""Which shards a data spec means, and as what files."""

import glob
import gzip
import hashlib
import logging
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import webdataset.utils
from webdataset.shardlists import expand_urls

from carrara.data.cache import REMOTE, is_remote
from carrara.errors import UserError

webdataset.utils.enforce_security = True  # as WDS_SECURE does, where webdataset was imported before us
_log = logging.getLogger(__name__)
_GZIP = b"\x1f\x8b"
_CHUNK = 1 << 20
_SECRET = re.compile(r"sig|token|secret|credential|passw|auth|key|jwt", re.IGNORECASE)  # X-Amz-Signature, sig, …


def expand(urls: str | Sequence[str], name: str = "data.urls") -> list[str]:
    """Paths and addresses of the shards, in the order given, each once.

    `urls` is a path, a glob, a brace spec as `webdataset` knows it, a folder (its *.tar), `[a,b]`, or a list
    of these. `name` is the config key for messages. Raises UserError naming the pattern that matches nothing,
    the file that is missing, or an address of another kind than `cache.REMOTE`.
    """
    specs = _split(urls) if isinstance(urls, str) else list(urls)
    if not specs:
        raise UserError(f"{name} is empty; give it a folder, a glob or a list of shards")
    found = [shard for spec in specs for shard in _expand_one(spec, name)]
    unique = list(dict.fromkeys(found))
    if len(unique) < len(found):
        _log.warning("%s names %d shards more than once; each is read once", name, len(found) - len(unique))
    return unique


def _split(urls: str) -> list[str]:
    """`[a,b]` to its elements; commas inside braces do not separate."""
    text = urls.strip()
    if not (text.startswith("[") and text.endswith("]")) or os.path.exists(text):
        return [urls]
    elements, depth = [""], 0
    for character in text[1:-1]:
        depth += (character == "{") - (character == "}")
        if character == "," and depth == 0:
            elements.append("")
        else:
            elements[-1] += character
    return [element.strip().strip("'\"") for element in elements if element.strip()]


def _expand_one(spec: str, name: str) -> list[str]:
    if os.path.isfile(spec):  # a name may hold braces or brackets itself
        return [spec]
    found: list[str] = []
    for url in expand_urls(spec):
        scheme, colon, rest = url.partition(":")
        if is_remote(url):
            if "@" in url.partition("://")[2].partition("/")[0] or any(map(_SECRET.search, _query_keys(url))):
                raise UserError(
                    f"{name}: an address is written into run folders and must hold no password, key or signature: use "
                    "~/.netrc, or an s3:// or gs:// address, for which the machine's own credentials are taken"
                )
            found.append(url)
            continue
        if colon and scheme == "file":
            url = rest.removeprefix("//")
        elif colon and scheme.isalnum() and not os.path.exists(url):
            raise UserError(f"{name}: '{scheme}:' is not read ({url}); use files, or {', '.join(REMOTE)} addresses")
        if os.path.isdir(url):
            url = os.path.join(glob.escape(url), "*.tar")
        if os.path.isfile(url):
            found.append(url)
        elif glob.has_magic(url):
            matched = sorted(glob.glob(url, recursive=True))
            if not matched:
                raise UserError(f"{name}: no shard matches {url}")
            found += matched
        else:
            raise UserError(f"{name}: there is no shard {url}")
    return found


def _query_keys(url: str) -> list[str]:
    return [pair.partition("=")[0] for pair in url.partition("?")[2].split("&")]


def unpacked(paths: Sequence[str], cache_dir: str | Path) -> list[str]:
    """The shards as plain tar files: themselves, or copies in `cache_dir` of local ones that are gzipped.

    A copy appears complete or not at all and keeps the shard's name. Raises UserError naming what fails.
    """
    with ThreadPoolExecutor(8) as pool:
        folder = Path(cache_dir) / "unpacked"
        return list(pool.map(lambda path: path if is_remote(path) else _unpacked(path, folder), paths))


def _unpacked(path: str, folder: Path) -> str:
    try:
        with open(path, "rb") as file:
            if file.read(2) != _GZIP:
                return path
        status = os.stat(path)
        content = f"{os.path.realpath(path)} {status.st_size} {status.st_mtime_ns}"
        target = folder / hashlib.sha256(content.encode()).hexdigest()[:16] / os.path.basename(path)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as partial:
                try:
                    with gzip.open(path) as stream:
                        shutil.copyfileobj(stream, partial, _CHUNK)
                    os.replace(partial.name, target)
                except BaseException:
                    os.unlink(partial.name)
                    raise
            _log.info("unpacked %s to %s", path, target)
        return str(target)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read the shard {path}: {error}") from None
