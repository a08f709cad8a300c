"""Prompt files: a prompt a line, with what is special to it behind, as sd-scripts has them.

a red robot on the beach --w 512 --h 768 --s 28 --l 7.5 --d 42 --n blurry
# a line that begins with # says nothing, nor does an empty one
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunekit.errors import UserError, did_you_mean

_LARGEST = 1_000_000  # bytes
_MOST_LINES = 10_000
_FLAG = re.compile(r"(?:^|\s)--(?=\S)")
# Flag -> the setting, what its value is, and how it is read.
_FLAGS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "w": ("width", "a whole number of pixels", int),
    "h": ("height", "a whole number of pixels", int),
    "s": ("steps", "a whole number", int),
    "l": ("guidance_scale", "a number", float),
    "d": ("seed", "a whole number", int),
    "n": ("negative_prompt", "text", str),
}
_OFTEN = {"width": "w", "height": "h", "steps": "s", "guidance": "l", "scale": "l", "cfg": "l"}
_OFTEN |= {"seed": "d", "negative": "n", "negative_prompt": "n"} | {flag: flag for flag in _FLAGS}


@dataclass(frozen=True)
class Line:
    """A prompt of a file, where it stands, and the settings it says, by their names; seed too."""

    prompt: str
    where: str
    said: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> list[Line]:
    """Return the prompts of the file at `path`, in order.

    Raises UserError, all faults at once, each with its line: a flag that there is not, that is
    there twice or has no value, a value of another kind, a line without a prompt. And for a file
    that is missing, larger than 1 MB, not UTF-8, or without any prompt.
    """
    found: list[Line] = []
    faults: list[str] = []
    for number, text in enumerate(_text(path).splitlines(), 1):
        if not text.strip() or text.lstrip().startswith("#"):
            continue
        try:
            found.append(parse(text, f"{path}:{number}"))
        except UserError as fault:
            faults.append(str(fault))
    if faults:
        raise UserError("\n".join(faults))
    if not found:
        raise UserError(f"{path}: holds no prompt; write one a line")
    if len(found) > _MOST_LINES:
        raise UserError(f"{path}: holds {len(found)} prompts; at most {_MOST_LINES} are drawn")
    return found


def parse(text: str, where: str) -> Line:
    """Return what a line says; UserError, which begins with `where`, for what it cannot say."""
    prompt, *flags = _FLAG.split(text)
    if not prompt.strip():
        raise UserError(f"{where}: has no prompt before its first --")
    said: dict[str, Any] = {}
    for flag in flags:
        word, _, value = flag.replace("\t", " ").partition(" ")
        if word not in _FLAGS:
            near = _OFTEN.get(word.lower())
            meant = f' (did you mean "--{near}"?)' if near else did_you_mean(word, _FLAGS)
            there = ", ".join(f"--{name}" for name in _FLAGS)
            raise UserError(
                f"{where}: --{word} is no setting of a prompt{meant}; there is: {there}"
            )
        name, kind, read_as = _FLAGS[word]
        if name in said:
            raise UserError(f"{where}: --{word} stands there twice")
        if not value.strip():
            raise UserError(f"{where}: --{word} has no value; it is {kind}")
        try:
            said[name] = read_as(value.strip())
        except ValueError:
            raise UserError(f'{where}: --{word} is {kind}, not "{value.strip()[:60]}"') from None
    return Line(prompt.strip(), where, said)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _LARGEST:
        raise UserError(f"{path}: is larger than {_LARGEST // 1_000_000} MB; no list of prompts is")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: is not UTF-8 text (byte {error.start}): save it as UTF-8"
        ) from None
