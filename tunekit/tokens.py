"""New words that train: rows beside a frozen embedding table (textual inversion).

Gal et al. 2023, "An Image is Worth One Word". With an adapter beside them it is pivotal tuning
(Roich et al. 2021, as LoRA trainers use the name). Both keep the contract of an adapter, so that
the loop, checkpoints, samples and export need not know which of them trains.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tunekit import adapters, seeding, words
from tunekit import embeddings as files
from tunekit.adapters.base import Adapter
from tunekit.changes.rows import AddedRows
from tunekit.checkpoint import read_safetensors
from tunekit.errors import UserError
from tunekit.optim import ParameterGroup
from tunekit.schema_tokens import RANDOM, Token

if TYPE_CHECKING:
    from typing import Self

    from tunekit.families.base import Family
    from tunekit.schema import AdapterSettings

# The least that a vector must have turned, as a share of its length: AdamW's weight decay makes
# one shorter that learned nothing, but turns none; rounding turns it by about 1e-7.
LEAST_TURN = 1e-5


def attach(
    family: Family,
    settings: AdapterSettings | None,
    tokens: Sequence[Token],
    class_noun: str,
    seed: int,
) -> Adapter:
    """Put what a recipe lets change into `family`: an adapter, new words, or both.

    class_noun: where words start that are not told where. Raises UserError as both do; nothing is
    left attached then.
    """
    assert settings is not None or tokens, "nothing to train"
    adapter = None
    if settings is not None:
        adapter = adapters.get(settings.kind).attach(family, settings, seed)
    if not tokens:
        assert adapter is not None
        return adapter
    try:
        own = Tokens.attach(family, (tokens, class_noun), seed)
    except UserError:
        if adapter is not None:
            adapter.detach()
        raise
    return own if adapter is None else Together(adapter, own)


def words_of(adapter: Adapter) -> Tokens | None:
    """Return the new words in what `attach` returned."""
    if isinstance(adapter, Together):
        return adapter.tokens
    return adapter if isinstance(adapter, Tokens) else None


def adapter_of(adapter: Adapter) -> Adapter | None:
    """Return what is beside the new words in what `attach` returned."""
    if isinstance(adapter, Together):
        return adapter.adapter
    return None if isinstance(adapter, Tokens) else adapter


class Tokens(Adapter):
    """New words in every text encoder of a family; nothing else of the base can change."""

    def __init__(
        self,
        family: Family,
        tokens: Sequence[Token],
        class_noun: str,
        tables: Mapping[str, AddedRows],
        former: Mapping[str, Any],
    ) -> None:
        self._family, self._tokens, self._class_noun = family, tuple(tokens), class_noun
        self._tables, self._former = dict(tables), dict(former)
        self._parameters = {
            (encoder, token.name): parameter
            for encoder, table in tables.items()
            for token, parameter in zip(tokens, table.words, strict=True)
        }
        self._starts = {key: p.detach().clone() for key, p in self._parameters.items()}
        self._norms = {e: _mean_norm(_weight(table)) for e, table in tables.items()}
        self.train(False)

    @classmethod
    def attach(cls, family: Family, settings: Any, seed: int) -> Self:
        """Put new words beside the vocabulary: settings are (tokens, class noun)."""
        tokens, class_noun = settings
        counts = {token.name: token.vectors for token in tokens}
        former, encoders = dict(family.tokenizers), family.text_encoders
        if not former:
            raise UserError(f"tokens: {family.label} is of a family that learns no new words")
        made = {}
        for encoder, tokenizer in former.items():
            inner = _embedding(encoders[encoder])
            weight = _weight(inner)
            firsts, zeros = [], []
            for token in tokens:
                purpose = f"tokens/{encoder}/{token.name}"
                place = _Place(family, encoder, tokenizer, weight)
                first = place.start(token, class_noun, seeding.generator(seed, purpose))
                zero = place.zero(token.vectors, token.start_words(class_noun))
                if token.keep_norm:
                    first = _of_norm(first, _mean_norm(weight))
                firsts.append(first.to(weight.device))
                zeros.append(zero.to(weight.device))
            made[encoder] = AddedRows(inner, len(tokenizer), firsts, zeros)
        for encoder, table in made.items():
            _set_embedding(encoders[encoder], table)
            family.use_tokenizer(encoder, words.with_words(former[encoder], counts))
        return cls(family, tokens, class_noun, made, former)

    @property
    def trains_text_encoder(self) -> bool:
        return True  # its input, so that prompts are encoded anew in every step

    def trained(self) -> dict[str, nn.Parameter]:
        return {f"tokens.{encoder}.{name}": p for (encoder, name), p in self._parameters.items()}

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup(
                f"token {token.name}",
                [p for (_, name), p in self._parameters.items() if name == token.name],
                peak=token.learning_rate,
                rows=True,
            )
            for token in self._tokens
        ]

    def begin_step(self, step: int, steps: int) -> None:
        for token in self._tokens:
            learns = step < max(1, round(token.stop_at * steps))
            for (_, name), parameter in self._parameters.items():
                if name == token.name:
                    # Without a gradient no optimizer touches it, whatever it remembers.
                    parameter.requires_grad_(learns)
                    parameter.grad = parameter.grad if learns else None

    @torch.no_grad()
    def end_step(self) -> None:
        for token in self._tokens:
            for (encoder, name), parameter in self._parameters.items():
                if token.keep_norm and name == token.name and parameter.requires_grad:
                    parameter.copy_(_of_norm(parameter, self._norms[encoder]))

    def vectors(self) -> dict[str, dict[str, Tensor]]:
        """Return each word's vectors by what files call its text encoders: float32 CPU copies."""
        keys = self._family.embedding_keys
        found: dict[str, dict[str, Tensor]] = {token.name: {} for token in self._tokens}
        for (encoder, name), parameter in self._parameters.items():
            rows = parameter.detach().float().cpu().clone()
            found[name][keys.get(encoder, files.ONE)] = rows
        return found

    def unmoved(self) -> list[str]:
        """Return, in words, each vector that points where it pointed before the first step."""
        told = []
        for (encoder, name), parameter in self._parameters.items():
            start, now = self._starts[encoder, name].double(), parameter.detach().double()
            along = (now * start).sum(1) / (start * start).sum(1).clamp(min=1e-300)
            turned = (now - along.unsqueeze(1) * start).norm(dim=1)
            still = turned <= LEAST_TURN * now.norm(dim=1).clamp(min=1e-12)
            where = f" in {encoder}" if len(self._tables) > 1 else ""
            told += [
                f"vector {number} of {name}{where}"
                for number, flag in enumerate(still.tolist(), 1)
                if flag
            ]
        return told

    def export_state(self, layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the words as they stand in a bundle, whatever the layout of the adapter there."""
        tensors: dict[str, Tensor] = {}
        for word, rows in self.vectors().items():
            tensors |= files.bundled(word, rows)
        return tensors, self.facts()

    def facts(self) -> dict[str, str]:
        """Return what metadata says of the words."""
        known = ((t.name, t.start_words(self._class_noun)) for t in self._tokens)
        starts = {name: start for name, start in known if start is not None}
        counts = {token.name: token.vectors for token in self._tokens}
        told = {"tunekit.words": json.dumps(counts, ensure_ascii=False)}
        return told | ({files.STARTS: json.dumps(starts, ensure_ascii=False)} if starts else {})

    def changes(self) -> dict[str, Callable[[Family], Tensor]]:
        """Return what gives each word's vectors: what the base has none of."""
        found: dict[str, Callable[[Family], Tensor]] = {}
        for encoder, table in self._tables.items():
            rows, at = table.rows().detach().float().cpu().clone(), 0
            for token in self._tokens:
                own = rows[at : at + token.vectors]
                found[f"{encoder}/{token.name}"] = partial(_whichever, own)
                at += token.vectors
        return found

    def set_scale(self, scale: float) -> None:
        """Draw with the vectors between where their words started (0) and what they learned (1).

        Words that started at no words of the base go from the vocabulary's mean.
        """
        for table in self._tables.values():
            table.scale = scale

    def train(self, mode: bool = True) -> None:
        """Nothing differs; which words learn in a step is told by `begin_step`."""

    def detach(self) -> None:
        encoders = self._family.text_encoders
        for encoder, table in self._tables.items():
            own = _embedding(encoders[encoder])
            assert own is table, "other words were put on top"
            _set_embedding(encoders[encoder], table.table)
            self._family.use_tokenizer(encoder, self._former[encoder])
        self._tables = {}


class Together(Adapter):
    """An adapter and new words that train as one: pivotal tuning."""

    def __init__(self, adapter: Adapter, tokens: Tokens) -> None:
        self.adapter, self.tokens = adapter, tokens

    @classmethod
    def attach(cls, family: Family, settings: Any, seed: int) -> Self:
        """Attach both: settings are (adapter settings, tokens, class noun)."""
        chosen, tokens, class_noun = settings
        both = attach(family, chosen, tokens, class_noun, seed)
        assert isinstance(both, cls)
        return both

    @property
    def trains_text_encoder(self) -> bool:
        return True

    def trained(self) -> dict[str, nn.Parameter]:
        return self.adapter.trained() | self.tokens.trained()

    def parameter_groups(self) -> list[ParameterGroup]:
        return [*self.adapter.parameter_groups(), *self.tokens.parameter_groups()]

    def export_state(self, layout: str) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return both in one file: a bundle."""
        tensors, facts = self.adapter.export_state(layout)
        rows, told = self.tokens.export_state(layout)
        return tensors | rows, facts | told

    def changes(self) -> dict[str, Callable[[Family], Tensor]]:
        return self.adapter.changes() | self.tokens.changes()

    def set_scale(self, scale: float) -> None:
        self.adapter.set_scale(scale)
        self.tokens.set_scale(scale)

    def train(self, mode: bool = True) -> None:
        self.adapter.train(mode)
        self.tokens.train(mode)

    def begin_step(self, step: int, steps: int) -> None:
        self.adapter.begin_step(step, steps)
        self.tokens.begin_step(step, steps)

    def end_step(self) -> None:
        self.adapter.end_step()
        self.tokens.end_step()

    def detach(self) -> None:
        self.tokens.detach()
        self.adapter.detach()


Together.kind = "adapter and tokens"


class _Place:
    """Where words start in one text encoder: its vocabulary `weight`, [tokens, width]."""

    def __init__(self, family: Family, encoder: str, tokenizer: Any, weight: Tensor) -> None:
        self.family, self.encoder, self.tokenizer = family, encoder, tokenizer
        self.weight = weight.detach().float().cpu()

    def start(self, token: Token, class_noun: str, random: torch.Generator) -> Tensor:
        """Return a word's first vectors, [vectors, width]."""
        if token.init_file is not None:
            return self._from_file(token, Path(token.init_file))
        if token.init == RANDOM:
            deviation, mean = torch.std_mean(self.weight, dim=0)
            drawn = torch.randn(token.vectors, self.weight.shape[1], generator=random)
            return mean + deviation * drawn
        return self.zero(token.vectors, token.init or class_noun)

    def zero(self, vectors: int, start: str | None) -> Tensor:
        """Return the vectors of the words `start`, in turns; the mean of all without one."""
        return start_rows(self.tokenizer, self.weight, vectors, start)

    def _from_file(self, token: Token, path: Path) -> Tensor:
        tensors, metadata = read_safetensors(path)
        found, _ = files.split(path, tensors, metadata)
        if len(found) != 1:
            raise UserError(f"{path}: holds {len(found)} words; init of {token.name} needs one")
        rows = found[0].rows.get(self.family.embedding_keys.get(self.encoder, files.ONE))
        wanted = [token.vectors, self.weight.shape[1]]
        if rows is None or list(rows.shape) != wanted:
            held = "none for this text encoder" if rows is None else list(rows.shape)
            raise UserError(f"{path}: its vectors are {held}; {token.name} needs {wanted}")
        return rows.float()


def start_rows(tokenizer: Any, weight: Tensor, vectors: int, start: str | None) -> Tensor:
    """Return [vectors, width] float32: the vectors of the words `start`, which take turns.

    weight: the vocabulary, [tokens, width]. Without a start: its mean. Raises UserError for words
    that the tokenizer does not know.
    """
    table = weight.detach().float()
    if start is None:
        return table.mean(0).expand(vectors, -1).clone()
    ids = words.known(tokenizer, start)
    return table[[ids[number % len(ids)] for number in range(vectors)]].clone()


def _embedding(encoder: Any) -> nn.Module:
    table: nn.Module = encoder.get_input_embeddings()
    return table


def _set_embedding(encoder: Any, table: nn.Module) -> None:
    encoder.set_input_embeddings(table)


def _weight(table: nn.Module) -> Tensor:
    while isinstance(table, AddedRows):
        table = table.table
    weight = table.weight
    assert isinstance(weight, Tensor)
    return weight


def _mean_norm(weight: Tensor) -> float:
    return float(weight.detach().double().norm(dim=1).mean())


def _of_norm(rows: Tensor, norm: float) -> Tensor:
    scaled: Tensor = rows * (norm / rows.norm(dim=1, keepdim=True).clamp(min=1e-12))
    return scaled


def _whichever(rows: Tensor, family: Family) -> Tensor:
    """Return vectors that are the same for every base."""
    return rows
