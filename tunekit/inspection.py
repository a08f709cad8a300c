"""What `tunekit inspect` tells of a recipe's pictures, or a folder's, before they are trained."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from tunekit import schema
from tunekit.data import checks, contact
from tunekit.data.cache import Cache
from tunekit.data.reading import NOT_UTF8, escaped, is_utf8
from tunekit.data.records import SEVERITIES, Finding, printable
from tunekit.data.sheet import DataSheet, examine, told
from tunekit.data.source import fault_line, streamed
from tunekit.errors import UserError
from tunekit.progress import Reporter, Silent
from tunekit.recipe import Recipe, load_recipe
from tunekit.recipe_faults import explain, nested
from tunekit.recipe_source import RecipeError, from_mapping, from_overrides
from tunekit.sheets import RESOLUTION, Plan, by_severity, counting, look
from tunekit.wholefile import write_whole

if TYPE_CHECKING:
    from tunekit.families import Description

_RECIPES = (".yaml", ".yml")
_LISTED = 60  # pictures in the table of the terminal
_CAPTION = 90  # characters of a caption there; the JSON and the page have all
_UNGIVEN = {"trigger": "(no trigger)", "class": "(no class)"}


@dataclass(frozen=True)
class Inspection:
    """The data sheet, and what only the whole recipe can tell.

    sheet: the training pictures. held_out: those never trained on. prior: those that keep the
    class, where they are taken from a folder. plan: None without a recipe, and where a picture
    cannot be used. findings: all there is to tell, errors first.
    """

    sheet: DataSheet
    held_out: DataSheet | None
    plan: Plan | None
    findings: tuple[Finding, ...]
    prior: DataSheet | None = None

    @property
    def ok(self) -> bool:
        """Whether training would take these pictures."""
        return not any(finding.severity == "error" for finding in self.findings)

    def lines(self) -> list[str]:
        """Return everything as lines of text; long lists are counted, `as_dict` has them whole."""
        lines = [self.sheet.headline(), *_table(self.sheet)]
        if self.plan:
            lines += ["", self.plan.told()]
        for severity in SEVERITIES:
            some = [finding for finding in self.findings if finding.severity == severity]
            if some:
                lines += ["", f"{severity}s:"]
                lines += [f"  {_line(finding)}" for finding in some]
        return [*lines, "", self.verdict()]

    def verdict(self) -> str:
        """Return in a sentence whether training can begin."""
        errors, warnings = (self._count(severity) for severity in SEVERITIES[:2])
        if errors:
            return f"training refuses this: {_plural(errors, 'error')} to mend"
        if warnings:
            return f"training takes this, with {_plural(warnings, 'warning')}"
        return "training takes this; nothing to object to"

    def _count(self, severity: str) -> int:
        return sum(finding.severity == severity for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return everything for scripts: pictures with sizes, crops and words, and findings."""
        plan = self.plan
        return {
            "source": self.sheet.label,
            "ok": self.ok,
            "resolutions": list(self.sheet.resolutions),
            "pictures": _pictures(self.sheet, plan.visits if plan else ()),
            "findings": [asdict(finding) for finding in self.findings],
            "training": {
                "steps": plan.steps,
                "pictures_a_step": plan.pictures_a_step,
                "epochs": round(plan.epochs, 4),
            }
            if plan
            else None,
            "held_out": _apart(self.held_out),
            "prior": _apart(self.prior),
        }

    def html(self) -> str:
        """Return the contact sheet, a self-contained page."""
        sentences = [self.sheet.headline(), *([self.plan.told()] if self.plan else [])]
        return contact.page(
            self.sheet,
            held_out=self.held_out,
            prior=self.prior,
            sentences=[f"{line}." for line in (*sentences, self.verdict())],
            findings=self.findings,
            visits=self.plan.visits if self.plan else (),
        )

    def save(self, path: Path) -> None:
        """Write the contact sheet to a .html file, whole or not at all; replaces an older one."""
        if path.suffix.lower() not in (".html", ".htm"):
            raise UserError(f"{path}: a contact sheet is a page; name it .html")
        write_whole(path, self.html())


def inspect(
    target: Path | str,
    overrides: Sequence[str] = (),
    *,
    trigger: str | None = None,
    class_noun: str | None = None,
    resolution: int | None = None,
    reporter: Reporter | None = None,
    held: contextlib.ExitStack | None = None,
) -> Inspection:
    """Look at the pictures of a recipe (a .yaml file), or at a folder, .parquet or .tar file.

    overrides: ``KEY=VALUE``, as for a run; of a folder, keys of `data` alone. trigger, class_noun,
    resolution: those keys of `data`. Without trigger or class what needs them is not checked, and
    that is said. No weights are loaded; of the base only its description and tokenizer are read.
    held: where the pictures of tables and shards are kept in the cache until it is closed, for who
    goes on to draw them in a contact sheet; None: until this returns.

    Raises UserError where there is nothing to look at: what is wrong with pictures is a finding.
    """
    given = {"trigger": trigger, "class": class_noun, "resolution": resolution}
    options = {key: value for key, value in given.items() if value is not None}
    path = Path(target)
    reporter = reporter or Silent()
    if not is_utf8(str(target)):
        raise UserError(f"{escaped(str(target))}: {NOT_UTF8}")
    cache = Cache(say=reporter.note)
    with contextlib.ExitStack() as until_here:
        keep = partial(_keep, cache, until_here if held is None else held)
        if path.suffix.lower() in _RECIPES:
            # In quotes, since they are values: "true" and "12" are words as good as others.
            own = [f"data.{k}={json.dumps(v, ensure_ascii=False)}" for k, v in options.items()]
            return _of_recipe(path, [*overrides, *own], reporter, keep)
        if not path.exists() and "*" not in path.name:
            raise UserError(f"{target}: there is no such recipe or folder of pictures")
        return _of_folder(str(target), overrides, options, reporter, keep)


def _keep(cache: Cache, held: contextlib.ExitStack, data: schema.Data) -> Cache:
    """Hold the cache, where pictures of `data` are kept in it: of folders none are."""
    from tunekit.schema_source import Pictures

    more = (data.holdout, data.prior.source if data.prior else None)
    if streamed([*data.sources, *(Pictures(path=path) for path in more if path)]):
        held.enter_context(cache.using())
    return cache


def _of_recipe(
    path: Path, overrides: Sequence[str], reporter: Reporter, keep: Callable[[schema.Data], Cache]
) -> Inspection:
    recipe = load_recipe(path, overrides)
    cache = keep(recipe.data)
    base, said = _describe(recipe)
    words = [token.name for token in recipe.tokens]
    seen = look(recipe.data, recipe.train, base, reporter, words, cache)
    findings = by_severity([*said, *seen.findings])
    return Inspection(seen.training, seen.held_out, seen.plan, findings, seen.prior)


def _describe(recipe: Recipe) -> tuple[Description | None, list[Finding]]:
    from tunekit import families

    try:
        base = families.describe(recipe.base)
    except UserError as error:
        text = f"the base cannot be described, so captions are not held to what it reads: {error}"
        return None, [Finding("warning", "base", text)]
    try:
        if recipe.tokens:
            base.add_words(recipe.tokens, recipe.data.class_noun)
    except UserError as error:
        return base, [Finding("error", "tokens", line) for line in str(error).splitlines()]
    return base, []


class _Folder(schema.Section):
    """What a folder is looked at with: the data section of a recipe."""

    data: schema.Data


def _of_folder(
    folder: str,
    overrides: Sequence[str],
    options: dict[str, Any],
    reporter: Reporter,
    keep: Callable[[schema.Data], Cache],
) -> Inspection:
    words = [key for key in _UNGIVEN if not _given(key, options, overrides)]
    source = from_mapping({"data": {"source": folder, **_UNGIVEN, **options}}, name=folder)
    for override in from_overrides(overrides):
        source = override.lay_over(source)
    if others := sorted(key for key in source.tree if key != "data"):
        raise UserError(f"{others[0]}: a folder has keys of data only; inspect a recipe for others")
    if source.faults:
        raise RecipeError(source.faults)
    try:
        data = _Folder.model_validate(source.tree).data
    except ValidationError as error:
        sections = nested({"": _Folder, "data": schema.Data})
        raise RecipeError(explain(error, source, sections)) from None
    unknown = {"trigger": checks.UNKNOWN_TRIGGER, "class_noun": checks.UNKNOWN_CLASS}
    fields = {"trigger": "trigger", "class": "class_noun"}
    data = data.model_copy(update={fields[key]: unknown[fields[key]] for key in words})
    size, cache = None if data.resolutions else RESOLUTION, keep(data)
    with counting(reporter, "looking") as progress:
        sheet = examine(data, size, progress=progress, cache=cache)
    return Inspection(sheet, None, None, by_severity([*sheet.findings, *_assumed(data, words)]))


def _given(key: str, options: dict[str, Any], overrides: Sequence[str]) -> bool:
    return key in options or any(text.startswith(f"data.{key}=") for text in overrides)


def _assumed(data: schema.Data, words: Sequence[str]) -> list[Finding]:
    """Return what was not said, and what was therefore assumed or left out."""
    found = []
    if not data.resolutions:
        text = f"no resolution given: looked at for {RESOLUTION} pixels"
        found.append(Finding("note", "assumed", text, (), "--resolution says another"))
    if words:
        named = " and ".join(f"--{key}" for key in words)
        what = "it" if len(words) == 1 else "them"
        text = f"no {' and no '.join(words)} given: whether captions say {what} is not checked"
        found.append(Finding("note", "assumed", text, (), f"give {named}"))
    text = "no base given: captions are not held to what its text encoder reads"
    return [*found, Finding("note", "assumed", text, (), "inspect a recipe for that")]


def _line(finding: Finding) -> str:
    """Return a finding without its severity; an error begins with the file it is about."""
    if finding.severity == "error":
        return printable(fault_line(finding))
    return told(finding).removeprefix(f"{finding.severity}: ")


def _plural(count: int, word: str) -> str:
    return f"1 {word}" if count == 1 else f"{count} {word}s"


def _table(sheet: DataSheet) -> list[str]:
    """Return a row for each picture and resolution: size, bucket, scale, cut, caption."""
    rows = [("picture", "size", "made", "scale", "cut", "crop", "caption")]
    for example in sheet.examples[:_LISTED]:
        first = True
        for resolution in sheet.resolutions:
            crops = sheet.crops(example, resolution)
            cells = _cells(example.width, example.height, crops)
            size = f"{example.width}x{example.height}"
            name, size = (printable(example.name), size) if first else ("", "")
            more = f" (and {len(example.captions) - 1} more)" if len(example.captions) > 1 else ""
            words = example.caption
            words = printable(words if len(words) <= _CAPTION else f"{words[:_CAPTION]}...")
            rows.append((name, size, *cells, f"{words}{more}" if first else ""))
            first = False
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    lines = [
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[6]]).rstrip()
        for row in rows
    ]
    hidden = len(sheet.examples) - _LISTED
    if hidden > 0:
        lines.append(f"and {hidden:,} more pictures; --json and --html list them")
    return ["", *lines] if len(rows) > 1 else []


def _cells(width: int, height: int, crops: Sequence[Any]) -> tuple[str, str, str, str]:
    if not crops:
        return "refused", "", "", ""
    fit = crops[0]
    lost = fit.cut(width, height)
    places = f" and {len(crops) - 1} more" if len(crops) > 1 else ""
    box = f"{fit.left},{fit.top} to {fit.right},{fit.bottom}{places}"
    cut = "none" if not lost else f"{lost:.0%}" if lost >= 0.01 else "<1%"
    return f"{fit.width}x{fit.height}", f"{fit.scale:.2f}x", cut, box if lost else "all"


def _apart(sheet: DataSheet | None) -> dict[str, Any] | None:
    return {"source": sheet.label, "pictures": _pictures(sheet, ())} if sheet else None


def _pictures(sheet: DataSheet, visits: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    pictures = []
    for place, example in enumerate(sheet.examples):
        trained = []
        for resolution in sheet.resolutions:
            if crops := sheet.crops(example, resolution):
                fit = crops[0]
                trained.append(
                    {
                        "resolution": resolution,
                        "bucket": [fit.width, fit.height],
                        "crops": [list(crop.box) for crop in crops],
                        "scale": round(fit.scale, 4),
                        "cut": round(fit.cut(example.width, example.height), 4),
                    }
                )
        pictures.append(
            {
                "name": example.name,
                "path": str(example.path),
                "width": example.width,
                "height": example.height,
                "captions": list(example.captions),
                "origin": example.origin,
                "repeats": example.repeats,
                "weight": example.weight,
                "mask": str(example.mask) if example.mask else None,
                "mask_coverage": sheet.looks[place].coverage,
                "trained": trained,
                "visits": list(visits[place]) if visits else None,
            }
        )
    return pictures
