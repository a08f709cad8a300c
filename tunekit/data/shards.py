"""Many small entries in one safetensors file: written whole, read one entry at a time.

A shard is an ordinary safetensors file. The tensors of an entry lie side by side and are called
``KEY/part``; the header's metadata holds a digest for each key. No part of a shard is ever mapped
into memory, so what a process holds does not grow with what it has read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tunekit.errors import UserError
from tunekit.safefile import check_header
from tunekit.wholefile import whole_file

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "tunekit cache 2"
_FORMAT_KEY = "format"  # among the metadata's keys, which are otherwise entries'


class DamagedError(Exception):
    """A shard, or an entry in it, is not what was written; the text says why."""


@dataclass(frozen=True, slots=True)
class Block:
    """An entry as bytes. layout: the header of its tensors alone, as JSON. data: their values."""

    layout: str
    data: bytes

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Block:
        """Return the tensors as bytes; any device and memory layout will do."""
        from safetensors.torch import save

        # Cloned: the library refuses tensors that share memory.
        whole = save({n: t.detach().cpu().contiguous().clone() for n, t in tensors.items()})
        start = 8 + int.from_bytes(whole[:8], "little")
        return cls(_layout(json.loads(whole[8:start])), whole[start:])

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors, on the CPU; they share no memory with anything."""
        from safetensors import SafetensorError
        from safetensors.torch import load

        header = self.layout.encode()
        header += b" " * (-len(header) % 8)
        try:
            tensors: dict[str, Tensor] = load(
                len(header).to_bytes(8, "little") + header + self.data
            )
        except (SafetensorError, KeyError, ValueError) as error:
            raise DamagedError(str(error)) from None
        return tensors

    def digest(self, key: str) -> bytes:
        """Return the sha256 of the entry and of the key it is found by."""
        start = f"{key}\n{len(self.layout)}\n{self.layout}"
        digest = hashlib.sha256(start.encode())
        digest.update(self.data)
        return digest.digest()


class Span(NamedTuple):
    """Where an entry lies in its file, in bytes, and what it must be."""

    start: int
    end: int
    layout: str
    digest: bytes


def write_shard(path: Path, blocks: Mapping[str, Block]) -> dict[str, Span]:
    """Write a shard in one piece, or nothing, and return where its entries lie.

    The file's mode follows the umask. Raises OSError.
    """
    header: dict[str, Any] = {"__metadata__": {_FORMAT_KEY: FORMAT}}
    spans: dict[str, Span] = {}
    place = 0
    for key, block in blocks.items():
        assert "/" not in key
        digest = block.digest(key)
        header["__metadata__"][key] = digest.hex()
        for part, facts in json.loads(block.layout).items():
            first, last = facts["data_offsets"]
            header[f"{key}/{part}"] = {**facts, "data_offsets": [place + first, place + last]}
        spans[key] = Span(place, place + len(block.data), block.layout, digest)
        place += len(block.data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with whole_file(path) as part_path, part_path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for block in blocks.values():
            file.write(block.data)
    return {
        key: span._replace(start=start + span.start, end=start + span.end)
        for key, span in spans.items()
    }


def read_spans(path: Path) -> dict[str, Span]:
    """Return a shard's entries; no tensor is read.

    Raises DamagedError for what is no whole shard, OSError where it cannot be read.
    """
    size = path.stat().st_size
    try:
        length = check_header(path)
        with path.open("rb") as file:
            header = json.loads(file.read(8 + length)[8:])
        spans = _spans(header, 8 + length)
    except UserError as error:
        raise DamagedError(str(error).removeprefix(f"{path}: ")) from None
    except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
        raise DamagedError("its header cannot be read") from None
    end = max((span.end for span in spans.values()), default=8 + length)
    if end != size:
        raise DamagedError(f"it should have {end} bytes and has {size}")
    return spans


def read_block(path: Path, key: str, span: Span) -> Block:
    """Return an entry, checked against its digest.

    Raises DamagedError where it differs, OSError where the file cannot be read.
    """
    with path.open("rb") as file:
        file.seek(span.start)
        data = file.read(span.end - span.start)
    block = Block(span.layout, data)
    if block.digest(key) != span.digest:
        raise DamagedError("its digest does not match")
    return block


def _layout(header: dict[str, Any]) -> str:
    """Return the header of one entry in the one form that digests are taken of."""
    return json.dumps(header, sort_keys=True, separators=(",", ":"))


def _spans(header: dict[str, Any], base: int) -> dict[str, Span]:
    digests = header.pop("__metadata__")
    if digests.pop(_FORMAT_KEY) != FORMAT:
        raise ValueError
    parts: dict[str, dict[str, Any]] = {key: {} for key in digests}
    for name, facts in header.items():
        key, _, part = name.partition("/")
        parts[key][part] = facts
    spans: dict[str, Span] = {}
    layouts: dict[str, str] = {}
    for key, tensors in parts.items():
        start = min(facts["data_offsets"][0] for facts in tensors.values())
        end = max(facts["data_offsets"][1] for facts in tensors.values())
        for facts in tensors.values():
            first, last = facts["data_offsets"]
            if not type(first) is type(last) is int:  # 8.0 would do, until it is read up to there
                raise ValueError
            facts["data_offsets"] = [first - start, last - start]
        layout = _layout(tensors)
        layout = layouts.setdefault(layout, layout)  # entries of a kind are much alike: held once
        if not 0 <= start <= end:
            raise ValueError
        spans[key] = Span(base + start, base + end, layout, bytes.fromhex(digests[key]))
    return spans
