"""Files that wait for their names: written and read back, and verified when there is room for it.

What fails its verification is kept as ``*.rejected``, so that nobody takes it for good.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tunekit import modelcard
from tunekit.checkpoint import read_safetensors, write_safetensors
from tunekit.errors import UserError
from tunekit.loaded import VerificationError

if TYPE_CHECKING:
    from torch import Tensor

    from tunekit.verification import Parity

_PENDING = ".unverified"
_REJECTED = ".rejected"


class ExportError(UserError):
    """An exported file failed a check; the message names the check and where the file is kept."""


@dataclass(frozen=True)
class Draft:
    """Files that are verified together. pending: the name each is to have -> where it is."""

    pending: Mapping[Path, Path]

    @classmethod
    def of(cls, planned: Mapping[Path, tuple[Mapping[str, Tensor], Mapping[str, str]]]) -> Draft:
        """Write files of (tensors, metadata), under other names than those that they are to have.

        Raises ExportError where the disk holds anything else than what was written.
        """
        draft = cls(
            {path: path.with_name(f"{path.stem}{_PENDING}{path.suffix}") for path in planned}
        )
        try:
            for path, (tensors, metadata) in planned.items():
                written = draft.pending[path]
                write_safetensors(written, tensors, metadata)
                said = {**metadata, **modelcard.hashes(written)}
                write_safetensors(written, tensors, said)
                _read_back(written, tensors, said)
        except VerificationError as fault:
            raise draft.rejected(fault) from fault
        except BaseException:
            draft.discard()
            raise
        return draft

    def verified(self, check: Callable[[list[Path]], Parity]) -> Parity:
        """Give the files their names if `check` does not fail; ExportError if it does."""
        try:
            parity = check(list(self.pending.values()))
        except VerificationError as fault:
            raise self.rejected(fault) from fault
        for path, written in self.pending.items():
            written.replace(path)
            _beside(path).unlink(missing_ok=True)
        return parity

    def rejected(self, fault: VerificationError) -> ExportError:
        """Return what `fault` means for these files, which stay under names that say it."""
        kept = []
        for path, written in self.pending.items():
            if written.exists():
                written.replace(_beside(path))
                kept.append(_beside(path).name)
        what = "the file is" if len(kept) == 1 else "the files are"
        first = next(iter(self.pending))
        return ExportError(f"{first}: {fault}; {what} kept as {', '.join(kept)}")

    def discard(self) -> None:
        """Remove what has not got its name."""
        for written in self.pending.values():
            written.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}{_REJECTED}")


def _read_back(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise VerificationError where the disk holds anything else than what was written."""
    read, said = read_safetensors(path)
    if read.keys() != tensors.keys() or said != dict(metadata):
        raise VerificationError("read back", "names or metadata differ from what was written")
    for key, tensor in tensors.items():
        if read[key].dtype != tensor.dtype or not read[key].equal(tensor):
            raise VerificationError("read back", f"{key} differs from what was written")
