"""Captions for a folder of pictures, for review: what `tunekit caption` does.

Every picture is looked at first, so that a broken one is told before hours are spent. Captions are
kept line by line in a hidden file beside the result; only when every picture had its turn is the
result written, whole.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tunekit import captioners, hub
from tunekit.captioners import Captioner, Wishes
from tunekit.captioners._ledger import Ledger
from tunekit.captioners._place import find
from tunekit.data.cache import Cache
from tunekit.data.captions import fill, insert_trigger
from tunekit.data.reading import NOT_UTF8, escaped, is_utf8
from tunekit.data.records import DataError, Finding, Record, printable
from tunekit.data.source import fault_line, read, streamed
from tunekit.errors import UserError, some
from tunekit.progress import Reporter, Silent
from tunekit.recipe_faults import explain
from tunekit.recipe_source import Place as KeyPlace
from tunekit.recipe_source import RecipeError, Source, from_overrides

if TYPE_CHECKING:
    from tunekit.captioners.base import Said
    from tunekit.schema_source import Pictures
    from tunekit.section import Section

_NAMED = 10  # names of pictures in one line for people


@dataclass(frozen=True)
class Captioned:
    """What was written.

    out: the file, or the folder of .txt files. captions: the new ones by picture. kept: pictures
    that had captions, which stayed. silent: pictures of which nothing was said, and none was
    written. remarks: pictures by what is odd with their captions.
    """

    source: str
    captioner: str
    out: Path
    captions: Mapping[str, str]
    kept: tuple[str, ...]
    silent: tuple[str, ...]
    remarks: Mapping[str, tuple[str, ...]]

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain data, for scripts."""
        return {**asdict(self), "out": str(self.out)}

    def lines(self) -> list[str]:
        """Return the new captions, one a line, each with its picture."""
        return [printable(f"{name}: {text}") for name, text in self.captions.items()]

    def told(self) -> list[str]:
        """Return what people want to know beside the captions."""
        lines = []
        if self.captions:
            lines.append(
                f"{self.out}: {_count(self.captions)} captioned; read them before you train"
            )
        else:
            lines.append(f"{self.out}: nothing was written")
        if self.kept:
            lines.append(
                f"{_count(self.kept)} had captions, which stay ({some(self.kept, _NAMED)}); "
                "--overwrite writes new ones"
            )
        for remark, names in self.remarks.items():
            lines.append(f"{_count(names)} with captions {remark}: {', '.join(names)}")
        if self.silent:
            lines.append(
                f"of {_count(self.silent)} nothing was said, and training will miss their "
                f"captions: {', '.join(self.silent)}; write them by hand, or ask otherwise"
            )
        return list(map(printable, lines))


def caption(
    source: str | Path,
    captioner: str,
    options: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    instruction: str = "",
    trigger: str = "",
    class_noun: str = "",
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Captioned:
    """Write a caption for every picture of `source` that has none.

    source: a folder, or what a recipe's `data.source` may name. options: KEY=VALUE for the
    captioner. out: a .jsonl file; None: where the folder's captions stand, else its metadata.jsonl.
    instruction: what to describe, for captioners that follow one. class_noun: what the subject is
    called; what makes it itself is left out then, as far as the captioner can. trigger: put before
    the class noun. overwrite: whether captions that are there are written anew.

    Raises UserError, nothing written, for whatever is wrong with source, pictures or captioner.
    """
    reporter = reporter or Silent()
    kind, chosen, wishes = _asked(captioner, options, instruction, trigger, class_noun)
    pictures, cache = _pictures(str(source)), Cache(say=reporter.note)
    with cache.using() if streamed([pictures]) else contextlib.nullcontext():
        records = _records(pictures, cache, reporter)
        place = find(Path(source), records, None if out is None else Path(out))
        kept = () if overwrite else tuple(name for name in place.files if name in place.had)
        todo = {name: record for name, record in place.files.items() if name not in kept}
        said: dict[str, Said] = {}
        if todo:
            pixels = _look(str(source), todo, reporter)
            settings = {
                "captioner": captioner,
                "options": chosen.model_dump(mode="json"),
                **asdict(wishes),
            }
            with Ledger(place.ledger, settings) as ledger:
                left = {n: r for n, r in todo.items() if (n, pixels[n]) not in ledger.done}
                _describe(kind, chosen, wishes, left, len(todo), ledger, reporter)
                for name in todo:
                    words = ledger.done[name, pixels[name]]
                    said[name] = replace(words, text=_finished(words.text, trigger, class_noun))
                place.write(
                    {name: _escaped(words.text) for name, words in said.items() if words.text}
                )
                ledger.remove()
    captions = {name: words.text for name, words in said.items() if words.text}
    remarks: dict[str, tuple[str, ...]] = {}
    for name in captions:
        if remark := said[name].remark:
            remarks[remark] = (*remarks.get(remark, ()), name)
    silent = tuple(name for name in said if name not in captions)
    return Captioned(str(source), captioner, place.out, captions, kept, silent, remarks)


def _asked(
    captioner: str, options: Sequence[str], instruction: str, trigger: str, class_noun: str
) -> tuple[type[Captioner], Section, Wishes]:
    """Return what is asked for, checked. Raises UserError."""
    kind = captioners.get(captioner)
    if trigger and not class_noun:
        raise UserError(f"--trigger {trigger}: stands before the class noun; say it with --class")
    for word in (trigger, class_noun):
        if re.search(r"[{}\r\n]", word) or word != word.strip():
            raise UserError(
                f'"{word}": a word without braces, line breaks and outer spaces, please'
            )
    if instruction and not kind.takes_instruction:
        able = [n for n in captioners.names() if captioners.get(n).takes_instruction]
        raise UserError(
            f"--instruction: the captioner {captioner} follows none; {', '.join(able)} may"
        )
    asked = fill(instruction, trigger, class_noun)
    return kind, _options(kind, captioner, options), Wishes(asked, class_noun)


def _options(kind: type[Captioner], captioner: str, given: Sequence[str]) -> Section:
    source = Source(places={(): KeyPlace(f"captioner {captioner}")})
    for one in from_overrides(given):
        source = one.lay_over(source)
    faults = list(source.faults)
    try:
        options = kind.Options(**source.tree)
    except ValidationError as error:
        faults += explain(error, source, {"": kind.Options})
    if faults:
        raise RecipeError(faults)
    return options


def _records(pictures: Pictures, cache: Cache, reporter: Reporter) -> list[Record]:
    """Return the source's pictures, those that its metadata does not list as well."""
    source = pictures.path or str(pictures.dataset)
    found = read([pictures], uncaptioned=True, cache=cache)
    missing = [finding for finding in found.findings if _not_listed(finding)]
    faults = [
        fault_line(finding)
        for finding in found.findings
        # what is not listed shall be
        if finding.severity == "error" and not _not_listed(finding)
    ]
    if faults:
        raise DataError(source, faults)
    for finding in found.findings:
        # no mask is needed here, and captions are what this is for
        if finding.severity != "error" and finding.code not in ("mask-unused", "no-caption"):
            reporter.note(str(finding))
    unlisted = [Record(Path(source) / name, name) for f in missing for name in f.names]
    return sorted([*found.records, *unlisted], key=lambda record: record.name)


def _pictures(source: str) -> Pictures:
    from tunekit.schema_source import Pictures

    if not is_utf8(source):
        raise UserError(f"{escaped(source)}: {NOT_UTF8}")
    if hub.means_id(source):
        return Pictures(dataset=source)
    return Pictures(path=source)


def _not_listed(finding: Finding) -> bool:
    return finding.severity == "error" and finding.code == "not-listed"


def _look(source: str, records: Mapping[str, Record], reporter: Reporter) -> dict[str, str]:
    """Return the hash of each picture's pixels. Raises DataError with all that cannot be read."""
    from tunekit.data.images import PictureError, decode, pixel_hash

    pixels, faults = {}, []
    with reporter.stage("checking", len(records)) as tick:
        for name, record in records.items():
            try:
                pixels[name] = pixel_hash(decode(record.path).image)
            except PictureError as error:
                faults.append(f"{name}: {error}")
            tick()
    if faults:
        raise DataError(source, faults)
    return pixels


def _describe(
    kind: type[Captioner],
    options: Section,
    wishes: Wishes,
    records: Mapping[str, Record],
    wanted: int,
    ledger: Ledger,
    reporter: Reporter,
) -> None:
    """Have every picture described, each kept as soon as it is. wanted: with those done before."""
    from tunekit.data.images import open_rgb, pixel_hash
    from tunekit.inference import default_device

    if len(records) < wanted:
        reporter.note(f"{wanted - len(records)} of {wanted} pictures were captioned before")
    if not records:
        return
    captioner = kind.load(options, wishes, default_device())
    for note in captioner.notes:
        reporter.note(note)
    with reporter.stage("captions", len(records)) as tick:
        for name, record in records.items():
            image = open_rgb(record.path)
            ledger.add(name, pixel_hash(image), captioner.describe(image))
            tick(name)


def _finished(text: str, trigger: str, class_noun: str) -> str:
    """Return a caption in one line, with the trigger where there is one."""
    text = " ".join(text.replace("\0", " ").split())
    return insert_trigger(text, trigger, class_noun) if trigger else text


def _escaped(text: str) -> str:
    """Return a caption as training fills it in: its own braces doubled."""
    return text.replace("{", "{{").replace("}", "}}")


def _count(names: Sequence[str] | Mapping[str, str]) -> str:
    return "1 picture" if len(names) == 1 else f"{len(names)} pictures"
