"""Runs that teach new words, alone and beside an adapter: their files, drawings, and going on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file as read_tensors
from safetensors.torch import save_file
from told import Told

import tunekit
from tunekit import families
from tunekit.errors import UserError
from tunekit.export import ExportError, needed
from tunekit.inference import DrawSettings, load
from tunekit.info import describe
from tunekit.progress import Silent
from tunekit.recipe import Recipe, recipe_from

Tree = dict[str, Any]
QUICK = DrawSettings(steps=2, guidance_scale=3.0)


@pytest.fixture(scope="module")
def recipes(tree: Callable[..., Tree]) -> Callable[[bool], Recipe]:
    def make(pivotal: bool) -> Recipe:
        whole: Any = tree(data={"trigger": "<zorp>", "captions": {"trigger": "insert"}})
        whole["adapter"] = {"kind": "lora", "rank": 2} if pivotal else None
        whole["tokens"] = [{"name": "<zorp>", "vectors": 3, "init": "robot"}]
        return recipe_from(whole)

    return make


@pytest.fixture(scope="module")
def alone(recipes: Any, tmp_path_factory: pytest.TempPathFactory) -> tunekit.Run:
    out = tmp_path_factory.mktemp("words") / "run"
    return tunekit.train(recipes(False), out=out, reporter=Silent())


@pytest.fixture(scope="module")
def pivotal(recipes: Any, tmp_path_factory: pytest.TempPathFactory) -> tunekit.Run:
    out = tmp_path_factory.mktemp("pivotal") / "run"
    return tunekit.train(recipes(True), out=out, reporter=Silent())


class TestRuns:
    def test_a_word_comes_out_as_diffusers_reads_it(self, alone: tunekit.Run) -> None:
        (file,) = alone.files
        assert file.path.name == "tiny-zorp.safetensors"
        ((name, rows),) = read_tensors(file.path).items()
        assert name == "<zorp>"
        assert rows.shape == (3, 32)
        assert file.parity.change > 0
        base = families.load(alone.recipe.base)
        pipe: Any = StableDiffusionPipeline.from_pretrained(
            alone.recipe.base.model, safety_checker=None
        )
        pipe.load_textual_inversion(str(file.path))
        pipe.set_progress_bar_config(disable=True)
        prompt = "a <zorp> robot, red"
        drawn = pipe(
            prompt, num_inference_steps=2, guidance_scale=5.0, height=32, width=32,
            generator=torch.Generator().manual_seed(1),
        ).images[0]  # fmt: skip
        ours = load(alone.recipe.base, needed(alone.files)).draw(
            prompt, 1, DrawSettings(steps=2, guidance_scale=5.0)
        )
        assert drawn.tobytes() == ours.tobytes()
        assert base.label

    @pytest.mark.parametrize("which", ["alone", "pivotal"])
    def test_everything_that_draws_draws_the_same(
        self, which: str, request: pytest.FixtureRequest
    ) -> None:
        run: tunekit.Run = request.getfixturevalue(which)
        settings = DrawSettings(steps=2, guidance_scale=5.0)
        prompt = "a <zorp> robot, red"
        step = run.folder / "checkpoints" / "step-000004"
        (sample,) = (run.folder / "samples").glob("step-000004_*_seed-1.png")
        from PIL import Image

        trained = load(run.recipe.base, step).draw(prompt, 1, settings)
        assert Image.open(sample).convert("RGB").tobytes() == trained.tobytes()
        drawn = load(run.recipe.base, run.folder).draw(prompt, 1, settings)
        same = load(run.recipe.base, needed(run.files)).draw(prompt, 1, settings)
        assert drawn.tobytes() == same.tobytes()
        painter = tunekit.load(run.folder)
        assert painter.draw("a {trigger} {class}, red", 1, settings).tobytes() == drawn.tobytes()

    def test_pivotal_leaves_separate_files_and_a_bundle(self, pivotal: tunekit.Run) -> None:
        assert [file.path.name for file in pivotal.files] == [
            "tiny-diffusers.safetensors",
            "tiny-kohya.safetensors",
            "tiny-zorp.safetensors",
            "tiny-bundle.safetensors",
        ]
        bundle = read_tensors(pivotal.files[-1].path)
        assert bundle["bundle_emb.<zorp>.string_to_param.*"].shape == (3, 32)
        lora = read_tensors(pivotal.files[1].path)
        assert {k for k in bundle if not k.startswith("bundle_emb")} == lora.keys()
        prompt, settings = "a <zorp> robot, red", DrawSettings(steps=2)
        one, other = (
            load(pivotal.recipe.base, files).draw(prompt, 1, settings)
            for files in (
                [pivotal.files[-1].path],
                [pivotal.files[1].path, pivotal.files[2].path],
            )
        )
        assert one.tobytes() == other.tobytes()
        card = (pivotal.folder / "export" / "README.md").read_text()
        assert 'load_textual_inversion("tiny-zorp.safetensors")' in card
        assert "load_lora_weights" in card

    def test_files_stand_beside_checkpoints_of_others(
        self, alone: tunekit.Run, tmp_path: Path
    ) -> None:
        rows = torch.randn(2, 32) * 0.1
        save_file({"<hat>": rows}, tmp_path / "hat.safetensors")
        step = alone.folder / "checkpoints" / "step-000004"
        painter = load(alone.recipe.base, [step, tmp_path / "hat.safetensors"])
        drawn = painter.draw("a <zorp> with a <hat>", 1, QUICK)
        both = load(alone.recipe.base, [tmp_path / "hat.safetensors", alone.files[0].path])
        assert both.draw("a <zorp> with a <hat>", 1, QUICK).tobytes() == drawn.tobytes()
        with pytest.raises(UserError, match='knows "<zorp>" already'):
            load(alone.recipe.base, [alone.files[0].path, alone.files[0].path])

    def test_a_bundle_and_a_checkpoint_are_refused(self, pivotal: tunekit.Run) -> None:
        step = pivotal.folder / "checkpoints" / "step-000004"
        with pytest.raises(UserError, match="is a bundle"):
            load(pivotal.recipe.base, [step, pivotal.files[-1].path])

    def test_strength_of_a_file(self, alone: tunekit.Run) -> None:
        painter = load(alone.recipe.base, [(alone.files[0].path, 0.0)])
        plain = load(alone.recipe.base).draw("a robot robot robot", 1, QUICK)
        assert painter.draw("a <zorp>", 1, QUICK).tobytes() == plain.tobytes()

    def test_info_tells_of_words(self, alone: tunekit.Run, pivotal: tunekit.Run) -> None:
        told = describe(alone.files[0].path)
        assert told.kind == "new words (textual inversion)"
        (word,) = told.words
        assert (word.word, word.vectors, word.width) == ("<zorp>", 3, {"": 32})
        assert word.start == "robot"
        assert "3 vectors, 32 numbers each" in "\n".join(told.lines())
        assert told.suspicious == ()
        bundle = describe(pivotal.files[-1].path)
        assert bundle.kind == "bundle (LoRA and new words)"
        assert bundle.modules
        assert bundle.words[0].vectors == 3
        json.dumps(bundle.as_dict())

    def test_a_rate_of_nothing_fails_and_names_the_vectors(
        self, recipes: Any, tmp_path: Path
    ) -> None:
        whole = recipes(True).model_dump()
        whole["train"]["learning_rate"] = 0.0
        with pytest.raises(ExportError, match=r"vector 1 of <zorp>, vector 2 of <zorp>, .*moved"):
            tunekit.train(whole, out=tmp_path / "run", reporter=Silent())

    def test_a_run_goes_on_as_if_never_stopped(
        self, recipes: Any, pivotal: tunekit.Run, tmp_path: Path
    ) -> None:
        import shutil

        folder = tmp_path / "run"
        shutil.copytree(pivotal.folder, folder)
        for path in (folder / "report.html", folder / "scores.json"):
            path.unlink()
        for step in (3, 4):
            shutil.rmtree(folder / "checkpoints" / f"step-00000{step}")
        told = Told()
        again = tunekit.train(recipes(True), out=folder, reporter=told, resume=True)
        for one, other in zip(again.files, pivotal.files, strict=True):
            mine, first = read_tensors(one.path), read_tensors(other.path)
            assert mine.keys() == first.keys()
            assert all(torch.equal(mine[name], first[name]) for name in mine)
