"""The contract of a captioner: options in, a line of words about each picture out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from tunekit.errors import UserError
from tunekit.modelfolder import PICKLES
from tunekit.safefile import check_header
from tunekit.section import Section

if TYPE_CHECKING:
    import torch
    from PIL import Image


@dataclass(frozen=True)
class Wishes:
    """What is asked of every caption; "" where nothing is.

    instruction: in the user's words, filled in. class_noun: what the subject is to be called, and
    that what makes it itself is to be left out: the new word shall stand for that.
    """

    instruction: str = ""
    class_noun: str = ""


@dataclass(frozen=True)
class Said:
    """What was said of a picture. text: the caption, "" for nothing. remark: what is odd with it,
    in words that fit several pictures, such as "cut off after 120 tokens"."""

    text: str
    remark: str = ""


class Captioner(ABC):
    """Looks at one picture at a time and says what is there.

    A subclass reads its own options and knows nothing of files of captions, nor of the trigger.
    """

    takes_instruction: ClassVar[bool] = False
    """Whether it can be told in words what to describe; others refuse an instruction."""

    class Options(Section):
        """What can be set as KEY=VALUE."""

    notes: tuple[str, ...] = ()
    """What the user should know of this captioner as it is set up, a line each."""

    @classmethod
    @abstractmethod
    def load(cls, options: Any, wishes: Wishes, device: torch.device) -> Captioner:
        """Return the captioner, ready. options: an `Options` of this class.

        Raises UserError where its model is missing, incomplete, unsafe, or cannot do what is asked.
        """

    @abstractmethod
    def describe(self, image: Image.Image) -> Said:
        """Return a caption for an RGB picture of any size.

        Always the same for the same pixels. White space and braces are the caller's business.
        """


def refuse_unsafe(model: str, what: str) -> None:
    """Raise UserError where `model` is a folder that could run code or is not whole.

    Its weights have to be .safetensors files and to begin as such. A Hub id is not looked at: what
    is loaded from there is asked for as safetensors alone.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"{what} {model}: is a file; name the model's folder or its Hub id")
        if model.startswith((".", "/", "~")) or model.count("/") != 1:
            raise UserError(f"{what} {model}: there is no such folder, and no Hub id looks like it")
        return
    weights = sorted(folder.glob("*.safetensors"))
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not weights and pickles:
        raise UserError(
            f"{what} {model}: {pickles[0]} is a pickle, which can run code when it is read; "
            "tunekit reads only .safetensors: save the model anew with save_pretrained where you "
            "trust it"
        )
    for path in weights:
        check_header(path)
