"""What a LoRA file's own metadata may ask of peft, which would do whatever a configuration says.

Most settings of peft's are about training: some change the base's weights, import a module by its
name, or are regular expressions that can take years. A file that is drawn with needs none of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tunekit.errors import UserError

# Say how factors are read, or nothing at all.
_PLAIN = frozenset(
    "r lora_alpha lora_dropout use_dora use_rslora lora_bias bias fan_in_fan_out inference_mode "
    "task_type peft_type peft_version base_model_name_or_path revision megatron_core "
    "qalora_group_size ensure_weight_tying".split()
)
_PATTERNS = ("rank_pattern", "alpha_pattern")  # {pattern of a module's name: number}
_TARGETS = ("target_modules", "exclude_modules", "layers_pattern")
_STARTS = (None, True, False, "gaussian")  # the others overwrite the base's weights
_LONGEST = 200  # characters of a pattern
_MOST_REPEATS = 3


def check(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise UserError, naming the setting, where the file at `path` asks peft for more than it may.

    settings: the file's `lora_adapter_metadata`, with the component before each name.
    """
    for key, value in settings.items():
        name = key.rpartition(".")[2]
        if name in _PATTERNS:
            if not isinstance(value, dict) or not all(map(_is_number, value.values())):
                raise _refusal(path, key, "is no list of numbers by module")
            _check_patterns(path, key, value)
        elif name in _TARGETS and value is not None:
            named = [value] if isinstance(value, str) else value
            if not isinstance(named, list) or not all(isinstance(text, str) for text in named):
                raise _refusal(path, key, "is no list of modules")
            _check_patterns(path, key, named)
        elif name in ("r", "lora_alpha") and not _is_number(value):
            raise _refusal(path, key, "is no number")
        elif name == "init_lora_weights" and value not in _STARTS:
            raise _refusal(path, key, "asks for a start that may change the base")
        elif name not in (*_PLAIN, *_TARGETS, "init_lora_weights") and _asks(value):
            raise _refusal(path, key, "is no setting that a file needs to be drawn with")


def _check_patterns(path: Path, key: str, patterns: Iterable[str]) -> None:
    for pattern in patterns:
        repeats = len(re.findall(r"[*+?{]", pattern))
        nested = re.search(r"\)[*+?{]", pattern)  # (a+)+ takes twice as long for each letter more
        if nested or repeats > _MOST_REPEATS or len(pattern) > _LONGEST:
            raise _refusal(path, key, f'"{pattern[:60]}" is a pattern that could take years')


def _is_number(value: object) -> bool:
    # Of thousands of digits no float can be made.
    return isinstance(value, int | float) and abs(value) < 1e30


def _asks(value: object) -> bool:
    return any(map(_asks, value.values())) if isinstance(value, dict) else bool(value)


def _refusal(path: Path, key: str, what: str) -> UserError:
    return UserError(f"{path}: lora_adapter_metadata: {key[:100]} {what}; the file is refused")
