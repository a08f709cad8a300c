"""safetensors files tensor by tensor, so that memory holds the largest tensor and not the file."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from tunekit.errors import UserError
from tunekit.safefile import check_header
from tunekit.wholefile import whole_file

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# The format's word for a kind of number -> torch's.
_KINDS = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "C64": "complex64",
    "I64": "int64",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_MOST_MAPPED = 8_000_000  # bytes of a file that are read before its map is given back


@dataclass(frozen=True)
class Form:
    """What a tensor is without its numbers. dtype: torch's word, such as "float16"."""

    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """Return the form of a tensor."""
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))

    @property
    def kind(self) -> torch.dtype:
        """The number format."""
        import torch

        kind: torch.dtype = getattr(torch, self.dtype)
        return kind

    @property
    def bytes(self) -> int:
        """How many bytes its numbers take."""
        return prod(self.shape) * self.kind.itemsize


class TensorFile:
    """A safetensors file, of which only the header is in memory.

    forms: name -> form of each tensor. Raises UserError, one line, for what is not a whole
    safetensors file or holds numbers of a kind that torch has not.
    """

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        self._open: Any = None
        self._mapped = 0
        check_header(self.path)
        self.forms: dict[str, Form] = {}
        try:
            with safe_open(self.path, framework="pt") as file:
                self.metadata: dict[str, str] = dict(file.metadata() or {})
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    part = file.get_slice(name)
                    kind, shape = part.get_dtype(), tuple(part.get_shape())
                    if kind not in _KINDS:
                        raise UserError(f"{path}: {name} holds numbers of the unknown kind {kind}")
                    self.forms[name] = Form(_KINDS[kind], shape)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: is damaged: {' '.join(str(error).split())}") from None

    def read(self, name: str) -> Tensor:
        """Return a tensor on the CPU, in memory of its own."""
        from safetensors import SafetensorError, safe_open

        try:
            if self._open is None:
                self._open = safe_open(self.path, framework="pt")
            tensor: Tensor = self._open.get_tensor(name).clone()
            self._mapped += tensor.nbytes
            # The library maps the file, and what was read of the map counts as memory.
            if self._mapped > _MOST_MAPPED:
                self._open, self._mapped = None, 0
        except (SafetensorError, OSError) as error:
            raise UserError(f"{self.path}: is damaged: {' '.join(str(error).split())}") from None
        return tensor


def write(
    path: Path,
    forms: Mapping[str, Form],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write a safetensors file whose tensors come one after another, in any order, each once.

    The file appears whole or not at all, with the permissions that the umask gives. Raises OSError.
    The format: https://huggingface.co/docs/safetensors (an 8-byte length, JSON, the numbers).
    """
    names = sorted(forms, key=lambda name: (-forms[name].kind.itemsize, name))  # keeps all aligned
    words = {torch_word: word for word, torch_word in _KINDS.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    end = 0
    for name in names:
        form = forms[name]
        starts[name], end = end, end + form.bytes
        header[name] = {
            "dtype": words[form.dtype],
            "shape": list(form.shape),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    missing = set(forms)
    with whole_file(path) as part, part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for name, tensor in tensors:
            assert Form.of(tensor) == forms[name], (name, Form.of(tensor), forms[name])
            missing.remove(name)
            file.seek(8 + len(text) + starts[name])
            file.write(_bytes(tensor))
            del tensor  # else it stays until the next one is there
        assert not missing, missing


def _bytes(tensor: Tensor) -> Any:
    """Return a tensor's numbers as a buffer, without a copy of what lies in one piece."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


class Spool:
    """Tensors put aside on the disk, for a file of which the last tensor's shape is not yet known.

    near: a folder on the disk that the file will be on.
    """

    def __init__(self, near: Path) -> None:
        near.mkdir(parents=True, exist_ok=True)
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=near)  # noqa: SIM115 - lives as we do
        self._starts: dict[str, int] = {}
        self.forms: dict[str, Form] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def add(self, name: str, tensor: Tensor) -> None:
        """Put a tensor aside; each name once."""
        assert name not in self.forms, name
        self._starts[name] = self._file.seek(0, 2)
        self.forms[name] = Form.of(tensor)
        self._file.write(_bytes(tensor))

    def read(self, name: str) -> Tensor:
        """Return a tensor again."""
        import torch

        form = self.forms[name]
        self._file.seek(self._starts[name])
        held = bytearray(self._file.read(form.bytes))
        assert len(held) == form.bytes, name
        whole = torch.frombuffer(held, dtype=torch.uint8) if held else torch.empty(0).byte()
        return whole.view(form.kind).reshape(form.shape)

    def close(self) -> None:
        """Give the disk's room back."""
        with contextlib.suppress(OSError):  # it flushes what a full disk refused before
            self._file.close()
