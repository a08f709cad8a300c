"""Pictures that are drawn again from what they say themselves, and those that must not be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from taught import recipe_for, teach

from tunekit import checkpoint, export
from tunekit.errors import UserError
from tunekit.generate import Generated, Request, generate
from tunekit.pictures import read_settings
from tunekit.recipe import Recipe, dump_yaml


@pytest.fixture(scope="module")
def recipe(tiny_folder: Callable[..., Path]) -> Recipe:
    evaluate: dict[str, Any] = {"steps": 2, "prompts": ["a {trigger} {class}"], "seeds": [3]}
    return recipe_for(tiny_folder(), evaluate=evaluate, adapter={"text_encoder": True})


@pytest.fixture(scope="module")
def project(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as people have it: a run in runs/, and the base beside."""
    folder = tmp_path_factory.mktemp("project")
    run = folder / "runs" / "zorp"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(dump_yaml(recipe))
    family, adapter = teach(recipe)
    checkpoint.save(run / "checkpoints/step-000002", {"adapter": adapter.state()}, {})
    export.export_adapter(family, adapter, recipe, run / "export")
    (folder / Path(recipe.base.model).name).symlink_to(recipe.base.model)
    return folder


@pytest.fixture(autouse=True)
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project)


RUN = Path("runs/zorp")


def draw(told: list[str] | None = None, **asked: Any) -> Generated:
    notes = told if told is not None else []
    return generate(Request(**asked), device="cpu", note=notes.append)


def pixels(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()


def resaved(path: Path, out: Path, **changed: Any) -> Path:
    """Save a picture with other settings inside."""
    settings = read_settings(path) | changed
    info = PngInfo()
    info.add_text("tunekit", json.dumps({k: v for k, v in settings.items() if v is not ...}))
    with Image.open(path) as picture:
        picture.save(out, pnginfo=info)
    return out


@pytest.fixture(scope="module")
def drawn(project: Path) -> Path:
    """Return a picture of the run, with settings of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        made = draw(
            run=RUN,
            prompts=["a {{red}} {trigger}"],
            seed=7,
            scheduler="euler_a",
            width=40,
            scale=0.8,
            text_scale=0.3,
            negative_prompt="blue",
        )
    return project / made.pictures[0]


class TestAgain:
    def test_it_is_the_same_picture(self, drawn: Path) -> None:
        told: list[str] = []
        made = draw(told, picture=drawn)
        assert pixels(made.pictures[0]) == pixels(drawn)
        assert read_settings(made.pictures[0]) == read_settings(drawn)
        assert made.folder == Path("generated") / f"{drawn.stem}-001"
        assert told == [f"{drawn}: drawn again, equal pixel for pixel"]

    def test_from_a_checkpoint_of_a_run(self) -> None:
        made = draw(run=RUN, checkpoint="step-000002", prompts=["a zorp"], steps=2)
        told: list[str] = []
        assert pixels(draw(told, picture=made.pictures[0]).pictures[0]) == pixels(made.pictures[0])
        assert "equal pixel for pixel" in told[0]

    def test_one_of_a_batch_is_drawn_with_the_others(self) -> None:
        made = draw(run=RUN, prompts=["a zorp"], count=5, batch=3)
        assert [read_settings(p).get("batch") for p in made.pictures] == [[1, 2, 3]] * 3 + [
            [4, 5]
        ] * 2
        again = draw(picture=made.pictures[1])
        assert len(again.pictures) == 1
        assert pixels(again.pictures[0]) == pixels(made.pictures[1])
        alone = draw(run=RUN, prompts=["a zorp"], seed=2).pictures[0]
        far = [abs(a - b) for a, b in zip(pixels(alone), pixels(made.pictures[1]), strict=True)]
        assert max(far) <= 1, "a batch is the same pictures, but for rounding"

    @pytest.mark.parametrize("form", ["webp", "jpeg"])
    def test_from_exif(self, form: str, drawn: Path) -> None:
        request = Request(picture=drawn)
        made = generate(request, device="cpu", form=form, note=lambda told: None).pictures[0]
        assert made.suffix == {"webp": ".webp", "jpeg": ".jpg"}[form]
        assert read_settings(made) == read_settings(drawn)
        told: list[str] = []
        again = draw(told, picture=made).pictures[0]
        assert pixels(again) == pixels(drawn)
        same = {"webp": "drawn again, equal pixel for pixel", "jpeg": "keeps pixels nearly"}[form]
        assert same in told[0]
        with pytest.raises(UserError, match=r'format: must be png, jpeg, webp, not "jpg"'):
            generate(request, device="cpu", form="jpg")

    def test_with_something_else_asked_for(self, drawn: Path) -> None:
        told: list[str] = []
        made = draw(told, picture=drawn, steps=3, count=2)
        first, second = map(read_settings, made.pictures)
        assert (first["steps"], first["seed"], second["seed"]) == (3, 7, 8)
        assert first | {"steps": 2} == read_settings(drawn)
        assert told == []

    def test_lines_of_a_file_go_over_all(self, drawn: Path, tmp_path: Path) -> None:
        (tmp_path / "p.txt").write_text("a cat --s 1 --d 9\na dog --w 32 --n red\n")
        made = draw(picture=drawn, prompt_file=tmp_path / "p.txt", steps=3)
        cat, dog = map(read_settings, made.pictures)
        assert (cat["prompt"], cat["steps"], cat["seed"]) == ("a cat", 1, 9)
        assert (cat["width"], cat["negative_prompt"]) == (40, "blue")
        assert (dog["steps"], dog["seed"], dog["width"]) == (3, 7, 32)
        assert (dog["negative_prompt"], dog["scheduler"]) == ("red", "euler_a")
        shared = read_settings(made.grid)
        assert shared["prompts"] == ["a cat", "a dog"]
        assert "steps" not in shared, "they differ"

    def test_nothing_in_it_is_a_place_on_this_machine(self, drawn: Path, project: Path) -> None:
        data = drawn.read_bytes()
        assert str(project).encode() not in data
        assert b"/" not in json.dumps(read_settings(drawn)).encode()

    def test_a_base_held_in_another_format_is_held_so_again(
        self, recipe: Recipe, tmp_path: Path
    ) -> None:
        half = recipe.model_copy(update={"base": recipe.base.model_copy(update={"dtype": "bf16"})})
        shutil.copytree(RUN, tmp_path / "half")
        (tmp_path / "half/recipe.yaml").write_text(dump_yaml(half))
        made = draw(run=tmp_path / "half", prompts=["a zorp"])
        assert read_settings(made.pictures[0])["base_settings"] == {"dtype": "bf16"}
        told: list[str] = []
        draw(told, picture=made.pictures[0])
        assert "equal pixel for pixel" in told[0]


class TestOthers:
    def test_another_file_of_the_same_name_is_refused(
        self, drawn: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        moved = tmp_path / drawn.name
        shutil.copy(drawn, moved)
        base = read_settings(drawn)["base"]
        (tmp_path / str(base)).symlink_to(Path.cwd() / str(base))
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r"zorp-diffusers\.safetensors, which is not in this"):
            draw(picture=moved)
        file = drawn.parents[2] / RUN / "export/zorp-diffusers.safetensors"
        other = tmp_path / file.name
        other.write_bytes(file.read_bytes()[:-1] + b"\x01")
        with pytest.raises(UserError, match="its sha256 is another one"):
            draw(picture=moved)
        told: list[str] = []
        draw(told, picture=moved, adapters=[other])
        assert told[0] == f"{moved}: was drawn with {file.name}, which is not drawn with here"
        assert told[1] == f"{moved}: was drawn without {file.name}"
        assert "not equal" in told[-1]
        told.clear()
        draw(told, picture=moved, adapters=[file])
        assert told == [f"{moved}: drawn again, equal pixel for pixel"], "as strong as it was"

    def test_another_base_is_refused_unless_it_is_named(
        self, drawn: Path, tiny_folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        other = tiny_folder(prediction_type="v_prediction")
        told: list[str] = []
        draw(told, picture=drawn, base=str(other))
        assert "had other weights or settings" in told[0]
        lost = resaved(drawn, tmp_path / "lost.png", base="nobody")
        with pytest.raises(
            UserError, match=r"its base, nobody, which is not in this folder.*--base"
        ):
            draw(picture=lost)
        (tmp_path / "nobody").symlink_to(other)
        with pytest.raises(UserError, match=r"had other weights.*name one with --base"):
            draw(picture=lost)

    def test_what_older_pictures_do_not_say_is_said(self, drawn: Path, tmp_path: Path) -> None:
        adapters = [{"name": "zorp-diffusers.safetensors", "weight": 1.0}]
        old = resaved(drawn, tmp_path / "old.png", base_sha256=..., adapters=adapters)
        told: list[str] = []
        draw(told, picture=old)
        assert "does not say the hash of its base" in told[0]
        assert "does not say the hash of its adapter" in told[1]
        assert "equal pixel for pixel" in told[2]


class TestRefused:
    @pytest.mark.parametrize(
        ("changed", "said"),
        [
            (
                {"sampler": 1},
                'says "sampler" of how it was drawn, which this version does not know',
            ),
            ({"stepz": 1}, r'did you mean "steps"'),
            ({"steps": "many"}, "its settings cannot be drawn: steps: "),
            ({"steps": 0}, "steps: 0 is not in 1 to 1000"),
            ({"scale": float("nan")}, "cannot be drawn: scale"),
            ({"seed": -1}, "cannot be drawn: seed"),
            ({"batch": [1, 2]}, "its batch has no seed 7"),
            ({"batch": [7] * 65}, "cannot be drawn: batch"),
            ({"base": "../secret"}, "base: .*is no file's name"),
            ({"base": "/etc"}, "base: .*is no file's name"),
            ({"base": "a/.."}, "base: .*is no file's name"),
            ({"adapters": [{"name": "../../x.safetensors"}]}, "adapters.0.name: "),
            ({"adapters": [{"name": "a\\b.safetensors"}]}, "adapters.0.name: "),
            ({"adapters": [{"name": "../step-000002"}]}, "adapters.0.name: "),
            ({"adapters": [{"name": "x", "path": "/etc"}]}, "adapters.0.path: "),
            ({"base_settings": {"trust_remote_code": True}}, '"trust_remote_code" of its base'),
            ({"base_settings": {"vae": "/etc/passwd"}}, "base_settings: .*is no file's name"),
            ({"base_settings": {"quantize": "nf5"}}, "quantize"),
            ({"prompt": "x" * 30_000}, "cannot be drawn: prompt"),
            ({"prompt": "x" * 200_000}, "its settings are 2.* characters; 100000 are read"),
            ({"prompts": [], "seeds": []}, "is a grid of several pictures"),
        ],
    )
    def test_what_nobody_drew(
        self, changed: dict[str, Any], said: str, drawn: Path, tmp_path: Path
    ) -> None:
        forged = resaved(drawn, tmp_path / "forged.png", **changed)
        with pytest.raises(UserError, match=said) as fault:
            draw(picture=forged)
        assert "\n" not in str(fault.value)

    def test_deep_and_broken_texts(self, drawn: Path, tmp_path: Path) -> None:
        for text in ("[" * 90_000, '{"seed": ' + "9" * 5000 + "}", "{", "[]", '"x"'):
            info = PngInfo()
            info.add_text("tunekit", text)
            with Image.open(drawn) as picture:
                picture.save(tmp_path / "odd.png", pnginfo=info)
            with pytest.raises(UserError, match="its settings are not"):
                draw(picture=tmp_path / "odd.png")

    def test_files_that_are_no_picture(self, tmp_path: Path) -> None:
        (tmp_path / "bomb.png").write_bytes(
            b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x7f\xff\xff\xff\x7f\xff\xff\xff\x08\x02\x00\x00\x00"
        )
        for name in ("bomb.png", "none.png"):
            with pytest.raises(UserError, match=name):
                draw(picture=tmp_path / name)
