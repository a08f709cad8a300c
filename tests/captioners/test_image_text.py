from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_readers
import torch
from PIL import Image

from tunekit import captioners
from tunekit.captioners import Wishes
from tunekit.errors import UserError

CPU = torch.device("cpu")
COLOURS = ("red", "blue", "white", "black")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("readers")
    return {kind: tiny_readers.save(kind, folder / kind) for kind in tiny_readers.READERS}


def load(folder: Path | str, wishes: Wishes | None = None, **options: Any) -> Any:
    kind = captioners.get("image_text")
    chosen = kind.Options(**{"model": str(folder), "max_tokens": 12, **options})
    return kind.load(chosen, wishes or Wishes(), CPU)


def picture(colour: str = "red") -> Image.Image:
    return Image.new("RGB", (80, 60), colour)


@pytest.mark.parametrize("kind", list(tiny_readers.READERS))
def test_each_kind_of_model_sees_the_picture_and_always_says_the_same(
    saved: dict[str, Path], kind: str
) -> None:
    reader = load(saved[kind])
    told = [reader.describe(picture(colour)).text for colour in COLOURS]
    assert all(told)
    assert len(set(told)) > 1
    assert [load(saved[kind]).describe(picture(colour)).text for colour in COLOURS] == told


@pytest.mark.parametrize("kind", ["qwen", "llava"])
def test_a_chat_model_is_asked_and_its_answer_has_nothing_of_the_question(
    saved: dict[str, Path], kind: str
) -> None:
    reader = load(saved[kind], Wishes(instruction="name the light"))
    assert "name the light" in reader.text
    assert "name the light" not in reader.describe(picture()).text
    assert "caption of an archive" not in load(saved[kind]).describe(picture()).text


@pytest.mark.parametrize("kind", ["qwen", "llava"])
def test_a_chat_model_is_asked_to_leave_out_what_makes_the_subject_itself(
    saved: dict[str, Path], kind: str
) -> None:
    reader = load(saved[kind], Wishes(class_noun="robot"))
    assert '"the robot" and say nothing of what makes it itself' in reader.text
    assert not reader.notes


def test_an_instruction_is_the_beginning_of_a_caption_where_a_model_only_continues(
    saved: dict[str, Path],
) -> None:
    reader = load(saved["blip"], Wishes(instruction="a photo of the"))
    assert reader.describe(picture()).text.startswith("a photo of the")


@pytest.mark.parametrize("kind", ["blip", "florence"])
def test_what_a_model_cannot_be_asked_is_told(saved: dict[str, Path], kind: str) -> None:
    reader = load(saved[kind], Wishes(class_noun="robot"))
    assert "cannot be asked to leave out" in reader.notes[0]


def test_florence_is_given_its_tasks_and_no_other_words(saved: dict[str, Path]) -> None:
    assert load(saved["florence"]).text == "<DETAILED_CAPTION>"
    assert load(saved["florence"], task="caption").text == "<CAPTION>"
    with pytest.raises(UserError, match="knows tasks and no other words"):
        load(saved["florence"], Wishes(instruction="name the light"))
    with pytest.raises(UserError, match="has no tasks"):
        load(saved["blip"], task="caption")


def test_a_model_without_chat_template_needs_its_prompt(tmp_path: Path) -> None:
    folder = tiny_readers.llava(tmp_path / "llava", chat=False)
    with pytest.raises(UserError, match=r"brings no chat template.*prompt=USER: <image>"):
        load(folder)
    asked = Wishes(instruction="name the light")
    reader = load(folder, asked, prompt="USER: <image> {instruction} ASSISTANT:")
    assert reader.text == "USER: <image> name the light ASSISTANT:"
    assert reader.describe(picture()).text
    with pytest.raises(UserError, match="has no place in prompt"):
        load(folder, asked, prompt="USER: <image> say it ASSISTANT:")


@pytest.mark.parametrize("kind", ["florence", "llava"])
def test_a_caption_that_found_no_end_is_told(saved: dict[str, Path], kind: str) -> None:
    said = load(saved[kind], max_tokens=3).describe(picture())
    assert said.remark == "cut off after 3 tokens"


def test_pickles_are_refused_and_none_is_opened(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for path in saved["blip"].iterdir():
        if path.suffix != ".safetensors":
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04not even a whole pickle")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is a pickle"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(UserError, match="is a pickle, whatever its name says"):
        load(folder)


def test_code_that_a_model_carries_is_not_run(saved: dict[str, Path], tmp_path: Path) -> None:
    folder, canary = tmp_path / "code", tmp_path / "canary"
    folder.mkdir()
    for path in saved["blip"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(canary)!r}, 'w')")
    with pytest.raises(UserError, match="cannot be loaded"):
        load(folder)
    assert not canary.exists()


def test_a_model_that_lacks_weights_is_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "half"
    folder.mkdir()
    for path in saved["qwen"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 of its weights"):
        load(folder)


@pytest.mark.parametrize("model", ["./nowhere", "nowhere"])
def test_a_model_that_is_not_there_is_told_in_a_line(model: str) -> None:
    with pytest.raises(UserError, match="there is no such folder"):
        load(model)


def test_knowing_the_captioners_loads_no_torch() -> None:
    code = (
        "import sys; from tunekit import captioners;"
        "[captioners.get(name).Options for name in captioners.names()];"
        "assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
