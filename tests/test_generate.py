"""From a run or a file to a folder of pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from taught import recipe_for, teach

import tunekit
from tunekit import checkpoint, export
from tunekit.checkpoint import read_safetensors, write_safetensors
from tunekit.errors import UserError
from tunekit.generate import Request, adapter_of, generate, parse_adapter
from tunekit.inference import DrawSettings, load
from tunekit.pictures import read_settings
from tunekit.recipe import Recipe, dump_yaml
from tunekit.runfolder import RunFolder


@pytest.fixture(scope="module")
def recipe(tiny_folder: Callable[..., Path]) -> Recipe:
    evaluate: dict[str, Any] = {
        "steps": 2,
        "seeds": [3, 4],
        "prompts": ["a {trigger} {class}", "a red {trigger}"],
        "scheduler": "euler",
        "negative_prompt": "blue",
    }
    return recipe_for(tiny_folder(), evaluate=evaluate)


@pytest.fixture(scope="module")
def run(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as a finished run leaves it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(dump_yaml(recipe))
    family, adapter = teach(recipe)
    checkpoint.save(folder / "checkpoints/step-000002", {"adapter": adapter.state()}, {})
    export.export_adapter(family, adapter, recipe, folder / "export")
    return folder


class TestRun:
    def test_what_its_recipe_evaluates_is_drawn(
        self, run: Path, recipe: Recipe, tmp_path: Path
    ) -> None:
        told = []
        made = generate(Request(run=run), tmp_path / "out", device="cpu", progress=told.append)
        assert [path.name for path in made.pictures] == [
            "001-a-zorp-robot-seed3.png",
            "002-a-zorp-robot-seed4.png",
            "003-a-red-zorp-seed3.png",
            "004-a-red-zorp-seed4.png",
        ]
        assert [drawn.number for drawn in told] == [1, 2, 3, 4]
        settings = read_settings(made.pictures[2])
        assert settings["prompt"] == "a red zorp"
        assert (settings["scheduler"], settings["negative_prompt"]) == ("euler", "blue")
        painter = load(recipe.base, [run / "export/zorp-diffusers.safetensors"], "cpu")
        again = DrawSettings(steps=2, scheduler="euler", negative_prompt="blue")
        with Image.open(made.pictures[2]) as picture:
            assert picture.tobytes() == painter.draw("a red zorp", 3, again).tobytes()
        shared = read_settings(made.grid)
        assert shared["prompts"] == ["a zorp robot", "a red zorp"]
        assert shared["seeds"] == [3, 4]
        with Image.open(made.grid) as sheet:
            assert sheet.width == 8 + 2 * (160 + 8)

    def test_a_checkpoint_is_drawn_by_name(self, run: Path, recipe: Recipe, tmp_path: Path) -> None:
        asked = Request(
            run=run,
            checkpoint="step-000002",
            prompts=["a {trigger} {class}"],
            seed=8,
            count=2,
            steps=1,
            scale=0.5,
            width=40,
        )
        made = generate(asked, tmp_path, device="cpu")
        settings = [read_settings(path) for path in made.pictures]
        assert [s["seed"] for s in settings] == [8, 9]
        saved = run / "checkpoints/step-000002/adapter.safetensors"
        named = {"name": f"{run.name}/step-000002", "weight": 1.0}
        assert settings[0]["adapters"] == [{**named, "sha256": export.sha256(saved)}]
        assert settings[0]["scale"] == 0.5
        with Image.open(made.pictures[0]) as picture:
            assert picture.size == (40, 32)

    def test_a_misspelt_placeholder_is_no_word(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"unknown placeholder \"{clas}\".*class"):
            generate(Request(run=run, prompts=["a {clas}"]), tmp_path, device="cpu")

    def test_new_folders_are_numbered_in_the_working_directory(
        self, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        before = sorted(run.rglob("*"))
        for number in (1, 2):
            made = generate(Request(run=run, prompts=["x"], steps=1), device="cpu")
            assert made.folder == Path(f"generated/zorp-{number:03d}")
        assert sorted(run.rglob("*")) == before, "a run's folder belongs to the run"

    def test_pictures_are_never_replaced_unasked(self, run: Path, tmp_path: Path) -> None:
        asked = Request(run=run, prompts=["x"], steps=1)
        generate(asked, tmp_path, device="cpu")
        with pytest.raises(UserError, match=r"holds pictures already.*--overwrite"):
            generate(asked, tmp_path, device="cpu")
        generate(asked, tmp_path, device="cpu", overwrite=True)

    def test_its_pictures_may_be_gone(self, run: Path, tmp_path: Path, recipe: Recipe) -> None:
        """A run outlives the folder it was trained from."""
        moved = tmp_path / "run"
        shutil.copytree(run, moved)
        gone = recipe.model_copy(
            update={"data": recipe.data.model_copy(update={"source": "no/such/folder"})}
        )
        (moved / "recipe.yaml").write_text(dump_yaml(gone))
        assert RunFolder.open(moved).recipe == gone


class TestFile:
    def test_the_recipe_in_it_says_how(self, run: Path, recipe: Recipe, tmp_path: Path) -> None:
        file = run / "export/zorp-diffusers.safetensors"
        made = generate(
            Request(adapters=[file], base=recipe.base.model, count=1), tmp_path, device="cpu"
        )
        settings = [read_settings(path) for path in made.pictures]
        assert [s["prompt"] for s in settings] == ["a zorp robot", "a red zorp"]
        assert [s["seed"] for s in settings] == [1, 1]
        assert settings[0]["scheduler"] == "euler"

    def test_a_folder_as_base_is_not_in_the_file(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"base: neither .* --base toybox"):
            generate(Request(adapters=[run / "export/zorp-diffusers.safetensors"]), tmp_path)

    def test_without_a_recipe_a_prompt_is_needed(
        self, run: Path, recipe: Recipe, tmp_path: Path
    ) -> None:
        tensors, metadata = read_safetensors(run / "export/zorp-diffusers.safetensors")
        bare = tmp_path / "bare.safetensors"
        write_safetensors(bare, tensors)
        with pytest.raises(UserError, match="prompt: name at least one"):
            generate(Request(adapters=[bare], base=recipe.base.model), tmp_path / "out")
        tree = json.loads(metadata["tunekit.recipe"])
        tree["evaluate"]["from_the_future"] = 1
        write_safetensors(bare, tensors, {"tunekit.recipe": json.dumps(tree)})
        with (
            pytest.warns(UserWarning, match="from_the_future"),
            pytest.raises(UserError, match="base: neither"),
        ):
            generate(Request(adapters=[bare]), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_the_base_alone_draws_too(self, recipe: Recipe, tmp_path: Path) -> None:
        asked = Request(base=recipe.base.model, prompts=["a robot"], steps=1)
        assert read_settings(generate(asked, tmp_path, device="cpu").grid)["adapters"] == []

    def test_a_checkpoint_folder_knows_its_run(self, run: Path, tmp_path: Path) -> None:
        asked = Request(adapters=[run / "checkpoints/step-000002"], count=1, steps=1)
        made = generate(asked, tmp_path, device="cpu")
        assert read_settings(made.pictures[0])["prompt"] == "a zorp robot"


class TestRefused:
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"count": 0}, "count: 0"),
            ({"steps": 0}, "steps: 0"),
            ({"checkpoint": "step-000020"}, r'no checkpoint "step-000020" \(did you mean "step-'),
            ({"checkpoint": "../export"}, "has no checkpoint"),
            ({"guidance_scale": 1.0}, "negative_prompt: does nothing"),
            ({"seed": -1}, "seed: -1"),
        ],
    )
    def test_before_anything_is_written(
        self, change: dict[str, Any], said: str, run: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(UserError, match=said):
            generate(Request(**({"run": run} | change)), tmp_path / "out", device="cpu")
        assert not (tmp_path / "out").exists()

    def test_a_checkpoint_without_its_run(self) -> None:
        with pytest.raises(UserError, match="is looked for in a run"):
            generate(Request(base="toybox", checkpoint="step-000002"))

    def test_a_file_where_the_folder_should_be(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(UserError, match="is a file"):
            generate(Request(run=run), tmp_path / "file")

    def test_no_run(self, run: Path, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="no such run folder"):
            generate(Request(run=tmp_path / "none"))
        with pytest.raises(UserError, match=r"it has no recipe\.yaml"):
            generate(Request(run=tmp_path))

    def test_a_run_that_did_not_finish(self, run: Path, tmp_path: Path) -> None:
        (tmp_path / "recipe.yaml").write_text((run / "recipe.yaml").read_text())
        with pytest.raises(UserError, match="the run has not finished"):
            generate(Request(run=tmp_path))
        (tmp_path / "export").mkdir()
        (tmp_path / "export/zorp-diffusers.safetensors.rejected").write_text("")
        with pytest.raises(UserError, match="failed its verification"):
            generate(Request(run=tmp_path))
        (tmp_path / "recipe.yaml").write_text("name: 3\n")
        with pytest.raises(UserError, match=r"recipe\.yaml: name: "):
            generate(Request(run=tmp_path))


class TestFromPython:
    def test_a_run_draws_as_it_does_on_the_command_line(self, run: Path, tmp_path: Path) -> None:
        made = generate(Request(run=run), tmp_path / "out", device="cpu")
        painter = tunekit.load(str(run), device="cpu")
        assert painter.settings.steps == 2
        drawn = painter.draw("a red {trigger}", seed=3)
        again = next(painter.draw_many(["a red {trigger}"], [3]))
        assert again.prompt == "a red zorp"
        with Image.open(made.pictures[2]) as picture:
            assert picture.tobytes() == drawn.tobytes() == again.image.tobytes()

    def test_an_adapter_may_stand_alone(self, run: Path, recipe: Recipe) -> None:
        file = run / "export/zorp-diffusers.safetensors"
        expected = tunekit.load(run, device="cpu").draw("a zorp", 1)
        for adapters in (str(file), file, (file, 1.0), [str(file)]):
            painter = tunekit.load(recipe.base, adapters=adapters, device="cpu")
            assert painter.draw("a {trigger}", 1).tobytes() == expected.tobytes()
        alone = tunekit.load(adapters=run / "checkpoints/step-000002", device="cpu")
        assert alone.settings == painter.settings

    def test_what_is_missing_is_said(self, run: Path, recipe: Recipe) -> None:
        with pytest.raises(UserError, match=r"^nosuch\.safetensors: there is no such file$"):
            tunekit.load(recipe.base, adapters="nosuch.safetensors")
        with pytest.raises(UserError, match=r"^nosuch\.safetensors: there is no such file$"):
            generate(Request(adapters=["nosuch.safetensors"]))
        with pytest.raises(UserError, match="says which model"):
            tunekit.load(adapters=[run, run])


def test_an_adapter_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "a:b.safetensors"
    file.write_text("")
    assert parse_adapter(str(file)) == (file, 1.0)
    assert parse_adapter(f"{file}:0.5") == (file, 0.5)
    assert parse_adapter("x.safetensors:-1") == (Path("x.safetensors"), -1.0)
    assert parse_adapter("x.safetensors") == (Path("x.safetensors"), 1.0)
    with pytest.raises(UserError, match='"half" is no weight'):
        parse_adapter("x.safetensors:half")
    assert adapter_of(str(file)) == file
    assert adapter_of(f"{file}:0.5") == (file, 0.5)
    assert adapter_of(f"{file}:0.5:0.25") == (file, (0.5, 0.25))
    with pytest.raises(UserError, match='"much" is no weight'):
        adapter_of(f"{file}:much:0.25")
