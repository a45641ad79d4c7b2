"""The members of a tar file by a walk over its headers, also where the file is damaged.

`tarfile` gives up without a word at a header it cannot read and at NUL blocks (both are "the end" to it).
Here a block that is no header is passed over, and the next block that is one goes on.
"""

import zlib
from mmap import mmap
from typing import NamedTuple

_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_REGULAR = b"0\x007"  # the types of ordinary files
_LONGEST_NAME = 1024  # bytes; one longer name would widen the index's array of keys for all
_LONGEST_RECORD = 1 << 20  # bytes of a GNU or pax record that are read; real ones have some hundred


class Member(NamedTuple):
    """A regular file in the archive: its payload is `size` bytes at `offset`."""

    name: str
    offset: int
    size: int


class Problem(NamedTuple):
    """What is wrong, and where: a member's or sample's name, or `@offset`."""

    place: str
    reason: str


def walk(data: bytes | mmap) -> tuple[list[Member], list[Problem]]:
    """All whole members in the file's order, and the reasons for what is not among them:

    garbage_header (blocks that are no header, where one should be), nul_blocks (NULs with members behind
    them), truncated (the file ends within a member), long_name (of more than 1024 bytes, which are the place).
    """
    members: list[Member] = []
    problems: list[Problem] = []
    end, position = len(data), 0
    nuls = garbage = -1  # where the present run of such blocks begins, or -1
    long_name: str | None = None  # from a GNU or pax record, for the next member
    long_size: int | None = None
    while position + _BLOCK <= end:
        header = data[position : position + _BLOCK]
        size = _payload_size(header)
        if size is None:
            if header != _ZEROS:
                if garbage < 0:
                    problems.append(Problem(f"@{position}", "garbage_header"))
                    garbage = position
            elif nuls < 0 and garbage < 0:
                nuls = position
            long_name = long_size = None
            position += _BLOCK
            continue
        if nuls >= 0 and garbage < 0:
            problems.append(Problem(f"@{nuls}", "nul_blocks"))
        nuls = garbage = -1
        kind = header[156:157]
        payload = position + _BLOCK
        name = _name(header) if long_name is None else long_name
        if kind in _REGULAR and long_size is not None:
            size = long_size
        elif kind in b"123456":  # links, devices and folders have no payload, whatever their size field says
            size = 0
        if payload + size > end:
            problems.append(Problem(_shortened(name) or name, "truncated"))
            return members, problems
        if kind == b"L":
            long_name = _text(data[payload : payload + min(size, _LONGEST_RECORD)])
        elif kind == b"x":
            long_name, long_size = _pax(data[payload : payload + min(size, _LONGEST_RECORD)])
        elif kind not in b"Kg":  # records of links and of the whole archive, which stand between a name and its member
            if kind in _REGULAR:
                if short := _shortened(name):
                    problems.append(Problem(short, "long_name"))
                else:
                    members.append(Member(name, payload, size))
            long_name = long_size = None
        position = payload + -(-size // _BLOCK) * _BLOCK
    if position < end and data[position:end].strip(b"\0"):
        problems.append(Problem(f"@{position}", "truncated"))
    return members, problems


def _payload_size(header: bytes) -> int | None:
    """The size field of a header whose checksum is right, else None."""
    try:
        checksum = int(header[148:156].strip(b" \0"), 8)
        # Adler-32's low half is 1 + the sum of the bytes (modulo 65521): the tar checksum at the speed of C
        total = zlib.adler32(header[:148] + b"        " + header[156:]) & 0xFFFF
        if (checksum + 1) % 65521 != total:
            return None
        if header[124] & 0x80:  # base 256, for sizes from 8 GiB
            size = int.from_bytes(header[124:136], "big") - (0x80 << 88)
        else:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
        return size if size >= 0 else None
    except ValueError:
        return None


def _text(field: bytes) -> str:
    return field.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        return f"{_text(header[345:500])}/{name}"
    return name


def _shortened(name: str) -> str | None:
    """The start of a name that is too long, None of one that is not."""
    if 4 * len(name) <= _LONGEST_NAME:  # a character has four bytes at most
        return None
    encoded = name.encode("utf-8", "surrogateescape")
    return None if len(encoded) <= _LONGEST_NAME else encoded[:_LONGEST_NAME].decode("utf-8", "replace")


def _pax(records: bytes) -> tuple[str | None, int | None]:
    """Path and size in pax records, each `LENGTH KEY=VALUE newline`."""
    name: str | None = None
    size: int | None = None
    if b" path=" not in records and b" size=" not in records:  # most are of times
        return name, size
    start = 0
    try:
        while (space := records.find(b" ", start)) >= 0:
            end = start + int(records[start:space])
            if end <= space:
                break
            key, _, value = records[space + 1 : end].removesuffix(b"\n").partition(b"=")
            if key == b"path":
                name = value.decode("utf-8", "surrogateescape")
            elif key == b"size":
                told = int(value)
                if told < 0:
                    break
                size = told
            start = end
    except ValueError:  # a damaged record: the header's own fields stand
        pass
    return name, size
