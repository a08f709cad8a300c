"""Fuzz targets: files of tensors, adapters, bases, and the folders that runs leave."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

from hostile import safetensors_bytes
from mutate import VALUES, encoded, some_bytes, some_json
from PIL.PngImagePlugin import PngInfo
from targets import VALID, Target

DTYPES = {
    "F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "I8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8, "U16": 2, "F4": 1, "X99": 4,
}  # fmt: skip
SHAPES = (
    [], [0], [1], [2], [4], [2, 4], [4, 2], [4, 32], [32, 4], [4, 32, 1, 1], [4, 4, 3, 3], [1, 1],
    [2, 2, 2, 2, 2], [2, 2, 2, 2, 2, 2], [76, 8], [0, 4], [4, 0], [1, 32], [16, 32], [2, 4, 4],
)  # fmt: skip
_UNET = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
_KOHYA = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
NAMES = (
    *(f"unet.{_UNET}.lora_{side}.weight" for side in "AB"),
    *(f"unet.{_UNET.replace('to_q', 'to_k')}.lora_{side}.weight" for side in "AB"),
    f"unet.{_UNET}.lora_magnitude_vector", f"unet.{_UNET}.alpha", f"unet.{_UNET}.diff",
    *(f"{_KOHYA}.{part}" for part in (
        "lora_down.weight", "lora_up.weight", "alpha", "dora_scale", "diff", "diff_b", "hada_w1_a",
        "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w2",
        "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "oft_blocks", "oft_R",
        "lora_mid.weight", "bias", "w_norm", "b_norm",
    )),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_up.weight",
    "emb_params", "<zorp>", "zorp", "clip_l", "clip_g", "a b", "{x}", "\u202e", "", "a" * 200,
    "bundle_emb.<zorp>.string_to_param.*", "bundle_emb.zorp.clip_l", "bundle_emb..clip_g",
    "bundle_emb.x", "model.diffusion_model.input_blocks.0.0.weight", "model_ema.decay",
    "__metadata__", "weight",
    "transformer.blocks.0.attn.to_q.lora_A.weight", "lora_transformer_x.alpha", "..lora_A.weight",
)  # fmt: skip
METADATA: dict[str, Any] = {
    "tunekit.recipe": json.dumps(VALID),
    "tunekit.word_starts": '{"<zorp>": "robot"}',
    "lora_adapter_metadata": json.dumps(
        {"unet.lora_alpha": 4, "unet.r": 4, "unet.alpha_pattern": {"attn1.to_q": 2}}
    ),
    "modelspec.architecture": "stable-diffusion-v1/lora",
    "modelspec.trigger_phrase": "zorp",
    "ss_sd_model_name": "x",
}


def _tensor(rng: Random) -> tuple[str, list[int], bytes]:
    kind, shape = rng.choice((*DTYPES, *["F32", "F16"] * 6)), list(rng.choice(SHAPES))
    size = DTYPES[kind]
    for edge in shape:
        size *= edge
    return kind, shape, rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))


def _metadata(rng: Random) -> dict[str, str]:
    said = {key: value for key, value in METADATA.items() if rng.random() < 0.4}
    for key, value in said.items():
        if value.startswith("{") and rng.random() < 0.7:
            said[key] = some_json(rng, json.loads(value))
        elif rng.random() < 0.2:
            said[key] = str(rng.choice(VALUES))
    return said


def adapter(rng: Random, names: tuple[str, ...] = NAMES) -> bytes:
    """Return a whole safetensors file of tensors that may or may not belong together."""
    tensors = {name: _tensor(rng) for name in rng.sample(names, rng.choice((1, 2, 2, 3, 4, 8)))}
    if rng.random() < 0.5:  # more often than chance: a pair that fits
        start, rank = rng.choice(NAMES[:1]).rpartition("lora_A")[0], rng.choice((1, 4))
        tensors[f"{start}lora_A.weight"] = ("F32", [rank, 16], rng.randbytes(64 * rank))
        tensors[f"{start}lora_B.weight"] = ("F32", [16, rank], rng.randbytes(64 * rank))
    return safetensors_bytes(tensors, _metadata(rng))


def _good(folder: Path) -> list[bytes]:
    return [
        safetensors_bytes({"a": ("F32", [2, 4], bytes(32)), "b": ("I64", [], bytes(8))}),
        safetensors_bytes(
            {"model.diffusion_model.x": ("F16", [4], bytes(8)), "model_ema.x": ("U8", [1], b"a")},
            {"format": "pt"},
        ),
        _cache_shard(folder),
        adapter(Random(0)),
    ]


def _cache_shard(folder: Path) -> bytes:
    import torch

    from tunekit.data.shards import Block, write_shard

    write_shard(
        folder / "a", {"k": Block.of({"x": torch.ones(3)}), "l": Block.of({"x": torch.ones(2)})}
    )
    return (folder / "a").read_bytes()


def _header(rng: Random, data: bytes) -> bytes:
    """Return a file with the same tensors under a header made wrong, its length right."""
    length = int.from_bytes(data[:8], "little")
    header = encoded(some_json(rng, json.loads(data[8 : 8 + length])))
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def _strike_file(rng: Random, seeds: list[bytes], where: Path) -> Path:
    path, data = where / "a.safetensors", rng.choice(seeds)
    data = _header(rng, data) if rng.random() < 0.6 else some_bytes(rng, data, seeds)
    path.write_bytes(data)
    return path


def _read_file(path: Path) -> object:
    """Ask every reader of safetensors; each must say yes or no in its own way."""
    from tunekit import checkpoint, embeddings, safefile, singlefile
    from tunekit.data import shards
    from tunekit.errors import UserError

    refusals = 0
    for read in (safefile.tensor_names, singlefile.check, embeddings.contents):
        try:
            read(path)
        except UserError:
            refusals += 1
    try:
        for key, span in shards.read_spans(path).items():
            shards.read_block(path, key, span).tensors()
    except shards.DamagedError:
        refusals += 1
    return checkpoint.read_safetensors(path)


def _nothing(folder: Path) -> None:
    return None


def _strike_adapter(rng: Random, seeds: None, where: Path) -> Path:
    path, data = where / "a.safetensors", adapter(rng)
    path.write_bytes(_header(rng, data) if rng.random() < 0.2 else data)
    return path


def _read_adapter(path: Path) -> object:
    """Describe an adapter, and find out how to draw with it: as `info` and `generate` do."""
    from tunekit import info, known
    from tunekit.errors import UserError

    with contextlib.suppress(UserError):  # what `info` says of it is looked at all the same
        known.said_by_all([path])
    described = info.describe(path)
    return "\n".join(described.lines()) + json.dumps(described.as_dict())


def _base(folder: Path) -> Path:
    from tiny import tiny_sd

    return tiny_sd(folder / "sd")


_FITTING = tuple(
    f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.{part}.lora_{side}.weight"
    for part in ("to_q", "to_k")
    for side in "AB"
)


def _strike_loaded(rng: Random, base: Path, where: Path) -> tuple[Path, Path]:
    path = where / "a.safetensors"
    path.write_bytes(adapter(rng, (*_FITTING, *NAMES)))
    return base, path


def _read_loaded(given: tuple[Path, Path]) -> object:
    from tunekit import inference
    from tunekit.schema import Base

    base, path = given
    return inference.load(Base(model=str(base)), [path])


# Folders that runs leave


def _run(folder: Path) -> Path:
    import torch

    from tunekit import checkpoint
    from tunekit.recipe import dump_yaml, recipe_from

    run = folder / "run"
    for step in (2, 4):
        sets = ("adapter", "ema", "guards", "optimizer", "trained")
        groups = {name: {"a": torch.ones(3)} for name in sets}
        checkpoint.save(run / "checkpoints" / f"step-{step:06d}", groups, {"step": step})
    (folder / "pictures").mkdir()
    plain = {
        **VALID,
        "data": {**VALID["data"], "source": str(folder / "pictures")},
        "train": {**VALID["train"], "steps": 9},
    }
    (run / "recipe.yaml").write_text(dump_yaml(recipe_from(plain)))
    (run / "pictures.json").write_text('{"training": {"0.png": "ab"}}')
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 0.4}\n')
    _read_run(shutil.copytree(run, folder / "copy"))  # one that is refused as it is proves nothing
    return run


def _strike_run(rng: Random, good: Path, where: Path) -> Path:
    run = where / "run"
    shutil.copytree(good, run)
    last = run / "checkpoints" / "step-000004"
    path = rng.choice(sorted(path for path in run.rglob("*") if path.is_file()))
    match rng.randrange(4):
        case 0:
            path.write_bytes(some_bytes(rng, path.read_bytes()))
        case 1:
            path = rng.choice((last / "manifest.json", last / "meta.json", run / "pictures.json"))
            path.write_bytes(encoded(some_json(rng, json.loads(path.read_text()))))
        case 2:  # with a manifest that fits what was made of it
            path = last / rng.choice(("adapter.safetensors", "meta.json", "x.safetensors"))
            made = {"step": rng.choice(VALUES)}
            data = adapter(rng) if path.suffix == ".safetensors" else encoded(some_json(rng, made))
            path.write_bytes(data)
        case _:
            path.unlink()
            if rng.random() < 0.5:
                path.symlink_to(rng.choice(("/etc/passwd", "/dev/zero", str(path), "..")))
    if rng.random() < 0.5 and not path.is_symlink():
        _sign(last)
    return run


def _sign(folder: Path) -> None:
    """Write a manifest that fits the files of a checkpoint, whatever they are."""
    files = {
        path.name: {
            "bytes": path.stat().st_size,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.iterdir()
        if path.is_file() and path.name != "manifest.json"
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def _read_run(run: Path) -> object:
    """Do what `tunekit train --resume` does before it loads a model."""
    from tunekit import resume
    from tunekit.runfolder import RunFolder
    from tunekit.runwriter import Log, RunWriter

    RunWriter(run).check(overwrite=False, resume=True)
    recipe = RunFolder.open(run).recipe
    point = resume.find(run, None, recipe, allow_changed=False, finished=False)
    resume.compare_pictures(run, {"training": {"0.png": "ab"}}, allow_changed=False)
    Log(run, point.step)
    return point


def _descriptions(folder: Path) -> tuple[Path, dict[str, Any]]:
    whole = _base(folder)
    found = {str(path.relative_to(whole)): path for path in sorted(whole.rglob("*.json"))}
    return whole, {name: json.loads(path.read_text()) for name, path in found.items()}


def _strike_base(rng: Random, good: tuple[Path, Mapping[str, Any]], where: Path) -> Path:
    whole, descriptions = good
    base, struck = where / "base", rng.choice([*descriptions, "model_index.json"])
    for name, tree in descriptions.items():
        path = base / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = some_json(rng, tree) if name == struck else json.dumps(tree)
        path.write_bytes(some_bytes(rng, encoded(text)) if rng.random() < 0.1 else encoded(text))
    for weights in whole.rglob("*.safetensors"):
        path = base / weights.relative_to(whole)
        if rng.random() < 0.8:
            path.symlink_to(weights)
        else:
            path.write_bytes(adapter(rng))
    if rng.random() < 0.2:
        (base / rng.choice(("unet/model.bin", "x.py", "vae/diffusion_pytorch_model.bin"))).touch()
    return base


def _read_base(path: Path) -> object:
    from tunekit import families
    from tunekit.schema import Base

    return families.load(Base(model=str(path)))


# What pictures say of how they were drawn

DRAWN: dict[str, Any] = {
    "prompt": "a zorp robot", "negative_prompt": "blue", "seed": 7, "batch": [6, 7], "steps": 2,
    "guidance_scale": 5.0, "scheduler": "euler", "width": 32, "height": 32, "scale": 1.0,
    "text_scale": 0.5, "base": "sd", "base_settings": {"dtype": "fp32", "vae": "vae"},
    "base_sha256": "ab" * 32, "version": "0.1",
    "adapters": [{"name": "a.safetensors", "weight": 0.5}, {"name": "zorp/step-000002"}],
    "start": {"name": "0.png", "strength": 0.5, "mask": {"name": "1.png"}, "extend": {"left": 8}},
    "control": {"name": "0.png", "scale": 1.0}, "controlnet": {"name": "net"},
}  # fmt: skip


def _strike_drawn(rng: Random, seeds: None, where: Path) -> Path:
    """Lay a picture that says something wrong of itself beside what it may name.

    Some say nothing wrong: one that is refused as it is would prove nothing of the others.
    """
    from PIL import Image

    from tunekit.pictures import KEY

    for name in ("runs/zorp/checkpoints/step-000002", "sd", "vae", "net"):
        (where / name).mkdir(parents=True)
    (where / "a.safetensors").write_bytes(adapter(rng))
    step = where / "runs/zorp/checkpoints/step-000002"
    (step / "adapter.safetensors").write_bytes(adapter(rng))
    _sign(step)
    said = json.dumps(DRAWN) if rng.random() < 0.1 else some_json(rng, DRAWN)
    text = encoded(said).decode(errors="replace")
    image, kind = Image.new("RGB", (8, 8), "white"), rng.choice(("PNG", "JPEG", "WEBP"))
    data = BytesIO()
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt(KEY, text, zip=rng.random() < 0.5)
        image.save(data, kind, pnginfo=info)
    else:
        exif = Image.Exif()
        exif[0x010E] = f"{KEY} {text}"[:30_000]
        image.save(data, kind, exif=exif)
    for name in ("0.png", "1.png"):
        (where / name).write_bytes(data.getvalue())
    made = data.getvalue()
    (where / "drawn").write_bytes(some_bytes(rng, made) if rng.random() < 0.2 else made)
    return where / "drawn"


def _read_drawn(path: Path) -> object:
    """Find out how to draw it again, as `generate --from` does before it loads anything."""
    from tunekit.request import Request, plan

    return plan(Request(picture=path))


FILES = (
    Target("pictures' settings", _nothing, _strike_drawn, _read_drawn),
    Target("safetensors", _good, _strike_file, _read_file),
    Target("adapters", _nothing, _strike_adapter, _read_adapter),
    Target("adapters into a base", _base, _strike_loaded, _read_loaded, dear=True),
    Target("run folders", _run, _strike_run, _read_run, dear=True),
    Target("bases", _descriptions, _strike_base, _read_base, dear=True),
)
