"""What `tunekit caption` writes, keeps, refuses and goes on with."""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from told import Typed

from tunekit.captioners import ranking
from tunekit.captioners.base import Said
from tunekit.captioning import Captioned, caption
from tunekit.data.records import DataError
from tunekit.errors import UserError
from tunekit.schema_source import Pictures
from tunekit.toybox import world

NAMES = ("a.png", "b c.png", "sub/ü.png")
Ask = Callable[..., Captioned]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder of three pictures of the toybox world."""
    rng = np.random.default_rng(5)
    for name in NAMES:
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        world.render(world.sample_scene(rng, pairs=0.0)).save(path)
    return tmp_path / "pictures"


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Return `caption` with the ranking captioner; ask.seen counts the pictures looked at."""
    seen: list[str] = []
    real = ranking.Ranking.describe

    def counted(self: Any, image: Any) -> Said:
        said = real(self, image)
        seen.append(said.text)
        return said

    monkeypatch.setattr(ranking.Ranking, "describe", counted)

    def asked(source: Path, **wanted: Any) -> Captioned:
        return caption(source, "ranking", **wanted)

    asked.seen = seen  # type: ignore[attr-defined]
    return asked


def rows(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {line["file_name"]: line for line in lines}


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def captions_of(folder: Path) -> dict[str, tuple[str, ...]]:
    """Return the captions as training reads them."""
    from tunekit.data.source import read

    found = read([Pictures(path=str(folder))])
    assert not found.faults
    return {record.name: record.captions for record in found.records}


def test_every_picture_gets_a_caption_that_training_reads(folder: Path, ask: Ask) -> None:
    made = ask(folder)
    assert made.out == folder / "metadata.jsonl"
    assert captions_of(folder) == {name: (text,) for name, text in made.captions.items()}
    assert tuple(made.captions) == NAMES
    assert not made.kept
    assert sorted(files(folder)) == sorted([*NAMES, "metadata.jsonl"])
    assert made.lines() == [f"{name}: {text}" for name, text in made.captions.items()]
    assert made.told() == [f"{made.out}: 3 pictures captioned; read them before you train"]
    assert json.loads(json.dumps(made.as_dict()))["captions"] == made.captions


def test_captions_that_are_there_stay_unless_told_and_are_named(folder: Path, ask: Ask) -> None:
    own = {"file_name": "a.png", "text": "my own", "weight": 2.0}
    (folder / "metadata.jsonl").write_text(json.dumps(own) + "\n")
    made = ask(folder)
    assert made.kept == ("a.png",)
    assert "a.png); --overwrite" in "\n".join(made.told())
    assert rows(folder / "metadata.jsonl")["a.png"] == own
    assert len(captions_of(folder)) == 3
    before = files(folder)
    assert ask(folder).captions == {}
    assert files(folder) == before
    made = ask(folder, overwrite=True)
    assert set(made.captions) == set(NAMES)
    written = rows(folder / "metadata.jsonl")["a.png"]
    assert written == {**own, "text": made.captions["a.png"]}


def test_captions_in_text_files_get_text_files_beside_them(folder: Path, ask: Ask) -> None:
    (folder / "a.txt").write_text("my own")
    made = ask(folder)
    assert made.kept == ("a.png",)
    assert made.out == folder
    assert (folder / "a.txt").read_text() == "my own"
    assert captions_of(folder)["sub/ü.png"] == (made.captions["sub/ü.png"],)
    assert not list(folder.glob(".*"))
    with pytest.raises(UserError, match=r"has captions in \.txt files"):
        ask(folder, out=folder / "metadata.jsonl")
    ask(folder, overwrite=True)
    assert (folder / "a.txt").read_text() != "my own"


def test_a_file_elsewhere_is_for_review_and_leaves_the_folder_as_it_is(
    folder: Path, ask: Ask, tmp_path: Path
) -> None:
    (folder / "a.txt").write_text("my own")
    before = files(folder)
    review = tmp_path / "new" / "review.jsonl"
    made = ask(folder, out=review)
    assert files(folder) == before
    assert rows(review) == {
        name: {"file_name": name, "text": text} for name, text in made.captions.items()
    }
    assert set(made.captions) == set(NAMES)
    assert ask(folder, out=review).kept == NAMES
    with pytest.raises(UserError, match=r"captions are written as \.jsonl"):
        ask(folder, out=tmp_path / "review.csv")


def test_the_trigger_is_put_before_the_class_noun_or_kept_out(folder: Path, ask: Ask) -> None:
    made = ask(folder, trigger="zorp", class_noun="robot")
    assert all(text.startswith("a zorp robot ") for text in made.captions.values())
    made = ask(folder, class_noun="robot", overwrite=True)
    assert all(text.startswith("a robot ") for text in made.captions.values())
    with pytest.raises(UserError, match="say it with --class"):
        ask(folder, trigger="zorp", overwrite=True)


def test_a_run_that_ended_early_goes_on_where_it_stopped(
    folder: Path, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ask(folder).captions
    (folder / "metadata.jsonl").unlink()
    ask.seen.clear()
    counted = ranking.Ranking.describe

    def third_fails(self: Any, image: Any) -> Said:
        if len(ask.seen) == 2:
            raise KeyboardInterrupt
        return counted(self, image)

    monkeypatch.setattr(ranking.Ranking, "describe", third_fails)
    with pytest.raises(KeyboardInterrupt):
        ask(folder)
    assert not (folder / "metadata.jsonl").exists()
    part = folder / ".metadata.jsonl.part"
    with part.open("a") as file:
        file.write('{"name": "sub')  # as a kill in mid-write leaves it
    monkeypatch.setattr(ranking.Ranking, "describe", counted)
    ask.seen.clear()
    assert ask(folder).captions == whole
    assert ask.seen == [whole["sub/ü.png"]]
    assert not part.exists()


def test_captions_of_other_settings_are_not_mixed(
    folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([Said("a robot")])
    with monkeypatch.context() as patched:
        patched.setattr(ranking.Ranking, "describe", lambda self, image: next(told))
        with pytest.raises(StopIteration):
            ask(folder)
    assert (folder / ".metadata.jsonl.part").exists()
    with pytest.raises(UserError, match="class_noun was '', is 'robot'"):
        ask(folder, class_noun="robot")
    assert ask(folder).captions


def test_a_captioner_that_cannot_be_loaded_leaves_nothing_behind(folder: Path, ask: Ask) -> None:
    before = files(folder)
    with pytest.raises(UserError, match=r"CLIP|clip"):
        ask(folder, options=["clip=./nowhere"])
    assert files(folder) == before
    assert ask(folder).captions


def test_two_runs_at_once_do_not_mix(folder: Path, ask: Ask) -> None:
    from tunekit.captioners._ledger import Ledger

    ledger = Ledger(folder / ".metadata.jsonl.part", {})
    with ledger, pytest.raises(UserError, match="another run is writing these captions"):
        ask(folder)
    assert ask(folder).captions


def test_a_picture_that_changed_meanwhile_is_captioned_again(
    folder: Path, ask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunekit.captioners._place import Place

    def interrupt(self: Any, captions: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Place, "write", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ask(folder)
    world.render(world.sample_scene(np.random.default_rng(9))).save(folder / "a.png")
    ask.seen.clear()
    ask(folder)
    assert len(ask.seen) == 1


def test_all_unreadable_pictures_are_listed_and_nothing_is_written(folder: Path, ask: Ask) -> None:
    (folder / "bad.png").write_bytes(b"<html>")
    data = (folder / "a.png").read_bytes()
    (folder / "cut.png").write_bytes(data[: len(data) // 2])
    before = files(folder)
    with pytest.raises(DataError) as caught:
        ask(folder)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["bad.png", "cut.png"]
    assert files(folder) == before


def test_faults_of_the_folder_are_told_and_nothing_is_written(folder: Path, ask: Ask) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "gone.png", "text": "x"}\nno json\n')
    before = files(folder)
    with pytest.raises(DataError) as caught:
        ask(folder)
    assert {fault.split(":")[1] for fault in caught.value.faults} == {"1", "2"}
    assert files(folder) == before
    with pytest.raises(UserError, match="no such folder"):
        ask(folder / "nowhere")


@pytest.mark.parametrize("text", [{"text": " "}, {"text": None}, {"text": [], "text_2": ""}, {}])
def test_a_line_without_a_caption_gets_one_and_keeps_the_rest(
    folder: Path, ask: Ask, text: dict[str, Any]
) -> None:
    lines = [{"file_name": "b c.png", "text": "my own"}, {"file_name": "a.png", "weight": 2} | text]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = ask(folder)
    assert set(made.captions) == {"a.png", "sub/ü.png"}
    assert made.kept == ("b c.png",)
    assert captions_of(folder)["a.png"] == (made.captions["a.png"],)
    assert rows(folder / "metadata.jsonl")["a.png"]["weight"] == 2


def test_an_empty_text_file_is_filled(folder: Path, ask: Ask) -> None:
    (folder / "a.txt").write_text("\n")
    made = ask(folder)
    assert (folder / "a.txt").read_text() == made.captions["a.png"] + "\n"
    assert set(captions_of(folder)) == set(NAMES)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"file_name": "a.png", "prompt": "my own"}, '"prompt" should be called that'),
        ({"file_name": "a.png", "text": ["my own", ""]}, "the caption is empty"),
        ({"file_name": "a.png", "text": 3}, '"text" is 3 and not text'),
    ],
)
def test_a_line_with_a_wrong_caption_is_still_a_fault(
    folder: Path, ask: Ask, line: dict[str, Any], says: str
) -> None:
    (folder / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    before = files(folder)
    with pytest.raises(DataError) as caught:
        ask(folder)
    assert says in str(caught.value)
    assert files(folder) == before


def test_captions_go_to_stdout_and_remarks_to_stderr(folder: Path, typed: Typed) -> None:
    (folder / "a.txt").write_text("my own")
    shown = typed("caption", folder)
    assert [line.split(":")[0] for line in shown.out.splitlines()] == ["b c.png", "sub/ü.png"]
    assert "2 pictures captioned; read them before you train" in shown.err
    assert "1 picture had captions, which stay (a.png)" in shown.err


def test_what_can_only_be_a_path_is_not_asked_for_on_the_hub(
    folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder.parent)
    with pytest.raises(UserError, match=r"pictures/gone: there is no such folder of pictures$"):
        ask(f"{folder.name}/gone")
    with pytest.raises(UserError, match=r"p\\xff: the name is not UTF-8"):
        ask("p\udcff")


def test_pictures_of_a_table_cannot_be_cleared_while_they_are_captioned(
    folder: Path, ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunekit.data.cache import Cache

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(folder / "a.png", "a.png")
    monkeypatch.setenv("TUNEKIT_CACHE", str(tmp_path / "cache"))
    real, refused = ranking.Ranking.describe, []

    def prune_too(self: Any, image: Any) -> Said:
        with pytest.raises(UserError, match="in use"):
            Cache().prune(max_bytes=0)
        refused.append(True)
        return real(self, image)

    monkeypatch.setattr(ranking.Ranking, "describe", prune_too)
    made = ask(tmp_path / "a.tar", out=tmp_path / "laid" / "metadata.jsonl")
    assert len(made.captions) == len(refused) == 1
    Cache().prune(max_bytes=0)


def test_a_table_of_captions_is_not_written_over(folder: Path, ask: Ask) -> None:
    (folder / "metadata.csv").write_text('file_name,text\na.png,x\n"b c.png",y\nsub/ü.png,z\n')
    with pytest.raises(UserError, match=r"only \.jsonl is written"):
        ask(folder)


def test_masks_and_names_of_folders_are_no_captions(folder: Path, ask: Ask, tmp_path: Path) -> None:
    concept = tmp_path / "concepts"
    shutil.copytree(folder / "sub", concept / "3_zorp robot")
    shutil.copy(folder / "a.png", concept / "3_zorp robot" / "ü.mask.png")
    made = ask(concept)
    assert list(made.captions) == ["3_zorp robot/ü.png"]


def test_braces_in_a_caption_are_words_and_no_placeholders(
    folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunekit.data.captions import fill

    monkeypatch.setattr(
        ranking.Ranking, "describe", lambda self, image: Said("a {robot}\n in  two lines")
    )
    ask(folder)
    for (text,) in captions_of(folder).values():
        assert fill(text, "zorp", "robot") == "a {robot} in two lines"


def test_silence_and_remarks_are_told(
    folder: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter([Said(""), Said("a robot", "cut off"), Said("a ghost")])
    monkeypatch.setattr(ranking.Ranking, "describe", lambda self, image: next(told))
    made = ask(folder)
    assert made.silent == ("a.png",)
    assert made.remarks == {"cut off": ("b c.png",)}
    lines = "\n".join(made.told())
    assert "nothing was said" in lines
    assert "1 picture with captions cut off: b c.png" in lines
    # What was not said can be asked for again.
    monkeypatch.setattr(ranking.Ranking, "describe", lambda self, image: Said("a cat"))
    assert ask(folder).captions == {"a.png": "a cat"}


def test_options_are_checked_before_a_picture_is_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        caption(tmp_path / "nowhere", "ranking", ["clp=x", "shortlist=0"])
    assert 'did you mean "clip"?' in str(caught.value)
    assert "shortlist: must be at least 1" in str(caught.value)
    with pytest.raises(UserError, match=r'did you mean "ranking"\?'):
        caption(tmp_path, "rankin")
    with pytest.raises(UserError, match="image_text may"):
        caption(tmp_path, "ranking", instruction="name the light")
    with pytest.raises(UserError, match="model: is missing"):
        caption(tmp_path, "image_text")


def test_pictures_of_a_table_are_laid_beside_their_captions(
    folder: Path, ask: Ask, tmp_path: Path
) -> None:
    datasets = pytest.importorskip("datasets")
    images = [{"path": None, "bytes": (folder / name).read_bytes()} for name in NAMES]
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    table = datasets.Dataset.from_dict(
        {"image": images, "text": ["my own", None, None]}, features=features
    )
    table.to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"is no folder.*metadata\.jsonl"):
        ask(tmp_path / "a.parquet")
    out = tmp_path / "laid" / "metadata.jsonl"
    made = ask(tmp_path / "a.parquet", out=out)
    assert len(made.captions) == 2
    read = captions_of(out.parent)
    assert len(read) == 3
    assert ("my own",) in read.values()
    assert {text for (text,) in read.values()} == {"my own", *made.captions.values()}
