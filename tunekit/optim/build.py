"""From an optimizer's name in the recipe to the optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tunekit.errors import UserError, did_you_mean
from tunekit.schema_train import NO_BETAS

if TYPE_CHECKING:
    from torch import nn
    from torch.optim import Optimizer

    from tunekit.schema import Train

RateKey = Literal["learning_rate", "text_encoder_learning_rate"]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate: `scale` times what the recipe's key `rate` says.

    peak: their own peak rate instead. rows: vectors that stand beside each other and are no matrix.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    rate: RateKey = "learning_rate"
    scale: float = 1.0
    peak: float | None = None
    rows: bool = False

    def rate_in(self, train: Train) -> float:
        """Return the peak learning rate under a recipe's settings."""
        return self.peak if self.peak is not None else peak_rate(train, self.rate) * self.scale


@dataclass(frozen=True)
class _Kind:
    """An optimizer by name: where it is from, and what this project passes to it.

    `ours` may be changed by the recipe's optimizer_args, `fixed` may not.
    """

    module: str
    name: str
    ours: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


# AdamW: Loshchilov & Hutter 2019, "Decoupled Weight Decay Regularization". 8 bit: Dettmers et al.
# 2022, "8-bit Optimizers via Block-wise Quantization". Adafactor: Shazeer & Stern 2018. Lion: Chen
# et al. 2023. Prodigy: Mishchenko & Defazio 2024. Schedule-free: Defazio et al. 2024, "The Road
# Less Scheduled". CAME: Luo et al. 2023. Muon: Jordan et al. 2024, with the update scaled as AdamW
# would have it (Liu et al. 2025, "Muon is Scalable"), so that one rate serves both halves.
_KINDS: dict[str, _Kind] = {
    # One kernel for all tensors: an adapter is hundreds of small ones.
    "adamw": _Kind("torch.optim", "AdamW", {"fused": True}),
    "adamw8bit": _Kind("bitsandbytes.optim", "AdamW8bit"),
    "paged_adamw8bit": _Kind("bitsandbytes.optim", "PagedAdamW8bit"),
    "lion": _Kind("pytorch_optimizer", "Lion"),
    "lion8bit": _Kind("bitsandbytes.optim", "Lion8bit"),
    "adafactor": _Kind(
        "transformers.optimization",
        "Adafactor",
        {"scale_parameter": False},
        {"relative_step": False, "warmup_init": False},  # else it ignores the recipe's rate
    ),
    "prodigy": _Kind("pytorch_optimizer", "Prodigy"),
    "schedulefree_adamw": _Kind("pytorch_optimizer", "ScheduleFreeAdamW"),
    "came": _Kind("pytorch_optimizer", "CAME"),
    "muon": _Kind("torch.optim", "Muon", {"adjust_lr_fn": "match_rms_adamw"}),
}
# Parameters that are no matter of taste: they break training, or repeat a choice made by name.
_NEVER = frozenset(
    "self params maximize capturable differentiable args optim_bits is_paged".split()
)


def peak_rate(train: Train, rate: RateKey) -> float:
    """Return the peak learning rate that `rate` stands for; a null one is `learning_rate`'s."""
    value: float | None = getattr(train, rate)
    return train.learning_rate if value is None else value


def build_optimizer(train: Train, groups: Sequence[ParameterGroup]) -> Optimizer:
    """Return the optimizer of the recipe over `groups`, each with its own peak learning rate.

    Building it is the check of `train.optimizer_args`, and takes no time: its state comes with the
    first step. Raises UserError that names every parameter it does not know or take, the extra to
    install, or what it cannot do.
    """
    assert groups, "nothing trains"
    assert all(group.parameters for group in groups), "an empty parameter group"
    made = [{"params": list(g.parameters), "lr": g.rate_in(train), "name": g.name} for g in groups]
    if train.optimizer == "prodigy" and len({group["lr"] for group in made} - {0.0}) > 1:
        rates = ", ".join(f"{group['name']} {group['lr']:g}" for group in made)
        raise UserError(
            "train.optimizer: prodigy finds one rate for all that trains; it cannot keep different "
            f"ones ({rates}): give them the same, or choose adamw"
        )
    if train.fused_backward:
        return _each_alone(train, made, {id(p) for g in groups if g.rows for p in g.parameters})
    if train.optimizer == "muon":
        return _muon(train, made, {id(p) for g in groups if g.rows for p in g.parameters})
    return _make(train, train.optimizer, made, train.optimizer_args)


def check_optimizer(train: Train) -> None:
    """Refuse what can be told before anything is loaded: a missing package, unknown parameters.

    Raises UserError; `build_optimizer` finds the rest.
    """
    _checked(train.optimizer, train.optimizer, train.optimizer_args)


def notes(train: Train, device: str) -> list[str]:
    """Return what is worth telling of the optimizer on a device of this type ("cpu", "cuda")."""
    if train.optimizer == "paged_adamw8bit" and device == "cpu":
        return ["train.optimizer: without a GPU there is nothing to page; it is adamw8bit here"]
    return []


def _muon(train: Train, groups: list[dict[str, Any]], rows: set[int]) -> Optimizer:
    """Return Muon for the matrices and AdamW for the rest, to which the ids in `rows` belong."""
    from tunekit.optim.joined import Joined

    def part(wanted: Callable[[nn.Parameter], bool]) -> list[dict[str, Any]]:
        parts = [{**g, "params": [p for p in g["params"] if wanted(p)]} for g in groups]
        return [g for g in parts if g["params"]]

    def is_matrix(parameter: nn.Parameter) -> bool:
        return parameter.ndim == 2 and id(parameter) not in rows

    matrices, rest = part(is_matrix), part(lambda p: not is_matrix(p))
    if not matrices:
        raise UserError(
            "train.optimizer: muon trains matrices, and nothing that trains here is one: choose "
            "adamw"
        )
    made = [_make(train, "muon", matrices, train.optimizer_args)]
    return Joined([*made, _make(train, "adamw", rest, {})] if rest else made)


def _each_alone(train: Train, groups: list[dict[str, Any]], rows: set[int]) -> Optimizer:
    """Return an optimizer for each parameter, joined, so that each can step by itself."""
    from tunekit.optim.joined import Joined

    made = []
    for group in groups:
        for parameter in group["params"]:
            matrix = parameter.ndim == 2 and id(parameter) not in rows
            name = "adamw" if train.optimizer == "muon" and not matrix else train.optimizer
            args = train.optimizer_args if name == train.optimizer else {}
            made.append(_make(train, name, [{**group, "params": [parameter]}], args))
    return Joined(made)


def _make(
    train: Train, name: str, groups: list[dict[str, Any]], args: Mapping[str, Any]
) -> Optimizer:
    on_cpu = all(p.device.type == "cpu" for group in groups for p in group["params"])
    # There are no pages without a GPU, and bitsandbytes would warn of it at the first step.
    name = "adamw8bit" if name == "paged_adamw8bit" and on_cpu else name
    kind, made = _KINDS[name], _checked(train.optimizer, name, args)
    passed = {**kind.ours, **_tuples(args), **kind.fixed, "weight_decay": train.weight_decay}
    if train.betas is not None and name not in (*NO_BETAS, "muon"):
        passed["betas"] = train.betas
    if passed.get("foreach") and passed.get("fused"):
        del passed["fused"]
    # transformers' Adafactor wants the rate of the first group as well, to check its settings.
    passed["lr"] = groups[0]["lr"]
    try:
        optimizer: Optimizer = made(groups, **passed)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        line = " ".join(str(error).split())
        raise UserError(
            f"train.optimizer: {train.optimizer} does not take these settings: {line}"
        ) from None
    return optimizer


def _checked(said: str, name: str, args: Mapping[str, Any]) -> Any:
    """Return the optimizer's class, which takes `args`; `said` is what the recipe calls it."""
    made = _load(said, _KINDS[name])
    _check_args(said, args, inspect.signature(made.__init__).parameters, _KINDS[name])
    return made


def _load(name: str, kind: _Kind) -> Any:
    import importlib

    try:
        return getattr(importlib.import_module(kind.module), kind.name)
    except ModuleNotFoundError as error:
        package = kind.module.partition(".")[0]
        if error.name != package:
            raise
        raise UserError(
            f"train.optimizer: {name} needs the package {package}: "
            "pip install 'tunekit[optimizers]'"
        ) from None


def _check_args(
    name: str, args: Mapping[str, Any], known: Mapping[str, inspect.Parameter], kind: _Kind
) -> None:
    """Refuse parameters that the optimizer does not have, or values of another sort."""
    keys = {"lr", "weight_decay", "warmup_steps"} | (set() if name in NO_BETAS else {"betas"})
    hidden = _NEVER | keys | kind.fixed.keys()
    own = {
        word: parameter
        for word, parameter in known.items()
        if word not in hidden and parameter.kind is not inspect.Parameter.VAR_KEYWORD
    }
    faults = []
    for word, value in args.items():
        place = f"train.optimizer_args.{word}"
        if word not in own:
            there = did_you_mean(word, own) or f"; it has: {', '.join(own)}"
            faults.append(f"{place}: {name} has no such parameter{there}")
        elif wanted := _other_sort(value, own[word].default):
            faults.append(f"{place}: must be {wanted}, not {value!r}")
    if faults:
        raise UserError("\n".join(faults))


def _other_sort(value: Any, default: Any) -> str | None:
    """Return what a value should be, judged by the default; None where it may well be."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int | float):
        return None if number else "a number"
    if isinstance(default, tuple):
        fits = isinstance(value, list) and len(value) == len(default)
        return None if fits else f"a list of {len(default)} numbers"
    return None


def _tuples(args: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in args.items()}
