"""What a recipe's new words say against its other keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from tunekit import schema
from tunekit.recipe_source import Fault, Source


def word_faults(source: Source) -> Iterator[Fault]:
    """Yield what contradicts `tokens`, or is said of an adapter that is not there."""
    tree = source.tree
    if tree.get("adapter") is None:
        yield from _without_adapter(source)
    try:
        listed = tree.get("tokens") or ()
        tokens = [schema.Token.model_validate(item) for item in listed]
    except (ValidationError, TypeError):
        return  # listed already
    if tokens:
        yield from _against_data(source, tokens)
        yield from _against_training(source, tokens)


def _without_adapter(source: Source) -> Iterator[Fault]:
    if not source.tree.get("tokens"):
        return  # that is a fault of its own
    if _section(source, "train").get("text_encoder_learning_rate") is not None:
        problem = "is set, but no adapter trains a text encoder: the words' is tokens.learning_rate"
        yield source.fault(("train", "text_encoder_learning_rate"), problem)
    if _section(source, "export").get("layouts") is not None:
        problem = "says how an adapter is written, and there is none: leave it out"
        yield source.fault(("export", "layouts"), problem)


def _against_data(source: Source, tokens: list[schema.Token]) -> Iterator[Fault]:
    data = _section(source, "data")
    trigger = data.get("trigger")
    names = [token.name for token in tokens]
    if isinstance(trigger, str) and not any(name in trigger.lower() for name in names):
        problem = (
            f'"{trigger}" says none of the tokens ({", ".join(names)}), so that no sample or score '
            f"would show them: set trigger: {names[0]}"
        )
        yield source.fault(("data", "trigger"), problem)
    prior = data.get("prior")
    prompts = prior.get("prompts") if isinstance(prior, dict) else None
    for text in prompts if isinstance(prompts, list) else ():
        said = [name for name in names if isinstance(text, str) and name in text.lower()]
        if said:
            problem = f'"{text}" says {said[0]}, which the untouched base does not know'
            yield source.fault(("data", "prior", "prompts"), problem)


def _against_training(source: Source, tokens: list[schema.Token]) -> Iterator[Fault]:
    if source.tree.get("adapter") is None and all(token.stop_at < 1 for token in tokens):
        last = max(range(len(tokens)), key=lambda at: tokens[at].stop_at)
        problem = (
            f"{tokens[last].stop_at:g} leaves nothing to train in the last steps, because there is "
            "no adapter: leave it out, and lower train.steps"
        )
        yield source.fault(("tokens", last, "stop_at"), problem)
    if _section(source, "train").get("optimizer") == "schedulefree_adamw":
        for at, token in enumerate(tokens):
            if token.keep_norm:
                problem = (
                    "contradicts schedulefree_adamw, whose averages would not keep the length that "
                    "is set: leave it out, or choose adamw"
                )
                yield source.fault(("tokens", at, "keep_norm"), problem)


def _section(source: Source, name: str) -> Mapping[str, Any]:
    found = source.tree.get(name)
    return found if isinstance(found, dict) else {}
