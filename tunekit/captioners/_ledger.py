"""Captions as they are made, a line each: a run that ends early goes on where it stopped."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tunekit.captioners.base import Said
from tunekit.errors import UserError


class Ledger:
    """A hidden file beside the result, for one run at a time.

    done: what was said, by the picture's name and the hash of its pixels. settings: what decides
    the captions; a file that was begun with others is refused, not mixed.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = dict(settings)
        self.done: dict[tuple[str, str], Said] = {}
        self._file = -1

    def __enter__(self) -> Self:
        """Open the file and read what is done. Raises UserError where it is not ours to go on."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._read()
        except BlockingIOError:
            os.close(self._file)
            raise UserError(
                f"{self.path}: another run is writing these captions; wait for it to end"
            ) from None
        except BaseException:
            os.close(self._file)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file; it stays where there is something to go on with."""
        if not self.done:
            self.remove()
        os.close(self._file)

    def add(self, name: str, pixels: str, said: Said) -> None:
        """Keep what was said of a picture."""
        self.done[name, pixels] = said
        self._append({"name": name, "pixels": pixels, "text": said.text, "remark": said.remark})

    def remove(self) -> None:
        """Take the file away: its captions stand in the result now."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> None:
        with open(self._file, "rb", closefd=False) as file:
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # a line cut short was never finished
        os.ftruncate(self._file, len(whole))
        os.lseek(self._file, 0, os.SEEK_END)
        try:
            rows = [json.loads(line) for line in whole.splitlines()]
            settings = rows[0]["settings"] if rows else {}
            for row in rows[1:]:
                self.done[row["name"], row["pixels"]] = Said(row["text"], row["remark"])
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(f"{self.path}: is damaged ({error}); remove it to begin anew") from None
        if not self.done:
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
            self._append({"settings": self.settings})
        elif settings != self.settings:
            changed = [
                f"{key} was {settings.get(key)!r}, is {self.settings.get(key)!r}"
                for key in sorted({*settings, *self.settings})
                if settings.get(key) != self.settings.get(key)
            ]
            raise UserError(
                f"{self.path}: holds {len(self.done)} captions made with other settings "
                f"({'; '.join(changed)}): give those again to go on, or remove the file"
            )

    def _append(self, row: Mapping[str, Any]) -> None:
        os.write(self._file, (json.dumps(row, ensure_ascii=False) + "\n").encode())
