"""Prompt files: what a line may say, and what is refused with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunekit.errors import UserError
from tunekit.promptfile import parse, read


def written(folder: Path, text: str) -> Path:
    path = folder / "prompts.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_in_sd_scripts_form(tmp_path: Path) -> None:
    """As its documentation shows them: comments, empty lines, a dash and quotes inside a prompt."""
    path = written(
        tmp_path,
        "# what is drawn every night\n"
        "\n"
        "masterpiece, best quality, (1girl), in white shirts --n low quality, bad anatomy, bad --w "
        "768 --h 512 --d 1 --l 7.5 --s 28\r\n"
        'a well-known robot, "zörp" \t--d 0\n'
        "   \n"
        "plain\n",
    )
    first, second, third = read(path)
    assert first.prompt == "masterpiece, best quality, (1girl), in white shirts"
    assert first.said == {
        "negative_prompt": "low quality, bad anatomy, bad",
        "width": 768,
        "height": 512,
        "seed": 1,
        "guidance_scale": 7.5,
        "steps": 28,
    }
    assert (second.prompt, second.said) == ('a well-known robot, "zörp"', {"seed": 0})
    assert (third.prompt, third.said, third.where) == ("plain", {}, f"{path}:6")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("a robot --width 64", r'--width is no setting of a prompt \(did you mean "--w"\?\)'),
        ("a robot --cfg 3", r'did you mean "--l"'),
        ("a robot --x 3", "--x is no setting of a prompt; there is: --w, --h, --s, --l, --d, --n"),
        ("a robot --w=64", "--w=64 is no setting of a prompt"),
        ("a robot --w 64 --w 32", "--w stands there twice"),
        ("a robot --w", "--w has no value; it is a whole number of pixels"),
        ("a robot --s --d 3", "--s has no value"),
        ("a robot --s 2.5", '--s is a whole number, not "2.5"'),
        ("a robot --l much", '--l is a number, not "much"'),
        ("--w 64", "has no prompt before its first --"),
    ],
)
def test_what_a_line_cannot_say(line: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as fault:
        parse(line, "p.txt:7")
    assert str(fault.value).startswith("p.txt:7: ")
    assert "\n" not in str(fault.value)


def test_all_faults_come_at_once_with_their_lines(tmp_path: Path) -> None:
    path = written(tmp_path, "a --x 1\nb\nc --s one\n")
    with pytest.raises(UserError) as fault:
        read(path)
    first, second = str(fault.value).splitlines()
    assert first.startswith(f"{path}:1: --x")
    assert second.startswith(f"{path}:3: --s")


def test_files_that_are_no_list_of_prompts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"prompts\.txt: holds no prompt"):
        read(written(tmp_path, "# nothing\n\n"))
    with pytest.raises(UserError, match=r"none\.txt: cannot be read: No such file"):
        read(tmp_path / "none.txt")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read(tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"a z\xf6rp\n")
    with pytest.raises(UserError, match=r"is not UTF-8 text \(byte 3\): save it as UTF-8"):
        read(tmp_path / "latin.txt")
    with pytest.raises(UserError, match="is larger than 1 MB"):
        read(written(tmp_path, "a robot\n" * 200_000))
    with pytest.raises(UserError, match="holds 10001 prompts"):
        read(written(tmp_path, "a\n" * 10_001))
