"""A base with what trains in it, in shapes alone: built from configurations, no weight is read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tunekit import adapters, families, quantize, words
from tunekit.changes.rows import AddedRows
from tunekit.optim import ParameterGroup
from tunekit.plan.heap import Heap
from tunekit.plan.ledger import Ledger, hollow

if TYPE_CHECKING:
    from tunekit.adapters import Adapter
    from tunekit.families import Family
    from tunekit.recipe import Recipe


@dataclass(frozen=True)
class Outline:
    """A family whose tensors have no content, with the recipe's adapter and words attached.

    base: each component's bytes by number format, before anything was attached. adapter: None
    where words alone train. trained: the parameters that train, by the names an
    adapter gives them; the first part of a name is the component. groups: the same for an
    optimizer. components: by diffusers names.
    """

    family: Family
    base: Mapping[str, Mapping[str, int]]
    adapter: Adapter | None
    trained: Mapping[str, Tensor]
    groups: list[ParameterGroup]
    components: Mapping[str, nn.Module]
    mode: FakeTensorMode

    @classmethod
    def of(cls, recipe: Recipe) -> Outline:
        """Build what a recipe trains. Raises UserError as loading and attaching do."""
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with told_before():
            # Narrow weights have shapes of their own; what is computed with them has not.
            family = families.load(recipe.base.model_copy(update={"quantize": None}), "meta")
        base = {name: _formats(module) for name, module in family.components().items()}
        if recipe.base.quantize is not None:
            whole = [n for n, m in family.components().items() if m is family.denoiser]
            base[whole[0]] = _narrow(family.denoiser, recipe.base.quantize)
        adapter, trained, groups = None, dict[str, Tensor](), list[ParameterGroup]()
        if recipe.adapter is not None:
            settings = recipe.adapter
            if "init" in type(settings).model_fields:
                # Some starts need the weights; where numbers start changes no shape.
                usual = type(settings).model_fields["init"].default
                settings = settings.model_copy(update={"init": usual})
            adapter = adapters.get(settings.kind).attach(family, settings, recipe.train.seed)
            trained |= adapter.trained()
            groups += adapter.parameter_groups()
        own = _add_words(family, recipe)
        trained |= {name: parameter for name, (_, parameter) in own.items()}
        groups += [group for group, _ in own.values()]
        components = family.components()
        now = hollow(components, mode)
        family.device = torch.device("cpu")
        return cls(
            family,
            base,
            adapter,
            {name: now(parameter) for name, parameter in trained.items()},
            [replace(g, parameters=[now(p) for p in g.parameters]) for g in groups],
            components,
            mode,
        )

    @property
    def denoiser(self) -> str:
        """The denoiser's diffusers name."""
        found = [n for n, module in self.components.items() if module is self.family.denoiser]
        return found[0]

    def changed(self) -> list[int]:
        """Return the bytes of each weight that an adapter changes."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        found = []
        for module in self.components.values():
            for layer in module.modules():
                if isinstance(layer, BaseTunerLayer):
                    weight: Any = layer.get_base_layer().weight
                    found.append(weight.numel() * weight.element_size())
        return found or self.sizes()

    def sizes(self) -> list[int]:
        """Return the bytes of each parameter that trains."""
        return [p.numel() * p.element_size() for p in self.trained.values()]

    def counts(self) -> dict[str, int]:
        """Return how many numbers train, by component."""
        found: dict[str, int] = {}
        for name, parameter in self.trained.items():
            component = name.partition(".")[0]
            found[component] = found.get(component, 0) + parameter.numel()
        return found

    def ledger(self, heap: Heap | None) -> Ledger:
        """Return a ledger that knows the frozen weights; what trains is written down as kept."""
        weights, ours = {}, {id(parameter) for parameter in self.trained.values()}
        mine = {p.untyped_storage()._cdata: ("", 0) for p in self.trained.values()}
        for component, module in self.components.items():
            for tensor in (*module.parameters(), *module.buffers()):
                if id(tensor) not in ours:
                    storage = tensor.untyped_storage()
                    weights[storage._cdata] = (component, storage.nbytes())
        return Ledger(mine | weights, heap)


def _formats(module: nn.Module) -> dict[str, int]:
    found: dict[str, int] = {}
    for parameter in module.parameters():
        kind = str(parameter.dtype).removeprefix("torch.")
        found[kind] = found.get(kind, 0) + parameter.numel() * parameter.element_size()
    return found


def _narrow(module: nn.Module, kind: str) -> dict[str, int]:
    """Return a denoiser's bytes by format where its Linears are quantised."""
    found = _formats(module)
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, linear in module.named_modules():
        if type(linear) is not nn.Linear or kept & {*name.split(".")}:
            continue
        weight = linear.weight
        if quantize.pays(weight.shape, kind):
            wide = str(weight.dtype).removeprefix("torch.")
            found[wide] -= weight.numel() * weight.element_size()
            found[kind] = found.get(kind, 0) + quantize.bytes_of(weight.shape, kind)
    return found


def _add_words(family: Family, recipe: Recipe) -> dict[str, tuple[ParameterGroup, Tensor]]:
    """Put rows for the recipe's new words beside the tables, as tokens.py does with weights."""
    found: dict[str, tuple[ParameterGroup, Tensor]] = {}
    counts = {token.name: token.vectors for token in recipe.tokens}
    for encoder, tokenizer in dict(family.tokenizers).items() if counts else ():
        whole: Any = family.text_encoders[encoder]
        table = whole.get_input_embeddings()
        width = table.weight.shape[1]
        rows = [torch.empty(t.vectors, width, device="meta") for t in recipe.tokens]
        added = AddedRows(table, len(tokenizer), rows, rows)
        whole.set_input_embeddings(added)
        family.use_tokenizer(encoder, words.with_words(tokenizer, counts))
        for token, parameter in zip(recipe.tokens, added.words, strict=True):
            group = ParameterGroup(
                f"token {token.name}", [parameter], peak=token.learning_rate, rows=True
            )
            found[f"tokens.{encoder}.{token.name}"] = (group, parameter)
    return found


@contextlib.contextmanager
def told_before() -> Iterator[None]:
    """Hold back what the libraries say of weights that are not there."""
    import diffusers

    logging: Any = diffusers.utils.logging
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
