"""The recipe: what a run is told, read from YAML or Python and refused whole where it is wrong."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError
from ruamel.yaml import YAML

from tunekit import adapters, families, schema
from tunekit.errors import UserError, did_you_mean
from tunekit.modelfolder import described_here
from tunekit.recipe_faults import explain, nested, shown
from tunekit.recipe_paths import find_paths, sections_at, texts_at
from tunekit.recipe_source import (
    Fault,
    Key,
    RecipeError,
    Source,
    from_file,
    from_mapping,
    from_overrides,
)
from tunekit.recipe_words import word_faults
from tunekit.schedulers import NAMES as SCHEDULERS

__all__ = [
    "Fault",
    "Recipe",
    "RecipeError",
    "dump_yaml",
    "json_schema",
    "load_recipe",
    "recipe_from",
]


NOTHING_TRAINS = (
    "is missing: What may change? `kind` chooses the adapter; or give new words under `tokens`"
)


class Recipe(schema.Section):
    """Everything that decides a run."""

    name: str = Field(
        max_length=100,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Names the run and its folder runs/<name>. Letters, digits, dot, dash and "
        "underscore; at most 100.",
        json_schema_extra=schema.also("output_name", "run_name", "job"),
    )
    base: schema.Base = Field(description="Which model?")
    data: schema.Data = Field(description="Which images, which words?")
    adapter: SerializeAsAny[schema.AdapterSettings] | None = Field(
        None,
        description="What may change? `kind` chooses the adapter; the other keys are its own. "
        "null: the `tokens` alone.",
        json_schema_extra=schema.also("network"),
    )
    tokens: tuple[schema.Token, ...] = Field(
        (),
        strict=False,
        max_length=32,
        description="New words, a list of sections; alone (textual inversion) or beside the "
        "adapter (pivotal tuning).",
        json_schema_extra=schema.also("new_tokens", "embedding", "embeddings"),
    )
    train: schema.Train = Field(default_factory=schema.Train, description="How is it trained?")
    evaluate: schema.Evaluate = Field(
        default_factory=schema.Evaluate,
        description="How do we know?",
        json_schema_extra=schema.also("sample", "validation"),
    )
    export: schema.Export = Field(
        default_factory=schema.Export,
        description="Which files come out?",
        json_schema_extra=schema.also("save"),
    )

    @field_validator("adapter", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or "kind" not in value:
            return value
        types = adapters.settings_types()
        kind = value["kind"]
        if isinstance(kind, str) and kind in types:
            return types[kind].model_validate(dict(value))
        near = did_you_mean(kind, types) if isinstance(kind, str) else ""
        problem = f"must be {' or '.join(types)}, not {shown(kind)}{near}"
        raise _at(("kind",), problem, kind)

    @field_validator("tokens")
    @classmethod
    def _apart(cls, value: tuple[schema.Token, ...]) -> tuple[schema.Token, ...]:
        if found := schema.clashes(value):
            at, problem = found[0]
            raise _at((at, "name"), problem, value[at].name)
        return value

    @model_validator(mode="after")
    def _something_trains(self) -> Recipe:
        if self.adapter is None and not self.tokens:
            raise _at(("adapter",), NOTHING_TRAINS, None)
        return self

    def trains_text_encoder(self) -> bool:
        """Return whether prompts must be encoded anew in every step."""
        return bool(self.tokens) or (
            self.adapter is not None and self.adapter.trains_text_encoder()
        )


def _at(loc: Key, problem: str, value: Any) -> ValidationError:
    """Return the error that a key inside the validated one has `problem`."""
    error = PydanticCustomError("fault", "{problem}", {"problem": problem})
    details = InitErrorDetails(type=error, loc=loc, input=value)
    return ValidationError.from_exception_data("recipe", [details])


def load_recipe(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, what it extends, and ``KEY=VALUE`` overrides.

    Paths in it are looked for in the working directory, in the folder of the file that names them,
    and in the two folders above that (a project keeps recipes in ``recipes/``, and the resolved
    ones in ``runs/NAME/``), in this order.

    Raises RecipeError with every fault found, each with its file and line or its override.
    """
    return _resolve(from_file(Path(path)), overrides)


def recipe_from(
    source: Path | str | Mapping[str, Any] | Recipe, overrides: Sequence[str] = ()
) -> Recipe:
    """Return the recipe in a file, in a mapping with the keys of one, or changed by overrides.

    Raises RecipeError as `load_recipe` does; faults of a mapping are named by their key alone.
    """
    if isinstance(source, Recipe):
        source = source.model_dump()
    if isinstance(source, Mapping):
        return _resolve(from_mapping(source), overrides)
    return load_recipe(source, overrides)


def _resolve(source: Source, overrides: Sequence[str]) -> Recipe:
    for override in from_overrides(overrides):
        source = override.lay_over(source)
    faults = [*source.faults, *source.secrets()]
    sections = _sections(source.tree)
    faults += find_paths(source, sections)
    recipe = None
    try:
        recipe = Recipe.model_validate(source.tree)
    except ValidationError as exc:
        noted = {(fault.place, fault.key) for fault in faults}
        faults += [f for f in explain(exc, source, sections) if (f.place, f.key) not in noted]
    faults += _contradictions(source, {fault.key for fault in faults})
    if faults:
        raise RecipeError(faults)
    assert recipe is not None
    return recipe


def _sections(tree: Mapping[str, Any]) -> dict[str, type[schema.Section]]:
    """Return the sections by dotted key, '' being the recipe; the adapter's is that of its kind."""
    settings: type[schema.Section] = schema.AdapterSettings
    adapter = tree.get("adapter")
    if isinstance(adapter, Mapping) and isinstance(adapter.get("kind"), str):
        settings = adapters.settings_types().get(adapter["kind"], settings)
    own: dict[str, type[schema.Section]] = {
        "": Recipe,
        "base": schema.Base,
        "data": schema.Data,
        "adapter": settings,
        "tokens": schema.Token,
        "train": schema.Train,
        "evaluate": schema.Evaluate,
        "export": schema.Export,
    }
    return nested(own)


def _contradictions(source: Source, faulty: set[str]) -> Iterator[Fault]:
    """Yield what keys of different sections, or the files they name, say against each other."""
    tree = source.tree
    base, data, train, evaluate = (tree.get(n) for n in ("base", "data", "train", "evaluate"))
    if isinstance(data, dict):
        yield from _holdout(source, data, faulty)
    if isinstance(train, dict) and train.get("text_encoder_learning_rate") is not None:
        yield from _text_encoder(source)
    if isinstance(tree.get("export"), dict):
        yield from _layouts(source, tree["export"].get("layouts"))
    if isinstance(train, dict) and train.get("fused_backward") is True:
        yield from _fused(source, data)
    if isinstance(train, dict) and train.get("fsdp") is True:
        yield from _in_parts(source)
    yield from word_faults(source)
    if isinstance(base, dict):
        yield from _quantize(source, base.get("quantize"))
        yield from _family(source, base, data if isinstance(data, dict) else {}, faulty)
    if isinstance(evaluate, dict):
        yield from _scheduler(source, evaluate)
        yield from _negative_prompt(source, evaluate)


def _holdout(source: Source, data: Mapping[str, Any], faulty: set[str]) -> Iterator[Fault]:
    holdout = data.get("holdout")
    paths = [text for _, text in texts_at((), data.get("source"))]
    paths += [part["path"] for _, part in sections_at(data.get("source"), []) if "path" in part]
    if not isinstance(holdout, str):
        return
    if source.inherits(("data", "holdout"), ("data", "source")):
        problem = (
            "is set here, but data.holdout is still that of other pictures "
            f"({source.place(('data', 'holdout'))}): set data.holdout to pictures of this subject "
            "kept apart, or to null"
        )
        yield source.fault(("data", "source"), problem)
        return
    if "data.holdout" in faulty or any(key.startswith("data.source") for key in faulty):
        return
    for path in paths:
        trained, held = Path(str(path)).resolve(), Path(holdout).resolve()
        if held.is_relative_to(trained) or trained.is_relative_to(held):
            how = "is the same folder as" if trained == held else "overlaps with"
            problem = f'"{holdout}" {how} data.source: held-out pictures must never be trained on'
            yield source.fault(("data", "holdout"), problem)


def _text_encoder(source: Source) -> Iterator[Fault]:
    settings = _sections(source.tree)["adapter"]
    try:
        adapter = settings.model_validate(source.tree.get("adapter"))
    except ValidationError:
        return  # its own faults are listed already
    assert isinstance(adapter, schema.AdapterSettings)
    if not adapter.trains_text_encoder():
        problem = "is set, but the adapter trains no text encoder: leave it out"
        yield source.fault(("train", "text_encoder_learning_rate"), problem)


def _layouts(source: Source, layouts: Any) -> Iterator[Fault]:
    """Hold the layouts asked for to what they can carry, before anything is trained."""
    try:
        adapter = _sections(source.tree)["adapter"].model_validate(source.tree.get("adapter"))
        asked = schema.Export.model_validate({"layouts": layouts}).layouts
    except ValidationError:
        return  # its own faults are listed already
    assert isinstance(adapter, schema.AdapterSettings)
    for layout in asked or ():
        if problem := adapter.layout_fault(layout):
            yield source.fault(("export", "layouts"), problem)


def _fused(source: Source, data: Any) -> Iterator[Fault]:
    if isinstance(data, dict) and data.get("prior") is not None:
        problem = (
            "takes its steps after the pictures of the subject, before those of the class "
            "(data.prior) are seen: leave one of them out"
        )
        yield source.fault(("train", "fused_backward"), problem)


def _in_parts(source: Source) -> Iterator[Fault]:
    """Hold what trains to what several processes can hold in parts."""
    try:
        adapter = _sections(source.tree)["adapter"].model_validate(source.tree.get("adapter"))
    except ValidationError:
        adapter = None  # there is none, or its own faults are listed already
    problem = None
    if not (isinstance(adapter, schema.AdapterSettings) and adapter.trains_weights):
        problem = (
            "shares out weights that learn themselves, which this recipe has none of: leave it"
        )
    elif adapter.trains_text_encoder() or source.tree.get("tokens"):
        problem = "shares out the denoiser alone, and a text encoder or words learn too: leave it"
    if problem:
        yield source.fault(("train", "fsdp"), f"{problem} out (--processes works without)")


def _quantize(source: Source, kind: Any) -> Iterator[Fault]:
    """Hold the adapter to what a base of few bits lets learn."""
    try:
        adapter = _sections(source.tree)["adapter"].model_validate(source.tree.get("adapter"))
    except ValidationError:
        return  # there is none, or its own faults are listed already
    assert isinstance(adapter, schema.AdapterSettings)
    if kind in get_args(schema.Quantized) and (problem := adapter.quantize_fault(kind)):
        yield source.fault(("base", "quantize"), problem)


def _family(
    source: Source, base: Mapping[str, Any], data: Mapping[str, Any], faulty: set[str]
) -> Iterator[Fault]:
    """Hold a base on this disk to its own description; a Hub id is only known once fetched."""
    name, sizes = base.get("family"), data.get("resolution")
    if isinstance(name, str) and name not in families.names():
        known = families.names()
        problem = f"must be {' or '.join(known)}, not {shown(name)}{did_you_mean(name, known)}"
        yield source.fault(("base", "family"), problem)
        name = None
    if any(key.startswith("base.") for key in faulty):
        return
    try:
        settings = schema.Base.model_validate(base)
        if not described_here(settings):
            return
        family = families.recognise(families.ModelFolder.open(settings))
    except ValidationError:
        return  # listed already
    except UserError as exc:
        blamed = re.match(r"base\.(\w+): ", str(exc))
        key, problem = (blamed[1], str(exc)[blamed.end() :]) if blamed else ("model", str(exc))
        yield source.fault(("base", key), problem)
        return
    if name is not None and name != family.name:
        problem = f"is {shown(name)}, but {settings.model} is {family.name}"
        yield source.fault(("base", "family"), problem)
    for size in sizes if isinstance(sizes, list) else [sizes]:
        if type(size) is int and "data.resolution" not in faulty and size % family.size_multiple:
            problem = f"must be a multiple of {family.size_multiple} for {settings.model}"
            yield source.fault(("data", "resolution"), f"{problem}, not {size}")


def _scheduler(source: Source, evaluate: Mapping[str, Any]) -> Iterator[Fault]:
    name = evaluate.get("scheduler")
    if not isinstance(name, str) or name.lower() in SCHEDULERS or name.endswith("Scheduler"):
        return
    near = did_you_mean(name, SCHEDULERS)
    problem = f"must be {', '.join(SCHEDULERS)} or a diffusers class name, not {shown(name)}{near}"
    yield source.fault(("evaluate", "scheduler"), problem)


def _negative_prompt(source: Source, evaluate: Mapping[str, Any]) -> Iterator[Fault]:
    guidance, text = evaluate.get("guidance_scale"), evaluate.get("negative_prompt")
    if isinstance(text, str) and text and isinstance(guidance, (int, float)) and guidance <= 1:
        problem = f"does nothing at guidance_scale {guidance:g}: set that above 1, or leave it out"
        yield source.fault(("evaluate", "negative_prompt"), problem)


def dump_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML with every default written out; it loads to an equal recipe.

    Paths stand as they are found from the working directory.
    """
    yaml = YAML()
    yaml.width = 100
    yaml.indent(mapping=2, sequence=4, offset=2)
    text = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json"), text)
    return text.getvalue()


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe file, with every adapter kind's own settings.

    A file that `extends` another may leave any key to it.
    """
    whole = Recipe.model_json_schema()
    sections = whole["$defs"]
    del sections["AdapterSettings"]
    kinds = {}
    for kind, settings in adapters.settings_types().items():
        kinds[kind] = settings.model_json_schema()
        sections |= kinds[kind].pop("$defs", {})
        sections[settings.__name__] = kinds[kind]
    adapter = whole["properties"]["adapter"]
    adapter.pop("$ref", None)
    adapter["anyOf"] = [
        {"$ref": f"#/$defs/{settings.__name__}"} for settings in adapters.settings_types().values()
    ]
    adapter["anyOf"].append({"type": "null"})
    whole["properties"]["extends"] = {
        "type": "string",
        "description": "Another recipe file, relative to this one; what stands here overrides it.",
    }
    needed: dict[str, Any] = {"required": whole.pop("required"), "properties": {}}
    needed["anyOf"] = [{"required": ["adapter"]}, {"required": ["tokens"]}]
    for name, field in Recipe.model_fields.items():
        section = sections.get(getattr(field.annotation, "__name__", ""))
        if section and "required" in section:
            needed["properties"][name] = {"required": section.pop("required")}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **whole,
        "if": {"required": ["extends"]},
        "else": needed,
    }
