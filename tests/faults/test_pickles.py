"""Files that would run code when they are read: refused unread, and the canary stays away."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile import Canary, safetensors_bytes
from told import Typed

Tree = dict[str, dict[str, Any]]
Planted = Callable[[Path, str], None]


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """The file that a pickle would leave behind."""
    return tmp_path / "canary"


@pytest.fixture
def planted(canary: Path) -> Planted:
    """Return a function that writes a pickle: as torch saves one, or bare."""

    def plant(path: Path, how: str = "torch") -> None:
        if how == "torch":
            torch.save({"state_dict": Canary(canary)}, path)
        else:
            path.write_bytes(pickle.dumps(Canary(canary)))

    return plant


def test_the_canary_sings_where_a_pickle_is_read(
    tmp_path: Path, canary: Path, planted: Planted
) -> None:
    """Fault 8, the other way round: these files do run code, so its absence says something."""
    planted(tmp_path / "x.pt", "torch")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert canary.exists()


def test_a_recipe_with_them_is_refused_with_its_line(
    typed: Typed,
    tree: Callable[..., Tree],
    written: Callable[[Tree], Path],
    planted: Planted,
    canary: Path,
    tmp_path: Path,
) -> None:
    """Fault 8: a base in one file, and the vectors that a new word starts at."""
    planted(tmp_path / "base.ckpt")
    planted(tmp_path / "word.pt", "bare")
    planted(tmp_path / "word.safetensors")
    recipe = written(tree())
    lines = recipe.read_text().splitlines()
    at = next(i for i, line in enumerate(lines, 1) if line.strip().startswith("model:"))
    command = ["train", recipe, "--out", tmp_path / "run"]
    broken = recipe.read_text().splitlines()
    broken[at - 1] = f"  model: {tmp_path / 'base.ckpt'}"
    recipe.write_text("\n".join(broken))
    (line,) = typed(*command).refusal(f"{recipe}:{at}: base.model: ")
    assert "is a pickle" in line
    recipe.write_text("\n".join(lines))
    pictures = tmp_path / "pictures"  # without captions, so that each says the new word
    shutil.copytree(tree()["data"]["source"], pictures)
    (pictures / "metadata.jsonl").unlink()
    command += [f"data.source={pictures}", "data.holdout=null"]
    for name in ("word.pt", "word.safetensors"):
        word = f'tokens=[{{name: "<zorp>", init: "{tmp_path / name}"}}]'
        typed(*command, word, "data.trigger=<zorp>").refusal(name)
    assert not (tmp_path / "run").exists()
    assert not canary.exists()


@pytest.mark.parametrize("name", ["lora.bin", "lora.pt", "lora.ckpt", "lora.safetensors"])
@pytest.mark.parametrize("how", ["torch", "bare"])
def test_an_adapter_file(
    typed: Typed, planted: Planted, canary: Path, tmp_path: Path, name: str, how: str
) -> None:
    """Fault 8 and Fault 9: a LoRA or an embedding, whatever its name says."""
    path = tmp_path / name
    planted(path, how)
    for words in (
        ["info", path],
        ["generate", "--adapter", path, "--base", "toybox", "--out", tmp_path / "out"],
    ):
        (line,) = typed(*words, *(["--prompt", "x"] if words[0] == "generate" else [])).refusal()
        assert line.startswith(f"{path}: ")
        assert "pickle" in line
    assert not (tmp_path / "out").exists()
    assert not canary.exists()


@pytest.mark.parametrize("component", ["unet", "text_encoder", "vae"])
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "model.safetensors"])
def test_a_base_s_folder(
    typed: Typed,
    tree: Callable[..., Tree],
    written: Callable[[Tree], Path],
    planted: Planted,
    canary: Path,
    tmp_path: Path,
    component: str,
    name: str,
) -> None:
    """Fault 8 and Fault 9: pickled weights, and a pickle under the name of weights."""
    recipe = tree()
    base = tmp_path / "base"
    shutil.copytree(recipe["base"]["model"], base)
    (weights,) = (base / component).glob("*.safetensors")
    weights.unlink()
    planted(weights if name.endswith(".safetensors") else base / component / name)
    recipe["base"] = {"model": str(base)}
    told = typed("train", written(recipe), "--out", tmp_path / "run")
    told.refusal(component)
    assert "pickle" in told.err
    assert not (tmp_path / "run").exists()
    assert not canary.exists()


HEADER = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()


@pytest.mark.parametrize(
    "content",
    [
        (2**62).to_bytes(8, "little") + HEADER + bytes(4),
        (len(HEADER) + 5).to_bytes(8, "little") + HEADER + bytes(4),
        len(HEADER).to_bytes(8, "little") + HEADER + bytes(3),
        len(HEADER).to_bytes(8, "little") + HEADER[:-9],
        (100_000_001).to_bytes(8, "little") + b"{" + b" " * 100,
        b"",
    ],
    ids=["oversized", "longer", "cut data", "cut header", "above the limit", "empty"],
)
def test_a_broken_safetensors_file(typed: Typed, tmp_path: Path, content: bytes) -> None:
    """Fault 9: an adapter and a base whose header lies."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    for words in (["info", path], ["generate", "--base", path, "--prompt", "x"]):
        (line,) = typed(*words).refusal(str(path))
        assert len(line) < 400


def test_a_base_that_carries_code(
    typed: Typed,
    tree: Callable[..., Tree],
    written: Callable[[Tree], Path],
    canary: Path,
    tmp_path: Path,
) -> None:
    """Fault 11: refused before it is loaded; a judge's folder cannot bring any either."""
    recipe = tree()
    base, judge = tmp_path / "base", tmp_path / "judge"
    code = f"open({str(canary)!r}, 'w')\n"
    shutil.copytree(recipe["base"]["model"], base)
    (base / "unet" / "pipeline.py").write_text(code)
    recipe["base"] = {"model": str(base)}
    path = written(recipe | {"base": {"model": str(base), "trust_remote_code": True}})
    path.write_text(path.read_text().replace("trust_remote_code: true", "trust_remote_code: false"))
    told = typed("train", path, "--out", tmp_path / "run")
    (line,) = told.refusal("carries code (unet/pipeline.py)")
    assert "base.trust_remote_code: true" in line
    shutil.copytree(recipe["evaluate"]["clip"], judge)
    config = json.loads((judge / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}}
    (judge / "config.json").write_text(json.dumps(config | {"model_type": "evil"}))
    (judge / "evil.py").write_text(code)
    recipe = tree(evaluate={"clip": str(judge)})
    typed("train", written(recipe), "--out", tmp_path / "run").refusal(str(judge))
    assert not (tmp_path / "run").exists()
    assert not canary.exists()


MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    "asked",
    [
        {"megatron_config": {"x": 1}, "megatron_core": "evil"},
        {"init_lora_weights": "pissa"},
        {"alpha_pattern": {"(([a-z_.0-9])+)+!": 2}},
        {"target_modules": "(([a-z_.0-9])+)+!"},
        {"rank_pattern": {"a": "b"}},
        {"modules_to_save": ["conv_in"]},
        {"lora_alpha": 10**400},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_a_file_may_not_ask_of_peft(
    typed: Typed, tiny_folder: Callable[..., Path], tmp_path: Path, asked: dict[str, Any]
) -> None:
    """Beyond the table: metadata that imports a module, changes the base, or never ends."""
    path, settings = (
        tmp_path / "a.safetensors",
        {"r": 2, "lora_alpha": 2, "target_modules": [MODULE]},
    )
    tensors = {
        f"unet.{MODULE}.lora_A.weight": ("F32", [2, 16], bytes(128)),
        f"unet.{MODULE}.lora_B.weight": ("F32", [16, 2], bytes(128)),
    }
    told = {"lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in settings.items()})}
    path.write_bytes(safetensors_bytes(tensors, told))
    assert typed("info", path).code == 0
    told["lora_adapter_metadata"] = json.dumps(
        {f"unet.{key}": value for key, value in (settings | asked).items()}
    )
    path.write_bytes(safetensors_bytes(tensors, told))
    base = ["--base", tiny_folder(), "--prompt", "x", "--out", tmp_path / "out"]
    for words in (["info", path], ["generate", "--adapter", path, *base]):
        (line,) = typed(*words).refusal(f"{path}: lora_adapter_metadata: unet.{next(iter(asked))}")
        assert line.endswith("the file is refused")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("unet", "layers_per_block", 100_000),
        ("vae", "block_out_channels", [10**7, 16, 16]),
        ("text_encoder", "num_hidden_layers", 2**31),
    ],
)
def test_a_description_of_what_no_model_has(
    typed: Typed,
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
    part: str,
    key: str,
    value: object,
) -> None:
    """Beyond the table: libraries would build it all before they look for its weights."""
    base = tmp_path / "base"
    shutil.copytree(tiny_folder(), base)
    path = base / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    (line,) = typed(
        "generate", "--base", base, "--prompt", "x", "--out", tmp_path / "out"
    ).refusal()
    assert line.startswith(f"{path}: {key} is ")


def test_a_file_cannot_say_whose_code_is_trusted(tmp_path: Path) -> None:
    """Beyond the table: the recipe in an adapter is read for its base and words alone."""
    from tunekit.known import said_by_all

    recipe = {
        "base": {"model": "/etc", "trust_remote_code": True},
        "data": {"source": "x", "trigger": "zorp", "class": "robot"},
        "evaluate": {},
    }
    path = tmp_path / "a.safetensors"
    for model, taken in (("/etc", None), ("../x", None), ("toybox", "toybox")):
        recipe["base"]["model"] = model
        path.write_bytes(
            safetensors_bytes({"a": ("F32", [1], bytes(4))}, {"tunekit.recipe": json.dumps(recipe)})
        )
        known = said_by_all([path])
        assert known.data is not None
        assert (known.base and known.base.model) == taken
        assert known.base is None or known.base.trust_remote_code is False


def test_what_a_file_says_brings_nothing_from_the_hub(
    tmp_path: Path, typed: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond the table: a stranger's file would choose what is downloaded, and who hears of it."""
    import huggingface_hub
    from huggingface_hub import constants
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    from tunekit.known import said_by_all

    def asked(*given: object, **more: object) -> None:
        raise AssertionError(f"the Hub was asked for {given} {more}")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    recipe = {
        "base": {"model": "owner/name"},
        "data": {"source": "x", "trigger": "zorp", "class": "robot"},
        "evaluate": {},
    }
    path, picture = tmp_path / "a.safetensors", tmp_path / "a.png"
    path.write_bytes(
        safetensors_bytes({"a": ("F32", [1], bytes(4))}, {"tunekit.recipe": json.dumps(recipe)})
    )
    size = {"steps": 1, "guidance_scale": 1.0, "scheduler": "ddim", "width": 64, "height": 64}
    info = PngInfo()
    info.add_text("tunekit", json.dumps({"prompt": "x", "seed": 1, "base": "owner/name", **size}))
    Image.new("RGB", (64, 64)).save(picture, pnginfo=info)
    for given in (("--adapter", path), ("--from", picture)):
        (line,) = typed("generate", *given, "--out", tmp_path / "out").refusal()
        assert "which is not on this disk" in line
        assert "brings nothing from the Hub: --base owner/name does" in line
    held = tmp_path / "hub" / "models--owner--name"
    (held / "snapshots" / "0").mkdir(parents=True)
    (held / "refs").mkdir()
    (held / "refs" / "main").write_text("0")
    (held / "snapshots" / "0" / "model_index.json").write_text("{}")
    known = said_by_all([path])
    assert known.base is not None
    assert known.base.model == "owner/name", "what was brought before is taken at its word"
