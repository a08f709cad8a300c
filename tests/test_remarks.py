"""What the libraries say of themselves when they are imported does not reach a user of tunekit."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunekit.recipe import dump_yaml, recipe_from

# All that peft and diffusers import of what holds bases in few bits, the readers
# of pictures that transformers takes without torchvision, then words that are others'.
_IMPORTED = """
import logging
import tunekit
import peft
import diffusers.quantizers.torchao.torchao_quantizer
from transformers import CLIPImageProcessor, SiglipImageProcessor
for name in ("torchao", "torch.utils._pytree", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(name).warning("worth reading")
"""


def test_remarks_are_held_back_and_nothing_else() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORTED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 3, done.stderr
    assert all(line.endswith("worth reading") for line in lines)


def test_a_run_says_only_what_is_its_own(
    tree: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    recipe = tree(train={"steps": 1, "checkpoint_every": 0, "sample_every": 0})
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe_from(recipe)))
    words = ["train", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-m", "tunekit", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "training 1/1" in done.stderr
    strange = ("torchao", "Failed to load", "bitsandbytes", "Unable to import", "Warning", "W1")
    assert not [line for line in done.stderr.splitlines() if any(s in line for s in strange)]
