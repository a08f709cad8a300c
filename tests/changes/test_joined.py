"""Weights that clients join: the same rows as diffusers' own conversions, there and back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from diffusers.loaders.single_file_utils import (
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
)
from safetensors.torch import load_file, save_file
from taught import recipe_for, teach
from torch import Tensor

from tunekit import families, loading
from tunekit.changes.joined import Joint, join, separate
from tunekit.errors import UserError
from tunekit.export import export_adapter
from tunekit.families import Family
from tunekit.files.adapter import AdapterFile
from tunekit.files.convert import convert
from tunekit.files.names import Names
from tunekit.info import describe
from tunekit.loaded import VerificationError
from tunekit.schema import Base

Folder = Callable[..., Path]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def flux(tiny_folder: Folder, tmp_path: Path) -> Family:
    """As wide as the real one, which diffusers takes for granted, and without weights."""
    folder = shutil.copytree(tiny_folder("flux"), tmp_path / "wide")
    path = folder / "transformer" / "config.json"
    wide = {"num_attention_heads": 24, "attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]}
    path.write_text(json.dumps(json.loads(path.read_text()) | wide))
    return families.load(Base(model=str(folder)), "meta")


@pytest.fixture
def sd3(tiny_folder: Folder) -> Family:
    return families.load(Base(model=str(tiny_folder("sd3"))), "meta")


@pytest.mark.parametrize(
    ("name", "conversion"),
    [
        ("flux", convert_flux_transformer_checkpoint_to_diffusers),
        ("sd3", convert_sd3_transformer_checkpoint_to_diffusers),
    ],
)
def test_every_row_is_where_diffusers_puts_it(
    name: str, conversion: Any, request: pytest.FixtureRequest
) -> None:
    """Of each weight of a checkpoint in the first release's naming, its rows numbered."""
    family: Any = request.getfixturevalue(name)
    denoiser = family.denoiser
    checkpoint: dict[str, Tensor] = {}
    for joint in family.joints:
        height = sum(piece.last - piece.first for piece in joint.pieces)
        checkpoint[f"{joint.name}.weight"] = torch.arange(height).float().reshape(-1, 1)
        checkpoint[f"{joint.name}.bias"] = torch.arange(height).float()
    others = dict(family.others_of_the_first_release(denoiser.config))
    checkpoint |= {theirs: random(4, seed=n) for n, theirs in enumerate(others)}
    converted = conversion(dict(checkpoint))
    wanted = {ours: checkpoint[theirs] for theirs, ours in others.items()}
    for joint in family.joints:
        for module in joint.modules:
            for which in ("weight", "bias"):
                rows = joint.rows(module, checkpoint[f"{joint.name}.{which}"])
                wanted[f"{module}.{which}"] = rows
    assert wanted.keys() == converted.keys() == denoiser.state_dict().keys()
    for key, tensor in wanted.items():
        assert tensor.equal(converted[key]), key


def products(joint: Joint, modules: list[str], rank: int = 2, wide: int = 3) -> Any:
    """Return a pair for each module, and strengths that are not all alike."""
    heights = {m: sum(p.last - p.first for p in joint.pieces if p.module == m) for m in modules}
    held = {
        m: {"down": random(rank, wide, seed=n), "up": random(heights[m], rank, seed=n + 9)}
        for n, m in enumerate(modules)
    }
    return held, {m: 0.5 + 0.25 * n for n, m in enumerate(modules)}


@pytest.mark.parametrize("lacking", [0, 1, 2])
def test_joined_and_taken_apart_they_are_what_they_were(lacking: int, sd3: Family) -> None:
    (joint,) = (j for j in sd3.joints if j.name == "joint_blocks.0.x_block.attn2.qkv")
    held, scales = products(joint, list(joint.modules[lacking:]))
    made, scale = join(joint, held, scales)
    alpha = torch.tensor(scale * len(made["down"]))
    parts = separate(joint, made | {"alpha": alpha})
    assert parts.keys() == held.keys()
    for module, own in parts.items():
        assert own["down"].equal(held[module]["down"])
        wanted = scales[module] * held[module]["up"] @ held[module]["down"]
        found = float(own["alpha"]) / len(own["down"]) * own["up"] @ own["down"]
        torch.testing.assert_close(found, wanted)


def test_one_down_of_all_is_held_once(sd3: Family) -> None:
    """As sd-scripts trains them: converted there and back, nothing has grown."""
    (joint,) = (j for j in sd3.joints if j.name == "joint_blocks.0.x_block.attn.qkv")
    trained = {"down": random(2, 96, seed=0), "up": random(288, 2, seed=1)}
    trained["alpha"] = torch.tensor(1.0)
    parts = separate(joint, trained)
    made, scale = join(joint, parts, dict.fromkeys(parts, 0.5))
    assert (scale, made["down"].equal(trained["down"])) == (0.5, True)
    assert made["up"].equal(trained["up"])


def test_diffusers_own_loader_draws_from_our_file_what_it_should(
    flux: Family, tmp_path: Path
) -> None:
    """All modules of two blocks of real width, in the joined form, by FluxPipeline."""
    wanted, tensors = {}, {}
    for joint in flux.joints:
        if "blocks" not in joint.name:
            continue
        held, scales = products(joint, list(joint.modules))
        made, scale = join(joint, held, scales)
        tensors[f"{joint.kohya}.lora_down.weight"] = made["down"]
        tensors[f"{joint.kohya}.lora_up.weight"] = made["up"]
        tensors[f"{joint.kohya}.alpha"] = torch.tensor(scale * len(made["down"]))
        wanted |= {m: scales[m] * held[m]["up"] @ held[m]["down"] for m in joint.modules}
    save_file(tensors, tmp_path / "it.safetensors")
    found = FluxPipeline.lora_state_dict(str(tmp_path), weight_name="it.safetensors")
    assert len(found) == 2 * len(wanted)
    for module, change in wanted.items():
        up, down = (found[f"transformer.{module}.lora_{f}.weight"] for f in "BA")
        torch.testing.assert_close(up @ down, change)


def trained_by_sd_scripts(family: Family, rank: int = 4, alpha: float = 2.0) -> dict[str, Tensor]:
    """Return a file of its form: one down for query, key and value, one alpha a module."""
    tensors = {}
    for seed, joint in enumerate(family.joints):
        if not joint.name.startswith("joint_blocks.1.") or "adaLN" in joint.name:
            continue
        weight: Any = family.denoiser.get_submodule(joint.modules[0]).weight
        height = sum(piece.last - piece.first for piece in joint.pieces)
        up = random(height, rank, seed=seed)
        if "context_block" in joint.name:
            up[: height // 3] = 0  # nobody reads what the words ask in the last block
        tensors[f"{joint.kohya}.lora_down.weight"] = random(rank, weight.shape[1], seed=seed + 50)
        tensors[f"{joint.kohya}.lora_up.weight"] = up
        tensors[f"{joint.kohya}.alpha"] = torch.tensor(alpha)
    return tensors


def test_a_file_of_sd_scripts_is_drawn_with_and_converted_both_ways(
    tiny_folder: Folder, sd3: Family, tmp_path: Path
) -> None:
    tensors, base = trained_by_sd_scripts(sd3), tiny_folder("sd3")
    path = tmp_path / "theirs.safetensors"
    save_file(tensors, path)
    told = describe(path, str(base))
    assert told.family == "sd3"
    assert not told.suspicious, told.suspicious
    there = convert(path, "diffusers", base=str(base))
    assert max(there.there, there.back) < 1e-12
    back = load_file(convert(there.path, "kohya", base=str(base)).path)
    assert back.keys() == tensors.keys()
    name = "lora_unet_joint_blocks_1_x_block_attn_qkv"
    changes = [
        loading.load_file(families.load(Base(model=str(base))), one, "it").changes
        for one in (path, there.path)
    ]
    assert changes[0].keys() == changes[1].keys()
    assert "denoiser.transformer_blocks.1.attn.add_q_proj" not in changes[0]
    assert "denoiser.transformer_blocks.1.attn.add_k_proj" in changes[0]
    keys = "denoiser.transformer_blocks.1.attn.to_k"
    product = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"] * 0.5
    for change in changes:
        torch.testing.assert_close(change[keys](), product[96:192])


def test_the_first_release_s_own_names(tiny_folder: Folder, sd3: Family, tmp_path: Path) -> None:
    """Dotted: ComfyUI's without alphas, and PEFT's with one beside, which is of the whole rank."""
    (joint,) = (j for j in sd3.joints if j.name == "joint_blocks.0.x_block.attn.qkv")
    held, _ = products(joint, list(joint.modules), wide=96)
    made, _ = join(joint, held, dict.fromkeys(held, 1.0))
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 3.0}))
    for top, name, scale in (
        ("diffusion_model", "comfyui", 1.0),
        ("base_model.model", "adapter_model", 0.5),
    ):
        key, path = f"{top}.{joint.name}", tmp_path / f"{name}.safetensors"
        save_file({f"{key}.lora_A.weight": made["down"], f"{key}.lora_B.weight": made["up"]}, path)
        file = AdapterFile(path, Names(sd3))
        for module in joint.modules:
            place = ("denoiser", module)
            assert file.rank(place) == 2
            found = file.read(place).change(torch.zeros(96, 96))
            torch.testing.assert_close(found, scale * held[module]["up"] @ held[module]["down"])
    base = families.load(Base(model=str(tiny_folder("sd3"))))
    loaded = loading.load_file(base, tmp_path / "comfyui.safetensors", "it")
    assert loaded.changes.keys() == {f"denoiser.{module}" for module in joint.modules}


def test_a_module_that_never_moved_is_not_missed(tiny_folder: Folder, tmp_path: Path) -> None:
    """Joined with others it has no rank left; the export is verified all the same."""
    recipe = recipe_for(
        tiny_folder("sd3"),
        adapter={"targets": [r"attn\.add_(q|k)_proj"]},
        export={"dtype": "fp32", "layouts": ["kohya"]},
    )
    family, adapter = teach(recipe)
    still = "denoiser.transformer_blocks.1.attn.add_q_proj.lora_B.weight"
    with torch.no_grad():
        adapter.trained()[still].zero_()
    (file,) = export_adapter(family, adapter, recipe, tmp_path)
    names = Names(families.load(recipe.base, "meta"))
    held = {module for _, module in AdapterFile(file.path, names).places}
    assert held == {
        "transformer_blocks.0.attn.add_q_proj",
        "transformer_blocks.0.attn.add_k_proj",
        "transformer_blocks.1.attn.add_k_proj",
    }


def test_what_has_no_rows_of_its_own_is_refused(tiny_folder: Folder, tmp_path: Path) -> None:
    path = tmp_path / "lokr.safetensors"
    name = "lora_unet_joint_blocks_0_x_block_attn_qkv"
    save_file({f"{name}.lokr_w1": torch.ones(2, 2), f"{name}.lokr_w2": torch.ones(144, 48)}, path)
    with pytest.raises(UserError, match="lokr_w1 acts on all rows of joint_blocks"):
        convert(path, "kohya", base=str(tiny_folder("sd3")), out=tmp_path / "o.safetensors")
    with pytest.raises(VerificationError, match="lokr_w1 acts on all rows of joint_blocks"):
        loading.load_file(families.load(Base(model=str(tiny_folder("sd3")))), path, "it")
    save_file(
        {f"{name}.lora_down.weight": torch.ones(1, 96), f"{name}.lora_up.weight": torch.ones(9, 1)},
        path,
    )
    with pytest.raises(UserError, match="it has 9 rows, and joint_blocks"):
        convert(path, "diffusers", base=str(tiny_folder("sd3")), out=tmp_path / "o.safetensors")
    save_file(
        {f"{name}.lora_down.weight": torch.ones(1, 96), f"{name}.lora_up.weight": torch.ones(9)},
        path,
    )
    with pytest.raises(UserError, match=name):
        convert(path, "diffusers", base=str(tiny_folder("sd3")), out=tmp_path / "o.safetensors")
    with pytest.raises(VerificationError, match=name):
        loading.load_file(families.load(Base(model=str(tiny_folder("sd3")))), path, "it")
