"""Phrase books: the words a ranking may choose from, and how they make a caption."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tunekit.errors import UserError, did_you_mean

_SLOT = re.compile(r"\{([^{}]*)\}")
_KEYS = ("form", "subject", "itself")
_AN = re.compile(r"\ba(?= [aeiou])", re.IGNORECASE)


@dataclass(frozen=True)
class PhraseBook:
    """A caption's form, and for each slot of it what may stand there.

    form: such as "a {colour} {subject} {place}". slots: phrases by slot; "" says nothing there.
    subject: the slot that names it. itself: slots that say what makes the subject itself, left
    empty where the subject is called by its class noun.
    """

    form: str
    slots: Mapping[str, tuple[str, ...]]
    subject: str = ""
    itself: tuple[str, ...] = ()

    def caption(self, chosen: Mapping[str, str]) -> str:
        """Return the caption with a phrase for each slot; gaps that empty ones leave are closed."""
        text = _SLOT.sub(lambda slot: chosen[slot.group(1)], self.form)
        text = re.sub(r"\s+", " ", text)
        text = re.sub(r"\s+(?=[,.;])|,(?=\s*(,|$))", "", text).strip(" ,")
        return _AN.sub(lambda article: article.group() + "n", text)

    def calling(self, class_noun: str) -> PhraseBook:
        """Return the book that calls the subject `class_noun` and leaves out what it is like."""
        if not self.subject:
            raise UserError(
                "the phrases do not say which slot names the subject, so --class has no place: "
                "add a line such as `subject: subject`"
            )
        fixed = {self.subject: (class_noun,)} | dict.fromkeys(self.itself, ("",))
        return PhraseBook(self.form, {**self.slots, **fixed}, self.subject, self.itself)


def read(path: Path) -> PhraseBook:
    """Read a book from a YAML file: `form`, a list of phrases a slot, `subject`, `itself`.

    Raises UserError with everything that is wrong in it.
    """
    from tunekit.recipe_source import from_file

    source = from_file(path)
    faults = [str(fault) for fault in source.faults]
    tree = source.tree

    def fault(key: str, problem: str) -> None:
        faults.append(str(source.fault((key,), problem)))

    form = tree.get("form")
    if not isinstance(form, str):
        form = ""
        fault("form", 'must be text with slots, such as "a {subject} {place}"')
    named = tuple(_SLOT.findall(form))
    lists = {key: value for key, value in tree.items() if key not in _KEYS}
    for slot in named:
        if slot not in lists:
            fault(slot, f"is missing: the phrases for {{{slot}}}")
    for key, value in lists.items():
        if key not in named:
            fault(key, f"has no place {{{key}}} in the form{did_you_mean(key, [*named, *_KEYS])}")
        elif not _is_list(value):
            fault(key, "must be a list of phrases, each once")
    subject, itself = tree.get("subject", ""), tree.get("itself", [])
    if subject != "" and subject not in named:
        fault("subject", "must be the name of a slot")
    if not isinstance(itself, list) or any(slot not in named for slot in itself):
        fault("itself", "must be a list of names of slots")
    if faults:
        raise UserError("\n  ".join([f"{path}: cannot be used", *faults]))
    return PhraseBook(form, {s: tuple(map(str, lists[s])) for s in named}, subject, tuple(itself))


def _is_list(value: object) -> bool:
    if not isinstance(value, list) or not value:
        return False
    plain = all(isinstance(phrase, str | int | float) for phrase in value)
    return plain and len(set(map(str, value))) == len(value)


def toybox() -> PhraseBook:
    """Return the words of the toybox world, in the form its CLIP knows best."""
    from tunekit.toybox.world import FULL, PLACE_WORDS, STYLE_WORDS

    return PhraseBook(
        "a {colour} {subject} {place}, {style}",
        {
            "colour": FULL.colours,
            "subject": FULL.subjects,
            "place": tuple(PLACE_WORDS[place][0] for place in FULL.places),
            "style": tuple(STYLE_WORDS[style][0] for style in FULL.styles),
        },
        subject="subject",
        itself=("colour",),
    )


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().split(";"))


def _said(phrases: Iterable[str]) -> tuple[str, ...]:
    return ("", *phrases)


def general() -> PhraseBook:
    """Return lists for photographs and pictures of any kind, for a CLIP that read the web."""
    return PhraseBook(
        "{medium} of a {subject} {doing} {place}, {light}, {view}",
        {
            "medium": _MEDIUMS,
            "subject": _SUBJECTS,
            "doing": _said(_DOING),
            "place": _said(_PLACES),
            "light": _said(_LIGHT),
            "view": _said(_VIEWS),
        },
        subject="subject",
    )


_MEDIUMS = _lines(
    """a photo; a black and white photo; a blurry photo; a studio product photo; a portrait photo;
    a phone snapshot; a film photograph; a painting; an oil painting; a watercolour painting;
    a pencil drawing; an ink drawing; a crayon drawing; a comic book drawing; an anime drawing;
    a cartoon; a flat vector illustration; a children's book illustration; a pixel art picture;
    a 3D render; a low poly render; a clay figure; a paper cutout; a woodcut; a mosaic;
    an embroidery; a logo; a screenshot of a game; a poster; a collage"""
)
_SUBJECTS = _lines(
    """dog; puppy; cat; kitten; rabbit; hamster; horse; cow; sheep; pig; goat; bird; parrot; duck;
    chicken; owl; fish; turtle; lizard; snake; frog; spider; butterfly; bear; lion; tiger; elephant;
    monkey; fox; wolf; deer; dragon; dinosaur; unicorn; man; woman; boy; girl; baby; old man;
    old woman; couple; group of people; face; robot; monster; ghost; alien; doll; action figure;
    stuffed animal; teddy bear; plush toy; rubber duck; toy car; toy; figurine; statue; mask;
    cartoon character; character; car; truck; bus; motorcycle; bicycle; train; boat; ship; airplane;
    rocket; house; castle; tower; church; bridge; shop; street; garden; tree; flower; bouquet;
    potted plant; mushroom; mountain; landscape; city; room; cup; mug; bowl; plate; bottle; glass;
    can; teapot; kettle; vase; jar; pot; pan; knife; spoon; cake; bread; pizza; sandwich; fruit;
    apple; bag; backpack; handbag; suitcase; hat; cap; helmet; shoe; sneaker; boot; shirt; jacket;
    dress; pair of glasses; watch; ring; necklace; umbrella; chair; sofa; table; desk; bed;
    lamp; candle; clock; book; box; computer; laptop; phone; camera; guitar; piano; violin; drum;
    ball; balloon; tool; machine; weapon; sword; flag; sign; logo; pattern; abstract shape; meal"""
)
_DOING = _lines(
    """standing; sitting; lying down; sleeping; running; jumping; walking; flying; swimming; eating;
    playing; looking at the camera; looking away; smiling; held in a hand; worn by a person;
    on a table; on a shelf; on the floor; on a chair; on a bed; on a blanket; on a white plate;
    beside other things; beside a person; hanging"""
)
_PLACES = _lines(
    """on a plain white background; on a plain grey background; on a plain black background;
    on a coloured background; in a room; in a living room; in a kitchen; in a bedroom;
    in a bathroom; in an office; in a shop; in a museum; in a garden; in a park; in a forest;
    in a field; on grass; on a lawn; on a street; in a city; in a village; in front of a building;
    in front of a brick wall; on a wooden floor; on a stone pavement; on a carpet; on sand;
    on a beach; at the sea; in the water; at a lake; by a river; in the mountains; on rocks;
    in a desert; in the snow; in the rain; under the sky; in space; underwater; on a porch;
    on a windowsill; in a car; on a stage; in a crowd; among flowers; among leaves"""
)
_LIGHT = _lines(
    """in bright daylight; in warm sunlight; at sunset; at night; in dim light; in soft light;
    in hard light with deep shadows; in studio light; in neon light; backlit; on an overcast day"""
)
_VIEWS = _lines(
    """seen from the front; seen from the side; seen from behind; seen from above; seen from below;
    close up; from far away; cut off at the edge; full body; head and shoulders"""
)
