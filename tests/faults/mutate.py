"""Bytes, texts and trees made wrong at random: what the fuzz tests and benchmarks/fuzz feed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

INTEGERS = (0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 65536, 2**31 - 1, 2**31, 2**32 - 1)
BYTES = (0, 1, 0x20, 0x7F, 0x80, 0xFE, 0xFF)
DEEP = 100_000

# Values that are no good anywhere, or only in one place.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 75, 2**31, 2**63, -(2**63), 10**20, 0.0, -0.5, 1e-9, 1e308, 1.5,
    float("nan"), float("inf"), -float("inf"), "", " ", "a", "zorp", "0", "1e-4", "null", "true",
    "../x", "../../../../etc/passwd", "/etc/passwd", "/dev/zero", "~", "~root", "~nobody-here/x",
    ".", "..", "\\\\x\\y", "C:\\x", "a\0b", "\ud800", "\u202e\x1b[31m", "é" * 300, "x" * 5000,
    "{trigger}", "{", "}", "{0}", "{trigger.__class__}", "%s%n", "https://example.org/x",
    "file:///etc/passwd", "org/model", "hf://x", "0.png", "1.png", "F32", "U8", "[", [], {}, [[]],
    [None], {"": None}, ["a", 1, None], {"a": {"a": {"a": 1}}}, [0, 4], [4, 0], [-1, 1],
    [2**62, 2**62], [1] * 50, {"kind": "lora"},
)  # fmt: skip


def some_bytes(rng: Random, seed: bytes, others: Sequence[bytes] = ()) -> bytes:
    """Return `seed` with one to eight things done to it; `others` lend parts of theirs."""
    data = bytearray(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        _strike(rng, data, others or (seed,))
    return bytes(data)


def _strike(rng: Random, data: bytearray, others: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    # Headers stand in front: half of all blows fall there.
    at = min(at, rng.randrange(64)) if rng.random() < 0.5 else at
    size = min(rng.choice((1, 2, 4, 8, 16, 64, 512)), len(data) - at)
    match rng.randrange(9):
        case 0 if at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        case 1 if at < len(data):
            data[at] = rng.choice(BYTES)
        case 2:
            width = rng.choice((2, 4, 8))
            order = rng.choice(("little", "big"))
            value = rng.choice(INTEGERS) + rng.choice((-1, 0, 0, 1))
            data[at : at + width] = (value % 2 ** (8 * width)).to_bytes(width, order)  # type: ignore[arg-type]
        case 3:
            del data[at : at + size]
        case 4:
            data[at:at] = data[at : at + size] * rng.choice((1, 2, 50))
        case 5:
            data[at:at] = rng.randbytes(rng.choice((1, 4, 32)))
        case 6:
            del data[at:]
        case 7:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            data[at : at + size] = other[start : start + rng.choice((size, 512))]
        case _:
            data[at : at + size] = bytes([rng.choice(BYTES)]) * size


def some_text(rng: Random, text: str, hostile: Sequence[str]) -> str:
    """Return `text` with lines left out, repeated, moved, indented, or `hostile` ones put in."""
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 3, 6))):
        at = rng.randrange(len(lines) + 1)
        line = lines[at] if at < len(lines) else ""
        key, colon, _value = line.partition(":")
        match rng.randrange(8):
            case 0:
                lines[at:at] = [line] * rng.choice((1, 2, 30))
            case 1:
                del lines[at : at + rng.choice((1, 2, 5))]
            case 2:
                lines[at : at + 1] = [" " * rng.randrange(6) + line.strip()]
            case 3 if lines:
                lines.insert(at, rng.choice(lines))
            case 4:
                lines.insert(at, rng.choice(hostile))
            case 5 | 6:
                lines[at : at + 1] = [f"{key}{colon or ':'} {rng.choice(hostile)}"]
            case _:
                place = rng.randrange(len(line) + 1)
                lines[at : at + 1] = [line[:place] + rng.choice(hostile) + line[place:]]
        lines = lines or [""]
    return "\n".join(lines)


def some_tree(rng: Random, tree: Any, values: Sequence[Any] = VALUES) -> Any:
    """Return a copy of `tree` with one to five of its nodes replaced, removed, renamed or added."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3, 5))):
        places = list(_places(tree))
        if not places:
            return copy.deepcopy(rng.choice(values))
        held, key = rng.choice(places)
        value = copy.deepcopy(rng.choice(values))
        match rng.randrange(6):
            case 0:
                del held[key]
            case 1 if isinstance(held, dict):
                held[str(rng.choice(values))[:50]] = held.pop(key)
            case 2 if isinstance(held, list):
                held.insert(key, value)
            case 3 if isinstance(held, dict):
                held[str(rng.choice(values))[:50]] = value
            case 4:
                other, there = rng.choice(places)
                held[key] = copy.deepcopy(other[there])
            case _:
                held[key] = value
    return tree


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict | list):
        for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
            yield tree, key
            yield from _places(tree[key])


def some_json(rng: Random, tree: Any) -> str:
    """Return a tree made wrong, as JSON: now and then with what no tree can hold."""
    text = json.dumps(some_tree(rng, tree), ensure_ascii=rng.random() < 0.7)
    match rng.randrange(20):
        case 0:
            return text.replace(":", ": " + "[" * DEEP, 1)
        case 1:
            return "[" * DEEP
        case 2:
            return text.replace("1", "1" * 5000, 1)
        case 3:
            return text[: rng.randrange(len(text) + 1)]
        case 4:
            return text[:-1] + ", " + text[1:]
        case _:
            return text


def encoded(text: str) -> bytes:
    """Return a text's bytes, half characters included."""
    return text.encode("utf-8", "surrogatepass")
