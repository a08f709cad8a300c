"""What a careful colleague would say of checked pictures and their words, before they are trained.

Each function looks at one thing and returns findings; none opens a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from tunekit.data import buckets
from tunekit.data.captions import all_texts, holds, may_lose
from tunekit.data.measures import BLURRED, SAME_BITS, SAME_GREYS, Measures
from tunekit.data.records import Example, Finding
from tunekit.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from tunekit.schema_data import Data, Mask
    from tunekit.schema_source import Captions

MUCH_CUT = 1 / 3
ALL = 0.999  # of a mask that is white
SAME_BORDER = 8.0
"""Mean difference of border colours, of 255, up to which backgrounds are the same. Photographs of
one subject in different places differ by 20 to 130, on one plain ground by 0 to 2."""
FEWEST_FOR_BACKGROUND = 3
_ROWS = 16  # pictures compared with all others at once: bounds the memory

UNKNOWN_TRIGGER, UNKNOWN_CLASS = "{trigger}", "{class}"
"""Stand for words that were not given, as they stand in captions; no recipe can hold them."""


# Words


def words(examples: Sequence[Example], data: Data) -> list[Finding]:
    """Return where captions are from, which are missing or alike, and what they do not say."""
    return [*_origins(examples, data), *_identical(examples), *_unsaid(examples, data)]


def origin_kind(origin: str) -> str:
    """Return where a caption stands without its file or line: ".txt files", "metadata.jsonl"."""
    if origin == "template":
        return "the template"
    if origin.startswith("folder "):
        return "folder names"
    for suffix in (".txt", ".caption"):
        if origin.endswith(suffix):
            return f"{suffix} files"
    file, _, line = origin.rpartition(":")
    return file if line.isdigit() else origin


def _origins(examples: Sequence[Example], data: Data) -> Iterator[Finding]:
    templated = [example.name for example in examples if example.origin == "template"]
    template = data.captions.template
    if templated and len(templated) == len(examples):
        texts = list(dict.fromkeys(text for example in examples for text in example.captions))
        told = f'all "{texts[0]}"' if len(texts) == 1 else f"each of {len(texts)} in turn"
        name = "template" if len(texts) == 1 else "templates"
        yield Finding("note", "captions", f"captions: {told}, from the {name}")
    elif templated:
        named = f'the template "{template}"' if isinstance(template, str) else "the templates"
        yield Finding(
            "warning",
            "missing-caption",
            f"no caption of their own, so {named} captions them",
            tuple(templated),
            "write captions for them as well, or for none",
        )
    for kind, count in Counter(origin_kind(example.origin) for example in examples).items():
        if kind != "the template":
            yield Finding("note", "captions", f"captions: {count} from {kind}")


def _identical(examples: Sequence[Example]) -> Iterator[Finding]:
    own = [e for e in examples if origin_kind(e.origin) not in ("the template", "folder names")]
    shared: dict[tuple[str, ...], list[str]] = {}
    for example in own:
        shared.setdefault(example.captions, []).append(example.name)
    for captions, names in shared.items():
        if len(names) < 2:
            continue
        most = len(names) > 2 and len(names) * 2 > len(own)
        yield Finding(
            "warning" if most else "note",
            "identical-captions",
            f'{len(names)} pictures have the same caption "{captions[0]}"',
            tuple(names),
            "say what differs between them, or the word learns what they have in common"
            if most
            else "",
        )


def _unsaid(examples: Sequence[Example], data: Data) -> Iterator[Finding]:
    trigger, noun = data.trigger, data.class_noun
    without = [e.name for e in examples if not all(holds(text, trigger) for text in e.captions)]
    if without and trigger != UNKNOWN_TRIGGER:
        yield Finding(
            "warning",
            "no-trigger",
            f'the caption does not say "{trigger}", so it does not teach the trigger',
            tuple(without),
            "write it where the subject is named, or set data.captions.trigger: insert",
        )
    settings = data.captions
    lost = [e.name for e in examples if any(may_lose(t, trigger, settings) for t in e.captions)]
    if lost and trigger != UNKNOWN_TRIGGER:
        yield Finding(
            "warning",
            "dropped-trigger",
            f'data.captions.tag_dropout leaves out "{trigger}" at some visits, which then do not '
            "teach the trigger",
            tuple(lost),
            "write it in the first tag and set data.captions.keep_tokens: 1",
        )
    # Inside a longer word will do: "robots", "1girl".
    bare = [e.name for e in examples if any(noun.lower() not in t.lower() for t in e.captions)]
    if bare and noun != UNKNOWN_CLASS:
        yield Finding(
            "warning",
            "no-class",
            f'the caption does not say what it is, "{noun}"',
            tuple(bare),
            f'name it beside the trigger, as in "{trigger} {noun}": the base then starts from '
            "what it knows",
        )


def cut_captions(
    examples: Sequence[Example], cut_words: Callable[[str], str], settings: Captions
) -> list[Finding]:
    """Return a warning for captions longer than the text encoder reads, with the words it cuts.

    cut_words: a caption -> the end of it that is never read, "" where all is read. settings: what
    is done to captions at each visit, which may bring other words to the end.
    """
    ends = {text: cut_words(text) for example in examples for text in example.captions}
    fixed, changing = list[str](), list[str]()
    for example in examples:
        for text in example.captions:
            if ends[text] and all_texts((text,), settings) is None:
                changing.append(f'{example.name} (as it is written "{ends[text]}")')
            elif ends[text]:
                fixed.append(f'{example.name} ("{ends[text]}")')
    told = (
        ("the text encoder never reads the end of the caption", fixed),
        (
            "the caption is longer than the text encoder reads, and its tags are shuffled or left "
            "out: other words are cut at each visit",
            changing,
        ),
    )
    advice = "shorten it, what matters first"
    return [Finding("warning", "long-caption", t, tuple(n), advice) for t, n in told if n]


def seldom(examples: Sequence[Example], visits: Sequence[tuple[int, int]]) -> list[Finding]:
    """Return a warning for pictures that a run may end without having shown.

    visits: the least and the most each one gets.
    """
    names = [e.name for e, (least, _) in zip(examples, visits, strict=True) if least == 0]
    if not names:
        return []
    text, advice = "may never be shown: the run is too short for it", "raise train.steps"
    return [Finding("warning", "unseen", text, tuple(names), advice)]


# Sizes


def sizes(examples: Sequence[Example], data: Data, resolution: int, multiple: int) -> list[Finding]:
    """Return what cannot be used at a resolution, what is enlarged, and what is cut off."""
    too_small: list[Finding] = []
    enlarged, cut, much_cut, smaller = list[str](), list[str](), list[str](), list[str]()
    for e in examples:
        try:
            if fault := buckets.faults(e.width, e.height, resolution, data, multiple):
                too_small.append(Finding("error", "too-small", fault, (e.name,)))
                continue
            fit = buckets.plan(e.width, e.height, resolution, data, multiple)
        except UserError as error:  # the buckets themselves: the same for every picture
            return [Finding("error", "buckets", str(error))]
        size, lost = f"{e.width}x{e.height}", fit.cut(e.width, e.height)
        if fit.scale > 1:
            enlarged.append(f"{e.name} ({size}, {fit.scale:.2f}x)")
        if lost > 0:
            told = f"{e.name} ({size}, {lost:.0%})" if lost >= 0.01 else f"{e.name} (under 1%)"
            (much_cut if lost >= MUCH_CUT else cut).append(told)
        if data.buckets and fit.scale >= 1 and fit.width * fit.height < 0.75 * resolution**2:
            smaller.append(f"{e.name} ({size} in {fit.width}x{fit.height})")
    return [*too_small, *_size_notes(resolution, data, enlarged, cut, much_cut, smaller)]


def _size_notes(
    resolution: int,
    data: Data,
    enlarged: list[str],
    cut: list[str],
    much_cut: list[str],
    smaller: list[str],
) -> Iterator[Finding]:
    shape = "not of its bucket's shape" if data.buckets else "not square"
    if enlarged:
        text = f"smaller than {resolution} pixels and enlarged, which teaches blur"
        advice = "take larger pictures or lower data.resolution"
        yield Finding("warning", "enlarged", text, tuple(enlarged), advice)
    if much_cut:
        text = f"{shape}, and more than a third is cut off"
        how = "set data.crop: smart" if data.buckets else "set data.buckets to keep their shape"
        advice = f"{how}, or cut them yourself to what matters"
        yield Finding("warning", "much-cut", text, tuple(much_cut), advice)
    if cut:
        yield Finding("note", "cut", f"{shape}, so this much is cut off", tuple(cut))
    if smaller:
        text = f"too small for the resolution of {resolution}, so trained in a smaller bucket"
        yield Finding("note", "smaller-bucket", text, tuple(smaller))


# Looks


def blurred(
    examples: Sequence[Example], looks: Sequence[Measures], resolution: int
) -> list[Finding]:
    """Return a warning for pictures that are blurred at the size they will have."""
    found = []
    for example, look in zip(examples, looks, strict=True):
        detail = look.detail_at(resolution)
        if detail is not None and detail < BLURRED:
            found.append(f"{example.name} (detail {detail:.2f}; sharp ones have more than 1)")
    if not found:
        return []
    text = "looks blurred, which is learned too"
    advice = "take sharper pictures, if they are not meant so"
    return [Finding("warning", "blurred", text, tuple(found), advice)]


def blank(examples: Sequence[Example], looks: Sequence[Measures]) -> list[Finding]:
    """Return a warning for pictures of nothing but one colour."""
    names = [e.name for e, look in zip(examples, looks, strict=True) if look.blank]
    if not names:
        return []
    text, advice = "shows one colour and nothing else", "take it out, if that is not meant"
    return [Finding("warning", "blank", text, tuple(names), advice)]


def background(examples: Sequence[Example], looks: Sequence[Measures]) -> list[Finding]:
    """Return a warning where all pictures have one background, for pictures without masks."""
    import numpy as np

    if len({e.pixels for e in examples}) < FEWEST_FOR_BACKGROUND:
        return []
    borders = np.stack([np.frombuffer(look.border, np.uint8) for look in looks])
    middle = np.median(borders, axis=0)
    if any(np.abs(border - middle).mean() > SAME_BORDER for border in borders):
        return []
    text = f"all {len(examples)} pictures have the same background, which may become part of it"
    advice = "add pictures in other places, or mask the subject (data.mask)"
    return [Finding("warning", "same-background", text, (), advice)]


def masks(examples: Sequence[Example], looks: Sequence[Measures], settings: Mask) -> list[Finding]:
    """Return which pictures have no alpha channel, and which masks make no difference.

    Pictures without a mask file are told by their source, which knows where it looked.
    """
    pairs = list(zip(examples, looks, strict=True))
    without = [e.name for e, look in pairs if look.coverage is None]
    found = []
    if settings.source == "alpha" and without:
        if len(without) == len(examples):
            text = "data.mask takes the alpha channel, but no picture has one"
            advice = "save cut-out PNG files, or leave data.mask out"
            found.append(Finding("error", "no-mask", text, (), advice))
        else:
            text = "no alpha channel, so the whole picture is trained"
            found.append(Finding("warning", "no-mask", text, tuple(without)))
    full = [e.name for e, look in pairs if look.coverage is not None and look.coverage > ALL]
    if full:
        text = "the mask is white all over, so it makes no difference"
        advice = "make the background black"
        found.append(Finding("warning", "mask-full", text, tuple(full), advice))
    return found


def duplicates(examples: Sequence[Example], looks: Sequence[Measures]) -> list[Finding]:
    """Return a warning for each group of pictures that are the same, and almost the same."""
    by_pixels: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        by_pixels.setdefault(example.pixels, []).append(index)
    found = [
        Finding(
            "warning",
            "duplicate",
            f"the same picture {len(same)} times, seen that much oftener",
            tuple(examples[index].name for index in same),
            "keep one of them",
        )
        for same in by_pixels.values()
        if len(same) > 1
    ]
    first = [same[0] for same in by_pixels.values() if not looks[same[0]].blank]
    for group in _groups(first, list(_near([looks[index] for index in first]))):
        names = [examples[index].name + mirrored for index, mirrored in group]
        text, advice = "almost the same picture", "keep the best of them: variety teaches more"
        found.append(Finding("warning", "near-duplicate", text, tuple(names), advice))
    return found


def _near(looks: Sequence[Measures]) -> Iterator[tuple[int, int, bool]]:
    """Yield pairs of places in `looks` that are alike, the smaller first, and whether mirrored."""
    import numpy as np

    if len(looks) < 2:
        return
    hashes = np.array([look.hash for look in looks], dtype=np.uint64)
    mirror = np.array([look.mirrored for look in looks], dtype=np.uint64)
    greys = np.empty((len(looks), 16, 16), dtype=np.float32)
    for row, look in enumerate(looks):
        greys[row] = _unit(np.frombuffer(look.greys, np.uint8).astype(np.float32)).reshape(16, 16)
    rest = greys.reshape(len(looks), -1)
    for start in range(0, len(looks), _ROWS):
        rows = slice(start, start + _ROWS)
        for mirrored, own, block in (
            (False, hashes, greys[rows]),
            (True, mirror, greys[rows, :, ::-1]),
        ):
            bits = np.bitwise_count(own[rows, None] ^ hashes[None, start:])
            alike = bits <= SAME_BITS
            alike |= block.reshape(len(block), -1) @ rest[start:].T >= SAME_GREYS
            for row, column in zip(*np.nonzero(np.triu(alike, 1)), strict=True):
                yield start + int(row), start + int(column), mirrored


def _unit(greys: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return grey values with mean 0 and length 1, so that a product is a correlation."""
    import numpy as np

    greys = greys - greys.mean()
    unit: np.ndarray[Any, Any] = greys / max(float(np.linalg.norm(greys)), 1e-6)
    return unit


def _groups(
    places: Sequence[int], pairs: Iterable[tuple[int, int, bool]]
) -> list[list[tuple[int, str]]]:
    """Return pictures that hang together by pairs, each with " (mirrored)" where it is only so."""
    leader = list(range(len(places)))
    straight: set[int] = set()

    def lead(place: int) -> int:
        while leader[place] != place:
            leader[place] = leader[leader[place]]
            place = leader[place]
        return place

    for one, other, mirrored in pairs:
        low, high = sorted((lead(one), lead(other)))
        leader[high] = low
        if not mirrored:
            straight |= {one, other}
    groups: dict[int, list[int]] = {}
    for place in range(len(places)):
        groups.setdefault(lead(place), []).append(place)
    return [
        [(places[p], "" if p == head or p in straight else " (mirrored)") for p in group]
        for head, group in groups.items()
        if len(group) > 1
    ]
