"""How much memory do the tools over files take, beside the size of the model they work on?

    python benchmarks/files_memory.py [--megabytes 800] [--only merge]

A base of random weights (a U-Net of Stable Diffusion's form, as deep as it takes to reach
`--megabytes`), a LoRA for it, and the two merged. Every verb works on them in a process of its own;
what is told is how far its peak rises above what it held before the work began: with the libraries
imported and the base's names known. The rise should follow the largest weight, not the model.

Everything lies in a temporary folder. Writes benchmarks/results/files_memory.json, unless `--only`
is given; exits with 1 where a limit is exceeded.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "files_memory.json"
VERBS = ("merge", "extract", "resize", "convert", "mix")
RANK = 16
# Of the largest weight in fp32: itself, its change, their sum, and what linear algebra works with.
TIMES_ALLOWED = 7.0
BESIDE_ALLOWED = 30.0  # MB: headers, names, buffers
WIDTHS = (256, 512)


def peak() -> float:
    """Return this process's highest resident memory in MB (10^6 bytes)."""
    told = Path("/proc/self/status").read_text()
    line = next(line for line in told.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def make_base(folder: Path, megabytes: float) -> float:
    """Write a base of random weights, tensor by tensor; return the bytes of its U-Net in MB."""
    import shutil

    import torch
    from diffusers import UNet2DConditionModel

    from tunekit.files.stream import Form, write
    from tunekit.toybox import model_path

    shutil.copytree(model_path(), folder)
    (folder / "unet/diffusion_pytorch_model.safetensors").unlink()
    config = json.loads((folder / "unet/config.json").read_text())
    for layers in range(1, 100):
        with torch.device("meta"):
            unet: Any = UNet2DConditionModel(
                in_channels=4,
                out_channels=4,
                sample_size=8,
                block_out_channels=WIDTHS,
                layers_per_block=layers,
                cross_attention_dim=config["cross_attention_dim"],
                down_block_types=("CrossAttnDownBlock2D",) * 2,
                up_block_types=("CrossAttnUpBlock2D",) * 2,
            )
        size = sum(p.numel() for p in unet.parameters()) * 4 / 1e6
        if size >= megabytes:
            break
    unet.save_config(folder / "unet")
    random = torch.Generator().manual_seed(0)
    forms = {name: Form("float32", tuple(p.shape)) for name, p in unet.named_parameters()}
    tensors = (
        (name, torch.randn(form.shape, generator=random) * 0.02) for name, form in forms.items()
    )
    write(folder / "unet/diffusion_pytorch_model.safetensors", forms, tensors, {"format": "pt"})
    return size


def make_adapter(path: Path, base: Path) -> None:
    """Write a LoRA for every attention and convolution of the base."""
    import torch

    from tunekit.files import output, sources
    from tunekit.files.names import Names
    from tunekit.schema import Base

    family = sources.outline(Base(model=str(base)))
    names = Names(family)
    random = torch.Generator().manual_seed(1)
    with output.Output(path, "kohya", names, None) as made:
        for place in sorted(sources.targets(family, "full")):
            shape = names.shape(place)
            down = torch.randn(RANK, *shape[1:], generator=random) * 0.02
            up = torch.randn(shape[0], RANK, *[1] * (len(shape) - 2), generator=random) * 0.02
            made.add(place, output.lora(up, down))
        made.finish({})


def work(verb: str, folder: Path) -> None:
    """Do what a verb does, and print how far memory rose."""
    import torch

    torch.set_num_threads(1)
    from tunekit.files import convert, extract, mix, resize, sources
    from tunekit.files import folder as folders
    from tunekit.files.cut import Keep
    from tunekit.files.names import Names
    from tunekit.files.opened import NewFile
    from tunekit.schema import Base

    base, lora, out = str(folder / "base"), folder / "lora.safetensors", folder / f"{verb}.out"
    file = out.with_suffix(".safetensors")
    torch.linalg.svd(torch.randn(64, 64))
    Names(sources.outline(Base(model=base)))
    before, began = peak(), time.perf_counter()
    if verb == "merge":
        folders.merge([(lora, 1.0)], folder / "merged", base=base)
    elif verb == "extract":
        extract.extract(str(folder / "merged"), base, NewFile(file), Keep(rank=RANK))
    elif verb == "resize":
        resize.resize(lora, NewFile(file), Keep(rank=RANK // 2), base=base)
    elif verb == "convert":
        convert.convert(lora, "diffusers", out=file, base=base)
    else:
        mix.mix([(lora, 1.0), (lora, 0.5)], NewFile(file), mix.Way(), Keep(), base=base)
    seconds = time.perf_counter() - began
    print(json.dumps({"before_mb": before, "peak_mb": peak(), "seconds": seconds}))


def measured(folder: Path, verbs: tuple[str, ...], largest: float) -> Iterator[dict[str, Any]]:
    """Yield what each verb took."""
    for verb in verbs:
        words = [sys.executable, __file__, "--work", verb, "--folder", str(folder)]
        ran = subprocess.run(words, capture_output=True, text=True, check=False)
        if ran.returncode:
            raise SystemExit(ran.stderr)
        told = json.loads(ran.stdout.splitlines()[-1])
        rise = told["peak_mb"] - told["before_mb"]
        yield {
            "verb": verb,
            "rise_mb": round(rise, 1),
            "times_the_largest_weight": round(rise / largest, 2),
            "before_mb": round(told["before_mb"], 1),
            "seconds": round(told["seconds"], 1),
            "within_limit": rise <= TIMES_ALLOWED * largest + BESIDE_ALLOWED,
        }


def main() -> int:
    """Measure; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megabytes", type=float, default=800)
    parser.add_argument("--only", choices=VERBS)
    parser.add_argument("--work", choices=VERBS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, given.folder)
        return 0
    verbs = (given.only,) if given.only else VERBS
    with tempfile.TemporaryDirectory() as near:
        folder = Path(near)
        size = make_base(folder / "base", given.megabytes)
        make_adapter(folder / "lora.safetensors", folder / "base")
        largest = _largest(folder / "base") / 1e6
        rows = list(measured(folder, verbs, largest))
    result = {
        "model_mb": round(size, 1),
        "largest_weight_mb": round(largest, 1),
        "limit_mb": round(TIMES_ALLOWED * largest + BESIDE_ALLOWED, 1),
        "rank": RANK,
        "machine": f"{platform.machine()}, {platform.system()}",
        "verbs": rows,
    }
    print(json.dumps(result, indent=2))
    if not given.only:
        RESULT.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if all(row["within_limit"] for row in rows) else 1


def _largest(base: Path) -> int:
    from tunekit.files.stream import TensorFile

    file = TensorFile(base / "unet/diffusion_pytorch_model.safetensors")
    return max(form.bytes for form in file.forms.values())


if __name__ == "__main__":
    sys.exit(main())
