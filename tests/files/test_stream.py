"""safetensors files tensor by tensor: what the library reads is what was written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tunekit.errors import UserError
from tunekit.files.stream import Form, Spool, TensorFile, write

TENSORS = {
    "whole": torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
    "number": torch.tensor(2.5),
    "half": torch.randn(7).half(),
    "brain": torch.randn(3, 5).bfloat16(),
    "count": torch.tensor([1, 2**40]),
    "small": torch.tensor([-1, 2], dtype=torch.int8),
    "truth": torch.tensor([True, False, True]),
    "eight": torch.randn(5).to(torch.float8_e4m3fn),
    "nothing": torch.empty(0, 4),
    "turned": torch.arange(6.0).reshape(2, 3).T,
}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    whole = [t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and whole[0].equal(whole[1])


def test_the_library_reads_what_is_written_in_any_order(tmp_path: Path) -> None:
    forms = {name: Form.of(tensor) for name, tensor in TENSORS.items()}
    path = tmp_path / "a.safetensors"
    old = os.umask(0o022)
    try:
        write(path, forms, reversed(TENSORS.items()), {"said": "ünïcode", "n": "1"})
    finally:
        os.umask(old)
    read = load_file(path)
    assert read.keys() == TENSORS.keys()
    assert all(same(read[name], tensor) for name, tensor in TENSORS.items())
    own = TensorFile(path)
    assert own.metadata == {"said": "ünïcode", "n": "1"}
    assert own.forms == forms
    assert all(same(own.read(name), tensor) for name, tensor in TENSORS.items())
    assert path.stat().st_mode & 0o777 == 0o644


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    whole = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    save_file(whole, tmp_path / "a.safetensors")
    own = TensorFile(tmp_path / "a.safetensors")
    assert all(same(own.read(name), tensor) for name, tensor in whole.items())
    with pytest.raises(UserError, match="is damaged"):
        own.read("none")


def test_a_write_that_breaks_off_leaves_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    form = {"x": Form("float32", (4,)), "y": Form("float32", (4,))}
    write(path, form, {"x": torch.zeros(4), "y": torch.ones(4)}.items(), {})
    before = path.read_bytes()

    def broken() -> object:
        yield "x", torch.ones(4)
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        write(path, form, broken(), {})  # type: ignore[arg-type]
    with pytest.raises(AssertionError):  # a tensor that never came
        write(path, form, [("x", torch.ones(4))], {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_was_put_aside_comes_back_and_leaves_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "new")
    for name, tensor in TENSORS.items():
        spool.add(name, tensor)
    assert all(same(spool.read(name), tensor) for name, tensor in TENSORS.items())
    assert spool.forms["turned"] == Form("float32", (3, 2))
    spool.close()
    assert not list((tmp_path / "new").iterdir())
