"""Files of ai-toolkit, written here by hand as its own code writes them.

Of a transformer: PEFT's names under `transformer.`, in the base's own dotted names, without alphas,
because it trains with alpha = rank there; LoKr keeps an alpha. Of a U-Net: kohya's naming.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as read
from safetensors.torch import save_file
from torch import Tensor

from tunekit import families
from tunekit.files.convert import convert
from tunekit.info import describe
from tunekit.loading import load_file
from tunekit.schema import Base

Folder = Callable[..., Path]
METADATA = {
    "format": "pt",
    "name": "zorp_v1",
    "version": "1.0",
    "ss_output_name": "zorp_v1",
    "ss_base_model_version": "flux1",
    "software": json.dumps({"name": "ai-toolkit", "repo": "https://github.com/ostris/ai-toolkit"}),
    "training_info": json.dumps({"step": 2000, "epoch": 3}),
}
MODULES = {
    "flux": (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.to_k",
        "transformer_blocks.0.attn.to_v",
        "transformer_blocks.0.attn.to_out.0",
        "transformer_blocks.0.attn.add_k_proj",
        "transformer_blocks.0.ff.net.0.proj",
        "single_transformer_blocks.1.attn.to_v",
        "single_transformer_blocks.1.proj_mlp",
        "single_transformer_blocks.1.proj_out",
    ),
    "sd3": (
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn2.to_k",
        "transformer_blocks.1.attn.add_v_proj",
        "transformer_blocks.1.ff.net.2",
    ),
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def shapes(base: Path, modules: tuple[str, ...]) -> dict[str, tuple[int, int]]:
    denoiser = families.load(Base(model=str(base)), "meta").denoiser
    weights: dict[str, Any] = {name: denoiser.get_submodule(name).weight for name in modules}
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def changes(base: Path, path: Path) -> dict[str, Tensor]:
    loaded = load_file(families.load(Base(model=str(base))), path, "it")
    return {name.removeprefix("denoiser."): change() for name, change in loaded.changes.items()}


@pytest.mark.parametrize("name", list(MODULES))
def test_lora_of_a_transformer(name: str, tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder(name)
    tensors, wanted = {}, {}
    for seed, (module, (out, into)) in enumerate(shapes(base, MODULES[name]).items()):
        down, up = random(4, into, seed=seed), random(out, 4, seed=seed + 100)
        tensors[f"transformer.{module}.lora_A.weight"] = down.bfloat16()
        tensors[f"transformer.{module}.lora_B.weight"] = up.bfloat16()
        wanted[module] = up.bfloat16().float() @ down.bfloat16().float()
    path = tmp_path / "zorp_v1.safetensors"
    save_file(tensors, path, METADATA)
    there = convert(path, "kohya", base=str(base))
    assert any("says no alpha" in line for line in there.remarks)
    for file in (path, there.path):
        found = changes(base, file)
        assert found.keys() == wanted.keys()
        for module, change in wanted.items():
            torch.testing.assert_close(found[module], change, atol=1e-6, rtol=1e-4)
    back = read(convert(there.path, "diffusers", base=str(base)).path)
    assert back.keys() == tensors.keys()
    told = describe(path)
    assert {(module.kind, module.rank) for module in told.modules} == {("LoRA", 4)}


def test_lokr_of_a_transformer(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder("flux")
    tensors, wanted = {}, {}
    for seed, (module, (out, into)) in enumerate(shapes(base, MODULES["flux"]).items()):
        one, two = random(4, 4, seed=seed) * 20, random(out // 4, into // 4, seed=seed + 100)
        tensors[f"transformer.{module}.lokr_w1"] = one
        tensors[f"transformer.{module}.lokr_w2"] = two
        # Both factors are whole, so that it is not multiplied with anything.
        tensors[f"transformer.{module}.alpha"] = torch.tensor(9999999999.0)
        wanted[module] = torch.kron(one, two)
    path = tmp_path / "zorp_lokr.safetensors"
    save_file(tensors, path, METADATA)
    there = convert(path, "kohya", base=str(base))
    for file in (path, there.path):
        found = changes(base, file)
        for module, change in wanted.items():
            torch.testing.assert_close(found[module], change, atol=1e-6, rtol=1e-5)


def test_lora_of_a_unet_is_in_kohyas_naming(tiny_folder: Folder, tmp_path: Path) -> None:
    base = tiny_folder()
    module = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    ((_, (out, into)),) = shapes(base, (module,)).items()
    name = f"lora_unet_{module.replace('.', '_')}"
    down, up = random(4, into, seed=0).half(), random(out, 4, seed=1).half()
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    tensors[f"{name}.alpha"] = torch.tensor(2.0).half()
    path = tmp_path / "zorp_sd.safetensors"
    save_file(tensors, path, METADATA | {"ss_base_model_version": "sd_1.5"})
    wanted = up.float() @ down.float() / 2
    there = convert(path, "diffusers", base=str(base))
    for file in (path, there.path):
        torch.testing.assert_close(changes(base, file)[module], wanted, atol=1e-6, rtol=1e-3)
