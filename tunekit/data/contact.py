"""The contact sheet: every picture with its words, its crop, and what was remarked of it, as HTML.

One file that carries its pictures and asks nothing of the network, or a section for another page.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.data import masks
from tunekit.data.images import SUFFIXES, decode
from tunekit.data.records import SEVERITIES, Example, Finding
from tunekit.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Environment
    from PIL import Image

    from tunekit.data.buckets import Fit
    from tunekit.data.sheet import DataSheet

EDGE = 320
"""Longest edge of a thumbnail in pixels; a page of 200 pictures weighs about 4 MB."""
SMALL = 128  # up to this edge pictures are carried as they are and shown with hard edges
MOST_CARDS = 400
_BUCKET_EDGE = 56  # pixels on the page
_TIMES = "\N{MULTIPLICATION SIGN}"

Visits = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Card:
    """One picture of the page. boxes: crops as (left, top, width, height) in its pixels."""

    name: str
    tone: str
    remarks: list[tuple[str, str]]
    captions: Sequence[Any] = ()
    numbers: Sequence[str] = ()
    url: str = ""
    width: int = 1
    height: int = 1
    small: bool = False
    boxes: Sequence[tuple[int, int, int, int]] = ()
    shade: str = ""


def page(
    sheet: DataSheet,
    *,
    held_out: DataSheet | None = None,
    prior: DataSheet | None = None,
    sentences: Sequence[str] = (),
    findings: Sequence[Finding] | None = None,
    visits: Visits = (),
) -> str:
    """Return the contact sheet of a data sheet as one self-contained HTML page.

    held_out: pictures never trained on, shown after the others. prior: those that keep the class
    as it was. sentences: what stands under the
    title. findings: what is told; default those of the sheet. visits: as `DataSheet.visits`.
    Raises UserError for a picture that was there and is no longer.
    """
    told = sheet.findings if findings is None else findings
    sections = [("The pictures", section(sheet, visits=visits, findings=told))]
    if held_out is not None:
        sections.append(("Held out: never trained on", section(held_out)))
    if prior is not None:
        sections.append(("Pictures of the class, trained beside", section(prior)))
    template = _templates().get_template("contact.html.j2")
    return template.render(
        title=_title(sheet, told),
        label=sheet.label,
        sentences=sentences,
        findings=told,
        sections=sections,
    )


def section(
    sheet: DataSheet, *, visits: Visits = (), findings: Sequence[Finding] | None = None
) -> str:
    """Return the bucket shapes and the cards of every picture as HTML for another page.

    The page includes `styles()` and sets its colours. For the arguments see `page`.
    """
    told = sheet.findings if findings is None else findings
    remarks, alone = _by_picture(sheet.examples, told)
    plain = [example.name not in remarks for example in sheet.examples]
    order = sorted(range(len(plain)), key=plain.__getitem__)
    cards = [_broken(name, found) for name, found in alone.items()]
    for place in sorted(order[:MOST_CARDS]):
        own = remarks.get(sheet.examples[place].name, [])
        cards.append(_card(sheet, place, own, visits[place] if visits else None))
    left_out = len(order) - min(len(order), MOST_CARDS)
    template = _templates().get_template("contact_section.html.j2")
    return template.render(cards=cards, buckets=_buckets(sheet), left_out=left_out)


def styles() -> str:
    """Return the CSS that `section` needs, in the colours --ink, --soft, --good ... of its page."""
    return _templates().get_template("contact_parts.css.j2").render()


@cache
def _templates() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("tunekit.data", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _title(sheet: DataSheet, findings: Sequence[Finding]) -> str:
    count = len(sheet.examples)
    pictures = "1 picture" if count == 1 else f"{count:,} pictures"
    told = []
    for severity in SEVERITIES[:2]:
        number = sum(finding.severity == severity for finding in findings)
        if number:
            told.append(f"{number} {severity}{'s' * (number > 1)}")
    return f"{pictures}, {' and '.join(told) or 'nothing to object to'}"


def _by_picture(
    examples: Sequence[Example], findings: Iterable[Finding]
) -> tuple[dict[str, list[Finding]], dict[str, list[Finding]]]:
    """Return errors and warnings by picture, and errors by the name of files that are none."""
    known = {example.name for example in examples}
    remarks: dict[str, list[Finding]] = {}
    alone: dict[str, list[Finding]] = {}
    for finding in findings:
        for told in finding.names if finding.severity != "note" else ():
            name = told
            while name not in known and " (" in name:  # details stand in brackets
                name = name.rpartition(" (")[0]
            if name in known:
                detail = told[len(name) :].strip()
                remarks.setdefault(name, []).append(_with_detail(finding, detail))
            elif finding.severity == "error" and Path(told).suffix.lower() in SUFFIXES:
                alone.setdefault(told, []).append(finding)
    return remarks, alone


def _with_detail(finding: Finding, detail: str) -> Finding:
    text = f"{finding.text} {detail}".strip()
    return Finding(finding.severity, finding.code, text, (), finding.advice)


def _broken(name: str, findings: Sequence[Finding]) -> Card:
    return Card(name, "error", [("error", finding.text) for finding in findings])


def _card(
    sheet: DataSheet, place: int, findings: Sequence[Finding], visits: tuple[int, int] | None
) -> Card:
    example, coverage = sheet.examples[place], sheet.looks[place].coverage
    fits = [fit for r in sheet.resolutions for fit in sheet.crops(example, r)]
    picture = _thumbnail(sheet, example)
    whole = (0, 0, example.width, example.height)
    cut = [fit for fit in fits if fit.box != whole]
    return Card(
        name=example.name,
        tone=min((f.severity for f in findings), key=SEVERITIES.index, default=""),
        remarks=[(finding.severity, finding.text) for finding in findings],
        captions=[_marked(text, sheet.data.trigger) for text in example.captions],
        numbers=[*_sizes(example, fits), *_counts(example, coverage, visits)],
        url=_data_url(picture),
        width=example.width,
        height=example.height,
        small=max(picture.size) <= SMALL,
        boxes=list(dict.fromkeys(_rectangle(fit) for fit in cut)),
        shade=_shade(example, cut[0]) if len({fit.box for fit in fits}) == 1 and cut else "",
    )


def _sizes(example: Example, fits: Sequence[Fit]) -> list[str]:
    lines = [f"{example.width} {_TIMES} {example.height} pixels"]
    for fit in {(fit.width, fit.height): fit for fit in fits}.values():
        change = "as it is"
        if fit.scale != 1:
            change = f"{'enlarged' if fit.scale > 1 else 'scaled'} {fit.scale:.2f}{_TIMES}"
        lost = fit.cut(example.width, example.height)
        kept = f"{lost:.0%} cut off" if lost >= 0.01 else "under 1% cut off"
        kept = kept if lost else "nothing cut off"
        lines.append(f"to {fit.width} {_TIMES} {fit.height}: {change}, {kept}")
    return lines


def _counts(example: Example, coverage: float | None, visits: tuple[int, int] | None) -> list[str]:
    told = []
    if visits:
        low, high = visits
        told.append(f"shown {low:,} times" if low == high else f"shown {low:,} to {high:,} times")
    if example.repeats != 1:
        told.append(f"{example.repeats} times an epoch")
    if example.weight != 1:
        told.append(f"weight {example.weight:g}")
    if coverage is not None:
        told.append(f"mask keeps {coverage:.0%}")
    return [", ".join(told)] if told else []


def _marked(text: str, trigger: str) -> list[tuple[str, bool]]:
    """Return a caption in parts, and which of them are the trigger."""
    if not trigger:
        return [(text, False)]
    parts = re.split(rf"((?<!\w){re.escape(trigger)}(?!\w))", text, flags=re.IGNORECASE)
    return [(part, bool(number % 2)) for number, part in enumerate(parts) if part]


def _rectangle(fit: Fit) -> tuple[int, int, int, int]:
    return fit.left, fit.top, fit.right - fit.left, fit.bottom - fit.top


def _shade(example: Example, fit: Fit) -> str:
    """Return the SVG path of all that a crop leaves out."""
    whole = f"M0 0H{example.width}V{example.height}H0Z"
    return f"{whole}M{fit.left} {fit.top}V{fit.bottom}H{fit.right}V{fit.top}Z"


def _thumbnail(sheet: DataSheet, example: Example) -> Image.Image:
    """Return a small picture, faded where its mask leaves it out."""
    from PIL import Image

    settings = sheet.data.mask
    try:
        opened = decode(example.path, sheet.data.background)
        mask = masks.of(settings, opened, example.mask) if settings else None
    except UserError as error:
        raise UserError(f"{example.path}: was there at the start, now {error}") from error
    picture = opened.image
    picture.thumbnail((EDGE, EDGE), reducing_gap=3)
    if mask is None:
        return picture
    faded = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size), 0.55)
    return Image.composite(picture, faded, mask.resize(picture.size))


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    if max(picture.size) <= SMALL:
        kind = "png"
        picture.save(buffer, "PNG", optimize=True)
    else:
        kind = "jpeg"
        picture.save(buffer, "JPEG", quality=82, optimize=True)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _buckets(sheet: DataSheet) -> list[dict[str, int]]:
    """Return the shapes of the buckets, drawn to one scale; none where all pictures are squares."""
    if sheet.data.buckets is None or any(f.code == "buckets" for f in sheet.errors):
        return []
    counts = [item for r in sheet.resolutions for item in sheet.in_buckets(r).items()]
    longest = max((max(shape) for shape, _ in counts), default=1)
    return [
        {
            "width": width,
            "height": height,
            "count": count,
            "across": max(4, round(_BUCKET_EDGE * width / longest)),
            "down": max(4, round(_BUCKET_EDGE * height / longest)),
        }
        for (width, height), count in sorted(counts, key=lambda item: item[0][0] / item[0][1])
    ]
