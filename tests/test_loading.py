"""Adapter files of every kind in a fresh base: exported, verified, loaded, scaled, combined."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from taught import recipe_for, teach, verify
from torch import Tensor

import tunekit
from tunekit import checkpoint, families, verification
from tunekit.checkpoint import read_safetensors, write_safetensors
from tunekit.errors import UserError
from tunekit.export import ExportedFile, export_adapter
from tunekit.families import Family
from tunekit.inference import DrawSettings, Painter, load
from tunekit.info import describe
from tunekit.loading import VerificationError, load_file
from tunekit.recipe import Recipe, dump_yaml

QUICK = DrawSettings(steps=2)
KINDS: dict[str, dict[str, Any]] = {
    "LoRA": {"kind": "lora", "rank": 4, "targets": "full", "rslora": True, "text_encoder": True},
    "PiSSA": {"kind": "lora", "rank": 4, "targets": "full", "init": "pissa"},
    "DoRA": {"kind": "lora", "rank": 4, "targets": "full", "dora": True, "text_encoder": True},
    "LoHa": {"kind": "loha", "rank": 4, "alpha": 2.0, "targets": "full", "text_encoder": True},
    "LoKr": {"kind": "lokr", "rank": 2, "alpha": 3.0, "targets": "full", "factor": 4},
    "OFT": {"kind": "oft", "block_size": 4, "targets": "full", "text_encoder": True},
    "BOFT": {"kind": "boft", "block_size": 4, "targets": "full"},
    "whole": {"kind": "full", "text_encoder": True},
}


@pytest.fixture(scope="module")
def made(
    tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Recipe, list[ExportedFile]]]:
    """Return a function that gives a kind's recipe and its exported files, made once."""
    known: dict[str, tuple[Recipe, list[ExportedFile]]] = {}

    def make(kind: str) -> tuple[Recipe, list[ExportedFile]]:
        if kind not in known:
            recipe = _recipe(tiny_folder(), KINDS[kind])
            folder = tmp_path_factory.mktemp(kind)
            known[kind] = recipe, export_adapter(*teach(recipe, 0.02), recipe, folder)
        return known[kind]

    return make


def _recipe(folder: Path, adapter: dict[str, Any], **sections: dict[str, Any]) -> Recipe:
    tree = recipe_for(folder, **sections).model_dump()
    return Recipe.model_validate(tree | {"adapter": adapter})


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.tobytes() == other.tobytes()


@torch.no_grad()
def predict(family: Family) -> Tensor:
    noisy = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    conditioning = family.encode_prompt(["a zorp robot", ""])
    return family.predict(noisy, torch.tensor([100, 900]), conditioning)


@pytest.mark.parametrize("kind", KINDS)
class TestEveryKind:
    def test_its_files_pass_verification_in_half_precision(self, kind: str, made: Any) -> None:
        recipe, files = made(kind)
        assert {file.layout for file in files} == set(recipe.adapter.layouts())
        for file in files:
            assert file.dtype == "fp16"
            assert file.parity.change > 0.01
            assert file.parity.module_error < verification.TOLERANCE["fp16"]
            assert file.diffusers == (kind in ("LoRA", "PiSSA", "DoRA"))
            alphas = [t for k, t in read_safetensors(file.path)[0].items() if k.endswith(".alpha")]
            assert bool(alphas) == (file.layout == "kohya" and kind != "whole")

    def test_tunekit_load_draws_with_it(self, kind: str, made: Any) -> None:
        recipe, files = made(kind)
        base = load(recipe.base, device="cpu").draw("a zorp robot", 1, QUICK)
        drawn = []
        for file in files:
            painter = tunekit.load(recipe.base.model, file.path, device="cpu")
            drawn.append(painter.draw("a zorp robot", 1, QUICK))
            assert not same(drawn[-1], base)
            assert same(painter.draw("a zorp robot", 1, DrawSettings(steps=2, scale=0)), base)
            assert same(painter.draw("a zorp robot", 1, QUICK), drawn[-1])
        again = Painter.of(*teach(recipe, 0.02)).draw("a zorp robot", 1, QUICK)
        for image in drawn:
            far = [abs(a - b) for a, b in zip(image.tobytes(), again.tobytes(), strict=True)]
            assert sum(far) / len(far) < 1

    def test_a_checkpoint_draws_what_was_drawn(self, kind: str, made: Any, tmp_path: Path) -> None:
        recipe, _ = made(kind)
        (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
        family, adapter = teach(recipe, 0.02)
        sample = Painter.of(family, adapter).draw("a zorp robot", 1, QUICK)
        folder = tmp_path / "checkpoints" / "step-000001"
        checkpoint.save(folder, {"adapter": adapter.state()}, {"step": 1})
        painter = tunekit.load(recipe.base.model, folder, device="cpu")
        assert same(painter.draw("a zorp robot", 1, QUICK), sample)

    def test_info_says_what_it_is(self, kind: str, made: Any) -> None:
        for file in made(kind)[1]:
            found = describe(file.path)
            assert found.kind == {"PiSSA": "LoRA"}.get(kind, kind)
            assert not found.unread
            assert found.suspicious == ()

    def test_half_a_file_changes_nothing_of_the_base(
        self, kind: str, made: Any, tmp_path: Path
    ) -> None:
        recipe, files = made(kind)
        tensors, metadata = read_safetensors(files[-1].path)
        one = next(key for key in tensors if not key.endswith(".alpha"))
        strange = {k.replace("unet", "unot"): t for k, t in tensors.items() if k != one}
        write_safetensors(tmp_path / "broken.safetensors", strange, metadata)
        family = families.load(recipe.base)
        before = predict(family)
        with pytest.raises(VerificationError):
            load_file(family, tmp_path / "broken.safetensors", "broken")
        if not files[-1].diffusers:
            assert predict(family).equal(before)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "whole"])
def test_what_was_taught_to_a_base_in_half_precision_passes_too(
    kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = _recipe(tiny_folder(), KINDS[kind], base={"dtype": "bf16"})
    files = export_adapter(*teach(recipe, 0.05), recipe, tmp_path)
    assert all(file.path.is_file() for file in files)


@pytest.mark.parametrize("kind", KINDS)
def test_a_strength_off_by_a_fiftieth_is_found(
    kind: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """In one module of many, whatever the kind and the layout."""
    recipe = _recipe(tiny_folder(), KINDS[kind])
    family, adapter = teach(recipe, 0.05)
    for layout in recipe.adapter.layouts():
        tensors, metadata = adapter.export_state(layout)
        ends = (".lora_B.weight", ".lora_up.weight", "hada_w1_a", "lokr_w1", "oft_blocks", ".diff")
        one = next(key for key in tensors if key.endswith(ends))
        wrong = tensors | {one: tensors[one] * 1.02}
        write_safetensors(tmp_path / "wrong.safetensors", wrong, metadata)
        with pytest.raises(VerificationError, match="changes the weights as trained"):
            verify(tmp_path / "wrong.safetensors", recipe, family, adapter)


class TestSeveral:
    def test_all_kinds_at_once_in_any_order(self, made: Any) -> None:
        """But DoRA: in peft it turns what the adapters before it add."""
        recipe = made("LoRA")[0]
        paths = [made(kind)[1][-1].path for kind in KINDS if kind != "DoRA"]
        drawn = []
        for order in (paths, paths[::-1]):
            painter = load(recipe.base, [(path, 0.5) for path in order], "cpu")
            drawn.append(predict(painter.family))
        torch.testing.assert_close(drawn[0], drawn[1], atol=1e-4, rtol=1e-4)

    def test_two_of_whole_weights_add_up(self, made: Any) -> None:
        recipe, files = made("whole")
        once = load(recipe.base, [files[0].path], "cpu")
        half = load(recipe.base, [(files[0].path, 0.75), (files[0].path, 0.25)], "cpu")
        torch.testing.assert_close(predict(half.family), predict(once.family), atol=1e-5, rtol=1e-5)

    def test_a_base_in_half_precision_draws_with_every_kind(self, made: Any) -> None:
        for kind in KINDS:
            recipe, files = made(kind)
            base = recipe.base.model_copy(update={"dtype": "bf16"})
            wanted = predict(load(recipe.base, [files[-1].path], "cpu").family)
            found = predict(load(base, [files[-1].path], "cpu").family).float()
            assert float((found - wanted).norm() / wanted.norm()) < 0.05, kind


def test_an_alpha_of_several_numbers(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    family = families.load(recipe_for(tiny_folder()).base)
    tensors = {"lora_unet_conv_in.diff": torch.zeros(16, 4, 3, 3)}
    tensors["lora_unet_conv_in.alpha"] = torch.ones(2)
    write_safetensors(tmp_path / "it.safetensors", tensors, {})
    with pytest.raises(VerificationError, match="lora_unet_conv_in: "):
        load_file(family, tmp_path / "it.safetensors", "it")


def test_two_spellings_of_one_factor(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    family = families.load(recipe_for(tiny_folder()).base)
    tensors = {f"lora_unet_conv_norm_out.{x}": torch.ones(16) for x in ("diff", "w_norm")}
    write_safetensors(tmp_path / "it.safetensors", tensors, {})
    with pytest.raises(VerificationError, match="two of its tensors are one factor"):
        load_file(family, tmp_path / "it.safetensors", "it")


def test_a_layout_that_cannot_carry_the_adapter_is_refused_before_training(
    tiny_folder: Callable[..., Path],
) -> None:
    from tunekit.recipe import recipe_from

    tree: dict[str, Any] = recipe_for(tiny_folder()).model_dump(exclude_defaults=True)
    tree["data"]["source"] = str(tiny_folder())
    for adapter, layout, why in (
        ({"kind": "loha"}, "diffusers", "diffusers has no loader for loha: use kohya"),
        ({"kind": "lora", "dora": True}, "kohya", "no client draws dora from kohya's naming"),
        ({"kind": "full"}, "diffusers", "no loader for differences of whole weights"),
    ):
        wrong = tree | {"adapter": adapter, "export": {"layouts": [layout]}}
        with pytest.raises(UserError, match=rf"export\.layouts: .*{why}"):
            recipe_from(wrong)
        assert recipe_from(wrong, ["export.layouts=null"]).export.layouts is None


_OUT = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"


@pytest.mark.parametrize(
    "beside",
    [None, f"unet.{_OUT}.diff_b", "bundle_emb.<zorp>.string_to_param.*"],
    ids=["read by diffusers", "with a bias", "with a new word"],
)
def test_an_alpha_that_stands_in_the_metadata_alone_counts(
    beside: str | None, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Whoever reads the file: diffusers, or we where it holds what diffusers cannot read."""
    family = families.load(recipe_for(tiny_folder()).base)
    out, width = family.denoiser.get_submodule(_OUT).weight.shape
    down, up = torch.randn(3, width), torch.randn(out, 3)
    tensors = {f"unet.{_OUT}.lora_A.weight": down, f"unet.{_OUT}.lora_B.weight": up}
    if beside is not None:
        tensors[beside] = torch.randn(out) if beside.endswith("diff_b") else torch.randn(2, 32)
    said = {"unet.r": 3, "unet.lora_alpha": 7, "unet.target_modules": [_OUT]}
    path = tmp_path / "it.safetensors"
    write_safetensors(path, tensors, {"lora_adapter_metadata": json.dumps(said)})
    loaded = load_file(family, path, "it")
    assert loaded.tensors == len(tensors)
    torch.testing.assert_close(loaded.changes[f"denoiser.{_OUT}"](), up @ down * (7 / 3))
