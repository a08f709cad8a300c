"""Whether `tunekit plan` is right about memory: its estimate beside the peak of the real run.

    python benchmarks/plan.py [NAME...] [--work FOLDER]

Every estimate and every run is a process of its own; measured is the peak resident memory that the
system tells of the run's. Runs are cut to a few steps, after which memory does not grow. The larger
base has Stable Diffusion's classes and random weights, 154 million, so that it and its
activations outweigh the interpreter. Results go to benchmarks/results/plan.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "plan.json"
ALLOWED = 0.15
SHORT = ["train.steps=4", "train.sample_every=2", "train.checkpoint_every=2", "evaluate.steps=3"]
SHORT += ['evaluate.prompts=["a {trigger} {class} at night, flat style"]', "evaluate.seeds=[1]"]
LARGE = ["base.model={work}/base", "train.learning_rate=1e-5"]
# Name -> the recipe, and what is laid over it.
CASES: dict[str, tuple[str, list[str]]] = {
    "character-lora": ("character-lora", []),
    "full, text encoder, average": (
        "dreambooth-full",
        ["adapter.text_encoder=true", "train.ema=0.99", "data.prior.count=4"],
    ),
    "large pictures": (
        "character-lora",
        ["data.resolution=128", "data.upscale=true", "train.batch_size=8"],
    ),
    "large base, lora": ("character-lora", [*LARGE, "data.resolution=256", "data.upscale=true"]),
    "large base, text encoder, bf16": (
        "character-lora",
        [
            *LARGE,
            "data.resolution=256",
            "data.upscale=true",
            "adapter.text_encoder=true",
            "train.batch_size=2",
            "train.precision=bf16",
        ],
    ),
    "large base, full": (
        "dreambooth-full",
        [*LARGE, "data.resolution=128", "data.upscale=true", "data.prior=null"],
    ),
}


def main() -> None:
    """Run the cases that are named, or all, and write what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=", ".join(CASES))
    parser.add_argument("--work", type=Path, help="a folder for bases and runs; default: temporary")
    asked = parser.parse_args()
    held: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    rows = {row["name"]: row for row in held.get("cases", [])}
    with tempfile.TemporaryDirectory() as made:
        work = asked.work or Path(made)
        work.mkdir(parents=True, exist_ok=True)
        for name in asked.names or CASES:
            rows[name] = case(name, work)
            print(f"{name}: {rows[name]['error']:+.1%}")
            RESULTS.write_text(json.dumps(summary(rows), indent=2) + "\n")


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """Return the results with where they were measured."""
    import torch

    return {
        "what": "peak memory of a run: estimated by tunekit plan, measured in a process of its own",
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, {torch.get_num_threads()} "
        f"thread, {' '.join(platform.libc_ver())}",
        "torch": torch.__version__,
        "allowed_error": ALLOWED,
        "worst_error": max((row["error"] for row in rows.values()), key=abs),
        "cases": [rows[name] for name in CASES if name in rows],
    }


def case(name: str, work: Path) -> dict[str, Any]:
    """Estimate and measure one case."""
    recipe, changes = CASES[name]
    changes = [one.format(work=work) if "{work}" in one else one for one in changes]
    if any("/base" in one for one in changes):
        large_base(work / "base")
    given = [f"recipes/{recipe}.yaml", *SHORT, *changes]
    planned = json.loads(
        subprocess.run(
            [sys.executable, "-m", "tunekit", "plan", *given, "--json"],
            stdout=subprocess.PIPE,
            check=True,
            cwd=ROOT,
        ).stdout
    )
    peak = run([*given, "--out", str(work / "run"), "--overwrite"])
    memory = planned["memory"]
    return {
        "name": name,
        "recipe": recipe,
        "overrides": [*SHORT, *CASES[name][1]],
        "trained": planned["trained"]["numbers"],
        "estimated_bytes": memory["peak"],
        "measured_bytes": peak,
        "error": round(memory["peak"] / peak - 1, 4),
        "peak_while": memory["peak_while"],
        "parts": memory["phases"][memory["peak_while"]],
    }


def run(given: list[str]) -> int:
    """Train, and return the most bytes that the process had in memory."""
    started = subprocess.Popen([sys.executable, "-m", "tunekit", "train", *given], cwd=ROOT)
    _, status, used = os.wait4(started.pid, 0)
    started.returncode = os.waitstatus_to_exitcode(status)
    assert started.returncode == 0, given
    return used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def large_base(folder: Path) -> None:
    """Save a base of 154 million random weights."""
    if folder.is_dir():
        return
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from tunekit import toybox

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(toybox.model_path() / "tokenizer")
    marks = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    length = tokenizer.model_max_length
    StableDiffusionPipeline(
        tokenizer=tokenizer,
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=512,
                intermediate_size=2048,
                projection_dim=512,
                num_hidden_layers=8,
                num_attention_heads=8,
                max_position_embeddings=length,
                **marks,
            )
        ),
        unet=UNet2DConditionModel(
            sample_size=32,
            block_out_channels=(160, 320, 640),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=512,
            attention_head_dim=8,
        ),
        vae=AutoencoderKL(
            block_out_channels=(64, 128, 256, 256),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            sample_size=256,
        ),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    main()
