"""A base as one file in the naming of its first release, read by diffusers' own conversion.

The file holds weights alone. What they are weights of (configurations, tokenizer) is read from a
diffusers folder beside it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.errors import UserError
from tunekit.safefile import tensor_names

if TYPE_CHECKING:
    import torch
    from torch import nn

_DENOISER = "model.diffusion_model."
_AVERAGED = "model_ema."
# The tensors of each component, where the file has one for each of ours.
_HELD = {
    "unet": re.escape(_DENOISER),
    "vae": r"(first_stage_model|vae)\.(encoder|decoder|quant_conv|post_quant_conv)\.",
    "text_encoder": r"cond_stage_model\.transformer\.text_model\.(?!embeddings\.position_ids$)",
}


def check(path: Path) -> bool:
    """Check that a file is a whole base in safetensors, without torch and without its weights.

    Returns whether it also holds averaged (EMA) weights, which are not used. Raises UserError for
    a pickle, a damaged file, or one that is no base.
    """
    names = tensor_names(path)
    if not any(name.startswith(_DENOISER) for name in names):
        held = f"such as {names[0]}" if names else "none at all"
        raise UserError(
            f"{path}: is no base in the original naming: it has no tensors {_DENOISER}*, "
            f"but {len(names)} others, {held}; a LoRA or a part of a model cannot be a base"
        )
    return any(name.startswith(_AVERAGED) for name in names)


def default_config(path: Path) -> str:
    """Return the Hub id whose configuration diffusers takes for a file, told from its tensors."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    try:
        found: str = fetch_diffusers_config(_tensors(path))["pretrained_model_name_or_path"]
    except (LookupError, ValueError) as error:  # shapes that no model has
        raise UserError(f"{path}: diffusers cannot tell what model it is: {error!r}") from None
    return found


def load(kind: Any, path: Path, configs: Path, name: str, dtype: torch.dtype) -> nn.Module:
    """Return a component of the file, with every one of its weights.

    kind: its class; configs: a diffusers folder that describes it in its folder `name`.
    Raises UserError where weights are missing, have no place, or are not those of this class.
    """
    from diffusers.loaders import single_file_utils
    from diffusers.utils import logging

    what: dict[str, Any] = {"config": str(configs), "subfolder": name, "torch_dtype": dtype}
    what["local_files_only"] = True
    tensors = _tensors(path)
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it warns of is refused below
    try:
        if hasattr(kind, "from_single_file"):
            module: nn.Module = kind.from_single_file(tensors, **what)
        else:
            module = single_file_utils.create_diffusers_clip_model_from_ldm(kind, tensors, **what)
    except NotImplementedError:  # torch's word for moving a weight that was never read
        raise _incomplete(path, name, configs) from None
    except (
        OSError,
        ValueError,
        LookupError,
        RuntimeError,
        single_file_utils.SingleFileComponentError,
    ) as error:
        # Without the advice to fill up with random weights.
        line = " ".join(str(error).split()).partition(" If you want to")[0]
        raise UserError(
            f"{path}: its {name} cannot be loaded as {configs / name} describes it: {line[:300]}; "
            "is base.config that of this model?"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    if any(parameter.is_meta for parameter in module.parameters()):
        raise _incomplete(path, name, configs)
    # A configuration of fewer layers takes what it needs and leaves the others behind.
    held, used = sum(1 for key in tensors if re.match(_HELD[name], key)), len(module.state_dict())
    if held > used:
        raise UserError(
            f"{path}: holds {held} weights of its {name}, but {configs / name} describes one of "
            f"{used}; set base.config to the configuration of this model"
        )
    return module


def _incomplete(path: Path, name: str, configs: Path) -> UserError:
    return UserError(
        f"{path}: weights of its {name} are missing, as {configs / name} describes it; the file is "
        "incomplete, or base.config is of another model"
    )


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, LookupError) as error:
        raise UserError(f"{path}: is damaged: {' '.join(str(error).split())[:300]}") from None
    return tensors
