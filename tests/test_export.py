"""An exported file does what was trained, or it does not get its name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from taught import recipe_for, teach, verify
from torch import Tensor

from tunekit import adapters, drafts, export, families, modelcard, verification
from tunekit.adapters import Adapter
from tunekit.checkpoint import read_safetensors, write_safetensors
from tunekit.errors import UserError
from tunekit.export import ExportError, cast_tensors, export_adapter
from tunekit.families import Family
from tunekit.inference import DrawSettings, load
from tunekit.recipe import Recipe
from tunekit.verification import VerificationError

ALL = {"targets": "full", "text_encoder": True}
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def recipe(tiny_folder: Callable[..., Path]) -> Recipe:
    return recipe_for(tiny_folder(), adapter=ALL)


@pytest.fixture(scope="module")
def taught(recipe: Recipe) -> tuple[Family, Adapter]:
    return teach(recipe)


@pytest.fixture(scope="module")
def exported(
    recipe: Recipe, taught: tuple[Family, Adapter], tmp_path_factory: pytest.TempPathFactory
) -> export.ExportedFile:
    folder = tmp_path_factory.mktemp("export")
    return export_adapter(*taught, recipe, folder, lesson=modelcard.Lesson(8))[0]


@pytest.fixture
def state(taught: tuple[Family, Adapter]) -> State:
    return taught[1].export_state("diffusers")[0]


def rejected(recipe: Recipe, taught: tuple[Family, Adapter], path: Path, state: State) -> str:
    """Write `state` as an export would, and return the check that its verification fails."""
    write_safetensors(path / "broken.safetensors", state)
    with pytest.raises(VerificationError) as caught:
        verify(path / "broken.safetensors", recipe, *taught)
    assert "\n" not in str(caught.value)
    return caught.value.check


class TestVerified:
    def test_what_was_measured(self, exported: export.ExportedFile) -> None:
        parity = exported.parity
        assert parity.change > 0.1
        assert parity.error < verification.TOLERANCE["fp16"] / 2
        assert parity.module_error < verification.TOLERANCE["fp16"] / 2
        assert parity.tensors == exported.tensors == 2 * parity.modules

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_every_number_format_stays_within_half_its_tolerance(
        self, dtype: Any, tiny_folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        recipe = recipe_for(tiny_folder(), adapter=ALL, export={"dtype": dtype})
        file = export_adapter(*teach(recipe), recipe, tmp_path)[0]
        assert file.parity.error < verification.TOLERANCE[dtype] / 2
        tensors, _ = read_safetensors(file.path)
        assert {str(t.dtype) for t in tensors.values()} == {
            {"fp32": "torch.float32", "bf16": "torch.bfloat16"}[dtype]
        }

    def test_a_base_in_half_precision_is_verified_too(
        self, tiny_folder: Callable[..., Path], tmp_path: Path
    ) -> None:
        recipe = recipe_for(tiny_folder(), base={"dtype": "bf16"}, adapter=ALL)
        assert export_adapter(*teach(recipe), recipe, tmp_path)[0].path.is_file()

    def test_plain_diffusers_draws_what_we_draw(
        self, exported: export.ExportedFile, recipe: Recipe
    ) -> None:
        from diffusers import StableDiffusionPipeline

        pipe = StableDiffusionPipeline.from_pretrained(recipe.base.model, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(str(exported.path.parent), weight_name=exported.path.name)
        seeded = torch.Generator().manual_seed(4)
        theirs = pipe("a zorp robot", num_inference_steps=3, guidance_scale=5.0, generator=seeded)
        painter = load(recipe.base, [exported.path], "cpu")
        ours = painter.draw("a zorp robot", 4, DrawSettings(steps=3))
        assert ours.tobytes() == theirs.images[0].tobytes()

    def test_the_trained_model_is_left_as_it_was(self, recipe: Recipe, tmp_path: Path) -> None:
        family, adapter = teach(recipe)
        adapter.train()
        before = adapter.state()
        modes = [m.training for m in family.denoiser.modules()]
        export_adapter(family, adapter, recipe, tmp_path)
        assert [m.training for m in family.denoiser.modules()] == modes
        assert all(torch.equal(tensor, before[name]) for name, tensor in adapter.state().items())
        assert all(parameter.requires_grad for parameter in adapter.trained().values())

    def test_permissions_follow_the_umask(self, exported: export.ExportedFile) -> None:
        umask = os.umask(0)
        os.umask(umask)
        assert exported.path.stat().st_mode & 0o777 == 0o666 & ~umask

    def test_nothing_else_is_left_in_the_folder(self, exported: export.ExportedFile) -> None:
        assert sorted(p.name for p in exported.path.parent.iterdir()) == [
            "README.md",
            "zorp-diffusers.safetensors",
            "zorp-kohya.safetensors",
        ]


class TestTinyChanges:
    """What fp16 takes from small numbers is no fault of the file, and hides none."""

    @pytest.fixture
    def brief(self, recipe: Recipe) -> tuple[Family, Adapter]:
        """Return what two steps of a warm-up leave: every number of B about as large as its rate.

        One module had no gradient, or one that is nothing but rounding.
        """
        family, adapter = teach(recipe)
        random = torch.Generator().manual_seed(3)
        grown = [p for name, p in adapter.trained().items() if "lora_B" in name]
        with torch.no_grad():
            for parameter in grown:
                sign = torch.randn(parameter.shape, generator=random).sign()
                parameter.copy_(sign * 2e-6 * torch.rand(parameter.shape, generator=random))
            grown[0].zero_()
            grown[1].mul_(1e-6)
        return family, adapter

    def test_the_file_of_a_very_short_run_is_good(
        self, recipe: Recipe, brief: tuple[Family, Adapter], tmp_path: Path
    ) -> None:
        parity = export_adapter(*brief, recipe, tmp_path)[0].parity
        assert verification.TOLERANCE["fp16"] < parity.module_error < 0.1

    def test_a_module_without_gradient_vetoes_no_run(self, recipe: Recipe, tmp_path: Path) -> None:
        family, adapter = teach(recipe)
        grown = [p for name, p in adapter.trained().items() if "lora_B" in name]
        with torch.no_grad():
            grown[0].zero_()
            grown[1].mul_(1e-9)
        assert export_adapter(family, adapter, recipe, tmp_path)[0].path.is_file()

    def test_faults_are_still_found(
        self, recipe: Recipe, brief: tuple[Family, Adapter], tmp_path: Path
    ) -> None:
        state = export.cast_tensors(brief[1].export_state("diffusers")[0], "fp16", "file")
        lost = {k: t / 1.5 if "lora_B" in k else t for k, t in state.items()}
        assert rejected(recipe, brief, tmp_path, lost) == "changes the weights as trained"
        last = [key for key in state if "lora_B" in key][-1]
        wrong = state | {last: state[last] / 1.5}
        assert rejected(recipe, brief, tmp_path, wrong) == "changes the weights as trained"

    def test_a_file_that_rounding_emptied(
        self, recipe: Recipe, brief: tuple[Family, Adapter], tmp_path: Path
    ) -> None:
        with torch.no_grad():
            for name, parameter in brief[1].trained().items():
                parameter.mul_(0.02 if "lora_B" in name else 50.0)
        with pytest.raises(ExportError, match=r"rounding takes .*% of it: set export\.dtype: fp32"):
            export_adapter(*brief, recipe, tmp_path)


class TestRejected:
    def test_what_changes_nothing(self, recipe: Recipe, tmp_path: Path) -> None:
        """B is zero before the first step: the file would load, and draw the base."""
        family = families.load(recipe.base)
        adapter = adapters.get(recipe.adapter.kind).attach(family, recipe.adapter, seed=1)
        earlier = tmp_path / "zorp-diffusers.safetensors"
        earlier.write_text("an earlier, verified file")
        with pytest.raises(ExportError, match=r"differs from the base.*nothing was learned"):
            export_adapter(family, adapter, recipe, tmp_path)
        assert earlier.read_text() == "an earlier, verified file"
        kept = tmp_path / "zorp-diffusers.safetensors.rejected"
        assert read_safetensors(kept)[0].keys() == adapter.export_state("diffusers")[0].keys()
        assert not list(tmp_path.glob("*unverified*"))

    def test_an_export_that_loses_alpha(
        self, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        family, adapter = teach(recipe)
        honest = adapter.export_state

        def without_alpha(layout: str) -> tuple[State, dict[str, str]]:
            tensors, metadata = honest(layout)
            wrong = {k: t / 1.5 if "lora_B" in k else t for k, t in tensors.items()}
            return wrong, metadata

        monkeypatch.setattr(adapter, "export_state", without_alpha)
        with pytest.raises(ExportError, match=r"changes the weights as trained.*rejected"):
            export_adapter(family, adapter, recipe, tmp_path)

    def test_alpha_off_by_a_fiftieth_in_one_module(
        self, recipe: Recipe, taught: tuple[Family, Adapter], state: State, tmp_path: Path
    ) -> None:
        key = next(key for key in state if "lora_B" in key)
        state[key] *= 1.02
        assert rejected(recipe, taught, tmp_path, state) == "changes the weights as trained"

    def test_alpha_off_is_seen_in_the_prediction_alone(
        self,
        recipe: Recipe,
        taught: tuple[Family, Adapter],
        state: State,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(verification, "_compare_changes", lambda *_: (0.0, 0.0))
        wrong = {k: t * 1.02 if "lora_B" in k else t for k, t in state.items()}
        assert rejected(recipe, taught, tmp_path, wrong) == "predicts as trained"

    def test_alpha_that_metadata_contradicts(
        self, recipe: Recipe, taught: tuple[Family, Adapter], state: State, tmp_path: Path
    ) -> None:
        unet = {key: t for key, t in state.items() if key.startswith("unet.")}
        said = {"unet.r": 4, "unet.lora_alpha": 8, "unet.target_modules": _targets(unet)}
        path = tmp_path / "broken.safetensors"
        write_safetensors(path, unet, {"lora_adapter_metadata": json.dumps(said)})
        alone = recipe_for(Path(recipe.base.model), adapter={"targets": "full"})
        with pytest.raises(VerificationError, match="changes the weights as trained"):
            verify(path, alone, *teach(alone))

    def test_a_factor_without_its_other_half(
        self, recipe: Recipe, taught: tuple[Family, Adapter], state: State, tmp_path: Path
    ) -> None:
        """diffusers loads it without a word and draws NaN."""
        del state[next(key for key in state if "lora_B" in key)]
        assert rejected(recipe, taught, tmp_path, state) == "every tensor is taken up"

    def test_a_module_that_is_missing(
        self, recipe: Recipe, taught: tuple[Family, Adapter], state: State, tmp_path: Path
    ) -> None:
        module = next(iter(state)).rsplit(".lora_", 1)[0]
        less = {key: t for key, t in state.items() if not key.startswith(f"{module}.lora_")}
        assert rejected(recipe, taught, tmp_path, less) == "changes the weights as trained"

    @pytest.mark.parametrize("module", ["unet.nowhere.to_q", "transformer.blocks.0.to_q"])
    def test_a_tensor_that_no_place_is_for(
        self,
        module: str,
        recipe: Recipe,
        taught: tuple[Family, Adapter],
        state: State,
        tmp_path: Path,
    ) -> None:
        """diffusers leaves both out without a word."""
        state[f"{module}.lora_A.weight"] = torch.ones(4, 16)
        state[f"{module}.lora_B.weight"] = torch.ones(16, 4)
        assert rejected(recipe, taught, tmp_path, state) == "every tensor is taken up"

    def test_factors_of_another_shape(
        self, recipe: Recipe, taught: tuple[Family, Adapter], state: State, tmp_path: Path
    ) -> None:
        key = next(key for key in state if "lora_A" in key and state[key].ndim == 2)
        state[key] = torch.ones(4, state[key].shape[1] + 1)
        assert rejected(recipe, taught, tmp_path, state) == "loads"

    def test_a_disk_that_returns_something_else(
        self,
        recipe: Recipe,
        taught: tuple[Family, Adapter],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def careless(path: Path, tensors: State, metadata: dict[str, str]) -> None:
            first = next(iter(tensors))
            write_safetensors(path, tensors | {first: tensors[first] + 1}, metadata)

        monkeypatch.setattr(drafts, "write_safetensors", careless)
        with pytest.raises(ExportError, match="read back"):
            export_adapter(*taught, recipe, tmp_path)

    def test_an_interruption_leaves_nothing(
        self,
        recipe: Recipe,
        taught: tuple[Family, Adapter],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(export, "compare", interrupted)
        with pytest.raises(KeyboardInterrupt):
            export_adapter(*taught, recipe, tmp_path)
        assert list(tmp_path.iterdir()) == []


def _targets(state: State) -> list[str]:
    modules = {key.removeprefix("unet.").rsplit(".lora_", 1)[0] for key in state}
    return sorted(modules)


class TestCast:
    def test_nan_names_the_tensor(self) -> None:
        with pytest.raises(ExportError, match=r"x\.lora_A holds NaN"):
            cast_tensors({"x.lora_A": torch.tensor([1.0, float("nan")])}, "fp32", "file")

    def test_what_fp16_cannot_hold(self) -> None:
        tensors = {"x.lora_B": torch.tensor([1e5])}
        with pytest.raises(ExportError, match=r"reaches 100000, more than fp16.*bf16"):
            cast_tensors(tensors, "fp16", "file")
        assert cast_tensors(tensors, "bf16", "file")["x.lora_B"].isfinite().all()


class TestMetadata:
    def test_what_clients_read(self, exported: export.ExportedFile) -> None:
        said = read_safetensors(exported.path)[1]
        assert said["modelspec.sai_model_spec"] == "1.0.1"
        assert said["modelspec.architecture"].endswith("/lora")
        assert said["modelspec.title"] == said["ss_output_name"] == "zorp"
        assert said["modelspec.resolution"] == "32x32"
        assert said["modelspec.trigger_phrase"] == "zorp"
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", said["modelspec.date"])
        assert said["ss_num_train_images"] == "8"
        assert json.loads(said["tunekit.recipe"])["adapter"]["rank"] == 4
        told = json.loads(said["lora_adapter_metadata"])  # its strength is in the tensors
        assert (told["unet.r"], told["unet.lora_alpha"], told["unet.use_dora"]) == (4, 4, False)
        assert any(name.endswith("attn1.to_q") for name in told["unet.target_modules"])

    def test_no_path_and_no_secret_leaves_the_machine(
        self, tiny_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        folder = tiny_folder()
        monkeypatch.setenv("SOME_API_TOKEN", "swordfish-42")
        recipe = recipe_for(
            folder,
            data={
                "source": str(folder),
                "holdout": str(folder / "unet"),
                "trigger": "swordfish-42",
            },
            evaluate={
                "negative_prompt": "https://me:pa55@host/x?sig=1&access_token=abc",
                "clip": "hf_abcdefghijkl",
            },
        )
        metadata = modelcard.file_metadata(recipe, {}, {}, 32)
        card = modelcard.model_card(recipe, [("file", "what")], 32)
        for text in [*metadata.values(), card]:
            for secret in (str(folder.parent), "swordfish", "pa55", "abc", "hf_abcdef"):
                assert secret not in text, text
        tree = json.loads(metadata["tunekit.recipe"])
        assert tree["base"]["model"] == tree["data"]["source"] == folder.name
        assert tree["data"]["holdout"] == "unet"

    def test_a_hub_id_stays_and_a_path_of_two_names_does_not(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert modelcard.portable("owner/model") == "owner/model"
        (tmp_path / "owner/model").mkdir(parents=True)
        assert modelcard.portable("owner/model") == "model"
        assert modelcard.portable("C:\\models\\mine") == "mine"


class TestCard:
    def test_its_code_draws_the_picture(
        self, exported: export.ExportedFile, recipe: Recipe, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        card = (exported.path.parent / "README.md").read_text()
        found = re.search(r"```python\n(.*?)```", card, re.S)
        assert found
        code = found[1].replace(f"path/to/{Path(recipe.base.model).name}", recipe.base.model)
        assert code != found[1]
        monkeypatch.chdir(exported.path.parent)
        names: dict[str, Any] = {}
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            exec(code, names)
        drawn = names["picture"]
        assert isinstance(drawn, Image.Image)
        base = load(recipe.base, device="cpu").draw("a zorp robot", 1, DrawSettings(steps=3))
        assert drawn.size == base.size
        assert np.abs(np.asarray(drawn, float) - np.asarray(base, float)).max() > 2

    def test_scores_come_when_they_are_known(
        self, exported: export.ExportedFile, recipe: Recipe
    ) -> None:
        card = exported.path.parent / "README.md"
        assert "Not measured" in card.read_text()
        export.write_card(recipe, [exported], 32, {"subject likeness": "0.81"})
        assert "| subject likeness | 0.81 |" in card.read_text()
        assert "Not measured" not in card.read_text()

    def test_front_matter_of_a_hub_base_and_of_the_bundled_one(self) -> None:
        hub = recipe_for(Path("owner/model"))
        card = modelcard.model_card(hub, [("f.safetensors", "it")], 512)
        assert card.startswith('---\nbase_model: "owner/model"\n')
        assert 'from_pretrained("owner/model")' in card
        card = modelcard.model_card(recipe_for(Path("toybox")), [("f.safetensors", "it")], 64)
        assert "base_model:" not in card
        assert "from_pretrained(tunekit.toybox.model_path())" in card


def test_a_layout_that_is_not_there_is_refused_before_anything_is_written(
    recipe: Recipe, taught: tuple[Family, Adapter], tmp_path: Path
) -> None:
    other = recipe.model_copy(
        update={"export": recipe.export.model_copy(update={"layouts": ("sculpture",)})}
    )
    with pytest.raises(UserError, match="sculpture"):
        export_adapter(*taught, other, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []
