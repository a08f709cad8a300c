"""Lists of caption templates that a recipe names in `captions.template`.

Pictures without captions get another of them at each visit. What they say follows the
published methods, with {trigger} {class} where those put their placeholder.
"""

from __future__ import annotations

from collections.abc import Mapping

# DreamBooth (Ruiz et al., CVPR 2023, section 3.2) labels every picture "a [V] [class]"; the
# scripts that followed it say "a photo of". The prompts the paper evaluates with ("... in the
# jungle") are not here: trained on, they would be wrong about the pictures.
_DREAMBOOTH = (
    "a {trigger} {class}",
    "a photo of {trigger} {class}",
    "a photo of a {trigger} {class}",
)

# Textual Inversion (Gal et al., ICLR 2023, appendix) takes its neutral contexts from the prompts
# CLIP was evaluated with: these openings, before the new word.
_OBJECT_OPENINGS = (
    "a photo of a",
    "a photo of the",
    "the photo of a",
    "a photo of one",
    "a photo of my",
    "a good photo of a",
    "a good photo of the",
    "a bright photo of the",
    "a dark photo of the",
    "a cropped photo of a",
    "a cropped photo of the",
    "a close-up photo of a",
    "a close-up photo of the",
    "a rendering of a",
    "a rendition of a",
    "a rendition of the",
    "a photo of a clean",
    "a photo of the clean",
    "a photo of a dirty",
    "a photo of a nice",
    "a photo of the nice",
    "a photo of a cool",
    "a photo of the cool",
    "a photo of a small",
    "a photo of the small",
    "a photo of the large",
    "a photo of the weird",
)

# For styles the same work speaks of paintings "in the style of" the new word. Here the class noun
# follows it, as in "krafto style", so that the base knows from the first step what kind of thing
# the word is.
_STYLE_OPENINGS = (
    "a painting",
    "the painting",
    "a picture",
    "a rendering",
    "a rendition",
    "a good painting",
    "a nice painting",
    "a cool painting",
    "a weird painting",
    "a clean painting",
    "a dirty painting",
    "a bright painting",
    "a dark painting",
    "a small painting",
    "a large painting",
    "a cropped painting",
    "a close-up painting",
)

LISTS: Mapping[str, tuple[str, ...]] = {
    "dreambooth": _DREAMBOOTH,
    "textual-inversion-object": tuple(f"{o} {{trigger}} {{class}}" for o in _OBJECT_OPENINGS),
    "textual-inversion-style": tuple(f"{o} in {{trigger}} {{class}}" for o in _STYLE_OPENINGS),
}
"""Every list under the name a recipe gives it."""


def named(template: str | tuple[str, ...]) -> tuple[str, ...]:
    """Return the templates that `captions.template` stands for: a list's name, one, or several."""
    if isinstance(template, tuple):
        return template
    for name, templates in LISTS.items():
        if template == name:
            return templates
    return (template,)
