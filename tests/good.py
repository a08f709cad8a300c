"""A recipe that is right, for tests of what is wrong in others."""

from __future__ import annotations

_TEXT = """\
name: good
base:
  model: {model}
data:
  source: pictures
  trigger: zorp
  class: robot
adapter:
  kind: lora
train:
  learning_rate: 1e-4
"""


def recipe_for(model: str) -> str:
    """Return its text, of 11 lines; the pictures are in the folder of that name."""
    return _TEXT.format(model=model)
