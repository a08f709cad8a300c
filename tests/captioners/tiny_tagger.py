"""A tagger of the WD14 kind as ONNX: its tags are the mean colours of the picture."""

from __future__ import annotations

import struct
from pathlib import Path

ROWS = (
    ("general", 9), ("blue_sky", 0), ("green_grass", 0),
    ("red_hat", 0), ("^_^", 0), ("zorp_(x)", 4),
)  # fmt: skip
EDGE = 8


def _number(value: int) -> bytes:
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def _field(number: int, value: int | bytes | str) -> bytes:
    """Return one field of a protobuf message."""
    if isinstance(value, int):
        return _number(number << 3) + _number(value)
    data = value.encode() if isinstance(value, str) else value
    return _number(number << 3 | 2) + _number(len(data)) + data


def _value(name: str, shape: tuple[int, ...]) -> bytes:
    dims = b"".join(_field(1, _field(1, edge)) for edge in shape)
    tensor = _field(1, 1) + _field(2, dims)
    return _field(1, name) + _field(2, _field(1, tensor))


def _tensor(name: str, shape: tuple[int, ...], values: list[float]) -> bytes:
    dims = b"".join(_field(1, edge) for edge in shape)
    data = struct.pack(f"<{len(values)}f", *values)
    return dims + _field(2, 1) + _field(8, name) + _field(9, data)


def _node(kind: str, inputs: list[str], output: str, attributes: bytes = b"") -> bytes:
    told = b"".join(_field(1, name) for name in inputs)
    return told + _field(2, output) + _field(4, kind) + attributes


def onnx(tags: int = len(ROWS), shape: tuple[int, ...] = (1, EDGE, EDGE, 3)) -> bytes:
    """Return a model: means over the picture, BGR / 255, times a matrix of [3, tags]."""
    weights = [0.0] * (3 * tags)
    for colour in range(3):  # tag 1 is blue, 2 green, 3 red; the last is blue as well
        weights[colour * tags + 1 + colour] = 1 / 255
    weights[tags - 1] = 0.9 / 255
    axes = _field(1, "axes") + b"".join(_field(8, axis) for axis in (1, 2)) + _field(20, 7)
    keep = _field(1, "keepdims") + _field(3, 0) + _field(20, 2)
    nodes = (
        _node("ReduceMean", ["picture"], "mean", _field(5, axes) + _field(5, keep)),
        _node("MatMul", ["mean", "weights"], "scores"),
    )
    graph = b"".join(_field(1, node) for node in nodes) + _field(2, "tagger")
    graph += _field(5, _tensor("weights", (3, tags), weights))
    graph += _field(11, _value("picture", shape)) + _field(12, _value("scores", (1, tags)))
    return _field(1, 8) + _field(7, graph) + _field(8, _field(1, "") + _field(2, 13))


def save(folder: Path) -> Path:
    """Save model.onnx and selected_tags.csv."""
    folder.mkdir(parents=True)
    (folder / "model.onnx").write_bytes(onnx())
    rows = [f"{number},{name},{kind},10" for number, (name, kind) in enumerate(ROWS)]
    (folder / "selected_tags.csv").write_text("tag_id,name,category,count\n" + "\n".join(rows))
    return folder
