"""The words of a picture: what fills its captions, and what is made of them at each visit."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from tunekit.data import templates
from tunekit.errors import UserError, did_you_mean
from tunekit.seeding import derive

if TYPE_CHECKING:
    from tunekit.schema_data import Data
    from tunekit.schema_source import Captions

PLACEHOLDERS = ("trigger", "class")
_BRACES = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_ARTICLE = re.compile(r"(?<!\w)(an?)(\s+)$", re.IGNORECASE)
_CLOSING = frozenset(",.;:!?)]}|/")


def fill(template: str, trigger: str, class_noun: str) -> str:
    """Return `template` with ``{trigger}`` and ``{class}`` replaced; ``{{`` and ``}}`` are braces.

    Where a value is empty, the space it would leave doubled goes with it: with an empty trigger,
    "a {trigger} {class}" becomes "a robot".

    Raises UserError for an unknown placeholder or a single brace, so that no caption is trained
    with a typing error in it.
    """
    values = {"trigger": trigger, "class": class_noun}

    def replacement(match: re.Match[str]) -> str:
        whole, name = match.group(0), match.group(1)
        if whole in ("{{", "}}"):
            return whole[0]
        if name in values:
            return values[name]
        if name is None:
            raise UserError(f'single "{whole}" in "{template}"; write "{whole * 2}" for a brace')
        raise UserError(
            f'unknown placeholder "{whole}" in "{template}"{did_you_mean(name, PLACEHOLDERS)}; '
            f'there are {{trigger}} and {{class}}, and "{{{{" is a brace'
        )

    filled = _BRACES.sub(replacement, template)
    if trigger and class_noun:
        return filled
    return re.sub(r" {2,}", " ", filled).strip()


def holds(text: str, word: str) -> bool:
    """Return whether `text` says `word` as a word of its own, in capitals or not.

    "zorp" is in "a Zorp, waving" and not in "zorpish"; an empty word is in every text.
    """
    return not word or _occurrence(text, word) is not None


def insert_trigger(text: str, trigger: str, class_noun: str, separator: str = ",") -> str:
    """Return `text` with the trigger before its class noun; unchanged where it has the trigger.

    Where the class noun is not said, both go in front, as a tag of their own: "at the beach"
    becomes "zorp robot, at the beach". An article right before the noun is made to fit: "an owl"
    becomes "a zorp owl".
    """
    if holds(text, trigger):
        return text
    place = _occurrence(text, class_noun)
    if place is None:
        tags = (f"{trigger} {class_noun}", text.strip())
        return _joint(separator).join(tag for tag in tags if tag)
    before, after = text[: place.start()], text[place.start() :]
    return f"{_ARTICLE.sub(_fitting(trigger), before)}{trigger} {after}"


def expand(record_captions: tuple[str, ...], data: Data) -> tuple[str, ...]:
    """Return a picture's captions as training knows them: filled, with trigger, prefix and suffix.

    record_captions: raw, as its source gives them; none: the templates of `data.captions`. Between
    caption and prefix or suffix stands a space, unless white space or punctuation does already.
    Raises UserError, all faults in one, for placeholders that do not exist and empty captions.
    """
    settings, faults, filled = data.captions, [], []
    for raw in record_captions or templates.named(settings.template):
        try:
            filled.append(_expanded(raw, settings, data.trigger, data.class_noun))
        except UserError as error:
            faults.append(str(error))
    if faults:
        raise UserError("; ".join(dict.fromkeys(faults)))
    return tuple(filled)


def at_visit(captions: tuple[str, ...], settings: Captions, seed: int, key: str, visit: int) -> str:
    """Return the words a picture is shown with at its visit number `visit` (0, 1, 2, ...).

    captions: as `expand` returns them. Of several, all come before one comes again, each round in
    another order. Then tags are dropped and shuffled: those of prefix and suffix and the first
    `keep_tokens` stay as they are. With a chance of `settings.dropout` it is "" instead. What is
    drawn depends on seed, key (the picture's) and visit alone; nothing else shifts it.
    """
    assert captions, "a picture without captions has at least its template's"
    assert visit >= 0, "visits are counted from 0"
    if _chance(seed, f"caption dropout {key}", visit) < settings.dropout:
        return ""
    round_, turn = divmod(visit, len(captions))
    text = captions[_order(len(captions), seed, f"caption order {key}", round_)[turn]]
    if not settings.changes_tags:
        return text
    head, free, tail = _parts(text, settings)
    kept = [
        tag
        for number, tag in enumerate(free)
        if _chance(seed, f"tag dropout {number} {key}", visit) >= settings.tag_dropout
    ]
    if settings.shuffle:
        kept = [kept[at] for at in _order(len(kept), seed, f"tag order {key}", visit)]
    return _joint(settings.separator).join([*head, *kept, *tail])


def all_texts(captions: tuple[str, ...], settings: Captions) -> frozenset[str] | None:
    """Return every text `at_visit` can give for these captions; None where they are too many.

    They are too many as soon as a caption has tags to shuffle or to leave out: then only the
    visits of a run tell which are needed.
    """
    texts = {""} if settings.dropout else set()
    for text in captions:
        if not settings.changes_tags:
            texts.add(text)
            continue
        head, free, tail = _parts(text, settings)
        if len(free) > 1 or (free and settings.tag_dropout):
            return None
        texts.add(_joint(settings.separator).join([*head, *free, *tail]))
    return frozenset(texts)


def may_lose(text: str, word: str, settings: Captions) -> bool:
    """Return whether `settings.tag_dropout` can leave out all tags of `text` that say `word`."""
    if not settings.tag_dropout or not word or not holds(text, word):
        return False
    head, _, tail = _parts(text, settings)
    return not holds(_joint(settings.separator).join([*head, *tail]), word)


def _occurrence(text: str, word: str) -> re.Match[str] | None:
    # Not \b: a trigger may begin or end with a sign, as <zorp> does.
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)


def _fitting(word: str) -> Callable[[re.Match[str]], str]:
    """Return what turns "a" and "an" into the one that fits before `word`, by its first letter."""

    def article(found: re.Match[str]) -> str:
        first, space = found.group(1), found.group(2)
        letter = next((sign for sign in word.lower() if sign.isalnum()), "")
        return first[0] + ("n" if letter and letter in "aeiou" else "") + space

    return article


def _expanded(raw: str, settings: Captions, trigger: str, class_noun: str) -> str:
    prefix, text, suffix = (
        fill(part, trigger, class_noun) for part in (settings.prefix, raw, settings.suffix)
    )
    text = text.strip()
    if settings.trigger == "insert" and not any(holds(p, trigger) for p in (prefix, text, suffix)):
        text = insert_trigger(text, trigger, class_noun, settings.separator)
    if prefix and text and not prefix[-1].isspace():
        prefix += " "
    if suffix and text and not (suffix[0].isspace() or suffix[0] in _CLOSING):
        suffix = " " + suffix
    whole = f"{prefix}{text}{suffix}".strip()
    if not whole:
        raise UserError(f'the caption "{raw}" is empty')
    return whole


def _parts(text: str, settings: Captions) -> tuple[list[str], list[str], list[str]]:
    """Split a caption into its tags: those fixed in front, the free ones, those fixed behind."""
    separator = settings.separator
    tags = [tag for tag in (part.strip() for part in text.split(separator)) if tag]
    before = _tags_of(settings.prefix, separator)
    # A prefix that does not end with the separator is part of the caption's first tag.
    grown = bool(settings.prefix.strip()) and not _ends(settings.prefix, separator)
    front = min(len(tags), before - grown + max(settings.keep_tokens, int(grown)))
    behind = min(len(tags) - front, _tags_of(settings.suffix, separator))
    cut = len(tags) - behind
    return tags[:front], tags[front:cut], tags[cut:]


def _tags_of(text: str, separator: str) -> int:
    return sum(1 for part in text.split(separator) if part.strip())


def _ends(text: str, separator: str) -> bool:
    return not text.split(separator)[-1].strip()


def _joint(separator: str) -> str:
    """Return what stands between tags that are joined: "," becomes ", "; " | " stays."""
    spaced = separator[-1].isspace()
    return separator if spaced else f"{separator} "


def _chance(seed: int, purpose: str, visit: int) -> float:
    return derive(seed, purpose, visit) / 2**63


def _order(count: int, seed: int, purpose: str, step: int) -> list[int]:
    """Return 0..count-1 in an order drawn from the arguments, the same in every Python."""
    return sorted(range(count), key=lambda at: derive(seed, f"{purpose} {at}", step))
