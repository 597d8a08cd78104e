"""What wandb's own files hold already, so that a run that goes on records every update once.

A .wandb file begins with a header of HEADER's length and goes on in blocks of BLOCK bytes, as LevelDB's log does: chunks of
(crc32, length, kind) and bytes, a record whole in one chunk or in several. Each record is one protobuf message.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from wandb.proto.wandb_internal_pb2 import Record

HEADER, BLOCK = struct.Struct("<4sHB"), 32768
CHUNK = struct.Struct("<IHB")
MAGIC = (b":W&B", 0xBEE1, 0)
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def read_messages(content: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file up to its end, or up to where a killed process left it torn."""
    if len(content) < HEADER.size or HEADER.unpack_from(content) != MAGIC:
        return
    at, parts = HEADER.size, b""
    while at + CHUNK.size <= len(content):
        left = BLOCK - at % BLOCK
        if left < CHUNK.size:
            at += left
            continue
        checksum, length, kind = CHUNK.unpack_from(content, at)
        data = content[at + CHUNK.size : at + CHUNK.size + length]
        if len(data) < length or zlib.crc32(data, zlib.crc32(bytes([kind]))) != checksum:
            return
        at += CHUNK.size + length
        parts = data if kind in (WHOLE, FIRST) else parts + data
        if kind in (WHOLE, LAST):
            yield parts


def read_records(file: Path) -> Iterator[Record]:
    """Yield the protobuf records of a .wandb file."""
    from wandb.proto.wandb_internal_pb2 import Record

    for message in read_messages(file.read_bytes()):
        yield Record.FromString(message)


def rows_of(file: Path) -> Iterator[dict[str, object]]:
    """Yield the rows that were logged into a .wandb file, in their order, each with its ``_step``."""
    for record in read_records(file):
        if record.WhichOneof("record_type") == "history":
            yield {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}


def last_recorded_update(folder: Path) -> int:
    """Return the greatest update that the .wandb files under a folder hold; -1 without any."""
    files = sorted(folder.glob("*run-*/run-*.wandb"))
    return max((int(row.get("_step", -1)) for file in files for row in rows_of(file)), default=-1)
