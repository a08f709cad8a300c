"""A base as one file in the naming of its first release.

Read by diffusers' own conversion, or by a family's table of whose rows each tensor holds. The file
holds weights alone. What they are weights of (configurations, tokenizer) is read from a diffusers
folder beside it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunekit.errors import UserError
from tunekit.safefile import tensor_names

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tunekit.changes.joined import Piece

_DENOISER = "model.diffusion_model."
# Files of a transformer alone have no such prefix.
_BARE = re.compile(r"(double|joint)_blocks\.\d+\.")
_AVERAGED = "model_ema."
# The tensors of each component; those of OpenCLIP that diffusers leaves out are not counted.
_HELD = {
    "unet": re.escape(_DENOISER),
    "vae": r"((first_stage_model|vae)\.)?(encoder|decoder|quant_conv|post_quant_conv)\.",
    "text_encoder": r"(cond_stage_model|conditioner\.embedders\.0)\.transformer\.text_model\."
    r"(?!embeddings\.position_ids$)"
    r"|cond_stage_model\.model\.(?!logit_scale$|text_projection$|transformer\.resblocks\.23\.)",
    "text_encoder_2": r"conditioner\.embedders\.1\.model\.(?!logit_scale$)",
}
# What some files hold beside a text encoder, and no model reads.
_UNREAD = (
    ".position_ids",
    ".logit_scale",
    ".text_projection.weight",
    ".embed_tokens.weight",
    ".spiece_model",
)
_SCALED = ("scaled_fp8", ".scale_weight", ".weight_scale")  # 8 bits, and what to multiply them with
_FUSED = ("in_proj_weight", "in_proj_bias")  # OpenCLIP: three of ours in one
# What checkpoints that predict a velocity, or start from pure noise, carry to say so.
_MARKS = {"v_pred": "prediction", "ztsnr": "zero_terminal_snr"}


def check(path: Path) -> bool:
    """Check that a file is a whole base in safetensors, without torch and without its weights.

    Returns whether it also holds averaged (EMA) weights, which are not used. Raises UserError for
    a pickle, a damaged file, or one that is no base.
    """
    names = tensor_names(path)
    if not any(name.startswith(_DENOISER) or _BARE.match(name) for name in names):
        held = f"such as {names[0]}" if names else "none at all"
        raise UserError(
            f"{path}: is no base in the original naming: it has no tensors {_DENOISER}*, "
            f"but {len(names)} others, {held}; a LoRA or a part of a model cannot be a base"
        )
    return any(name.startswith(_AVERAGED) for name in names)


def marks(path: Path) -> frozenset[str]:
    """Return which keys of `base` a file answers itself: "prediction", "zero_terminal_snr".

    The first then is v_prediction, the second true.
    """
    return frozenset(key for name, key in _MARKS.items() if name in tensor_names(path))


def default_config(path: Path) -> str:
    """Return the Hub id whose configuration diffusers takes for a file, told from its tensors."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    try:
        found: str = fetch_diffusers_config(_shapes(path))["pretrained_model_name_or_path"]
    except (LookupError, ValueError) as error:  # shapes that no model has
        raise UserError(f"{path}: diffusers cannot tell what model it is: {error!r}") from None
    return found


def load(
    kind: Any, path: Path, configs: Path, name: str, dtype: torch.dtype, key: str = "base.config"
) -> nn.Module:
    """Return a component of the file, with every one of its weights.

    kind: its class; configs: a diffusers folder that describes it in its folder `name`. key: what
    the user would change in the recipe where the two do not belong together.
    Raises UserError where weights are missing, have no place, or are not those of this class.
    """
    from diffusers.loaders import single_file_utils
    from diffusers.utils import logging

    what: dict[str, Any] = {"config": str(configs), "subfolder": name, "torch_dtype": dtype}
    what["local_files_only"] = True
    tensors = _tensors(path, _HELD[name])
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what it warns of is refused below
    try:
        if hasattr(kind, "from_single_file"):
            module: nn.Module = kind.from_single_file(tensors, **what)
        else:
            module = single_file_utils.create_diffusers_clip_model_from_ldm(kind, tensors, **what)
    except NotImplementedError:  # torch's word for moving a weight that was never read
        raise _incomplete(path, name, configs, key) from None
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
            f"is {key} that of this model?"
        ) from None
    finally:
        logging.set_verbosity(verbosity)
    if any(parameter.is_meta for parameter in module.parameters()):
        raise _incomplete(path, name, configs, key)
    # A configuration of fewer layers takes what it needs and leaves the others behind.
    held = sum(3 if tensor.endswith(_FUSED) else 1 for tensor in tensors)
    used = len(module.state_dict())
    if held > used:
        raise UserError(
            f"{path}: holds {held} weights of its {name}, but {configs / name} describes one of "
            f"{used}; set {key} to the one that belongs here"
        )
    return module


def holds(path: Path, what: str | Mapping[str, object]) -> bool:
    """Say whether a file has any tensor of a component: told by its name, or by its tensors'."""
    names = tensor_names(path)
    if isinstance(what, str):
        return any(re.match(_HELD[what], name) for name in names)
    return any(name.removeprefix(_DENOISER) in what for name in names)


def load_rows(
    module: nn.Module,
    table: Mapping[str, Sequence[Piece]],
    path: Path,
    configs: Path,
    name: str,
    dtype: torch.dtype,
) -> nn.Module:
    """Return `module`, which has no weights yet, with those of the file, read one by one.

    table: the file's tensor -> of which of the module's tensors, and which of their rows, it has
    the rows, in order. Raises UserError as `load`.
    """
    import torch

    outline = module.state_dict()
    kept = getattr(module, "_keep_in_fp32_modules", None) or []
    wide = {n for n in outline if dtype == torch.float16 and set(kept) & set(n.split("."))}
    state: dict[str, torch.Tensor] = {}
    with _opened(path) as file:
        held = _named(path, list(file.keys()), table, configs / name)
        for theirs, pieces in table.items():
            whole, start = file.get_tensor(held[theirs]), 0
            if len(whole) != sum(piece.last - piece.first for piece in pieces):
                raise _another(path, name, configs, theirs, whole)
            for piece in pieces:
                ours, like = piece.module, outline[piece.module]
                rows = whole[start : start + piece.last - piece.first]
                start += len(rows)
                if rows.shape[1:] != like.shape[1:]:
                    raise _another(path, name, configs, theirs, whole)
                kind = torch.float32 if ours in wide else dtype
                state.setdefault(ours, torch.empty(like.shape, dtype=kind))
                state[ours][piece.first : piece.last] = rows
    module.load_state_dict(state, strict=False, assign=True)
    tie: Any = getattr(module, "tie_weights", None)
    if tie is not None:
        tie()
    if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
        raise _incomplete(path, name, configs, "base.config")
    return module


def _named(
    path: Path, names: list[str], table: Mapping[str, object], configs: Path
) -> dict[str, str]:
    """Return {name in the table: name in the file}; UserError where they do not belong together."""
    held = {name.removeprefix(_DENOISER): name for name in names}
    if scaled := [name for name in names if name.endswith(_SCALED)]:
        raise UserError(
            f"{path}: its weights are scaled to 8 bits ({scaled[0]}), which tunekit does not read: "
            "take the file in bf16 or fp16, and base.quantize to hold it in 8 bits"
        )
    tops = {_top(name) for name in table}
    strange = sorted(
        n for n in held.keys() - table.keys() if _top(n) in tops and not n.endswith(_UNREAD)
    )
    if strange:
        raise UserError(
            f"{path}: {configs} has no place for {len(strange)} of its weights, such as "
            f"{strange[0]}; set base.config to the one that belongs here"
        )
    if missing := sorted(table.keys() - held.keys()):
        raise UserError(
            f"{path}: lacks {len(missing)} of the weights that {configs} describes, such as "
            f"{missing[0]}; the file is incomplete, or base.config is of another model"
        )
    return held


def _top(name: str) -> str:
    """Return what tells a component's tensors from those of others."""
    part = re.match(r"text_encoders\.[^.]+\.|[^.]+", name)
    return part[0] if part else name


def _another(path: Path, name: str, configs: Path, tensor: str, found: torch.Tensor) -> UserError:
    return UserError(
        f"{path}: its {name} cannot be loaded as {configs / name} describes it: {tensor} is "
        f"{list(found.shape)}; is base.config that of this model?"
    )


def _incomplete(path: Path, name: str, configs: Path, key: str) -> UserError:
    return UserError(
        f"{path}: weights of its {name} are missing, as {configs / name} describes it; the file is "
        f"incomplete, or {key} is of another model"
    )


def _tensors(path: Path, wanted: str) -> dict[str, torch.Tensor]:
    """Return the tensors whose names the pattern fits; the file is several times as large."""
    with _opened(path) as file:
        names = list(file.keys())
        return {name: file.get_tensor(name) for name in names if re.match(wanted, name)}


def _shapes(path: Path) -> dict[str, torch.Tensor]:
    """Return every tensor without its numbers."""
    import torch

    with _opened(path) as file:
        shapes = {name: file.get_slice(name).get_shape() for name in list(file.keys())}
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError, LookupError) as error:
        raise UserError(f"{path}: is damaged: {' '.join(str(error).split())[:300]}") from None
