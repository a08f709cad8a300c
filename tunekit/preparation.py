"""Everything a run needs, checked and loaded before anything is written.

The cheapest checks come first: pictures, then the judges of the evaluation, then the base.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunekit import prior as prior_pictures
from tunekit.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from tunekit.adapters import Adapter
    from tunekit.data import Batch, Cache, DataSheet, EncodedDataset, Example
    from tunekit.evaluation.measure import Question, Reference
    from tunekit.families import Family
    from tunekit.families.base import Description
    from tunekit.inference import DrawSettings
    from tunekit.progress import Reporter, Ticker
    from tunekit.recipe import Recipe
    from tunekit.schema import Data, Train


@dataclass
class Prepared:
    """What a run starts from.

    idle: the components that training itself does not use. keepers: pictures of the class that
    are trained beside those of the subject; prior: the same, encoded; weight: of their loss.
    """

    device: torch.device
    resolution: int
    sheet: DataSheet
    held_out: DataSheet | None
    family: Family
    dataset: EncodedDataset
    adapter: Adapter
    idle: tuple[str, ...]
    notes: list[str]
    keepers: tuple[Example, ...] = ()
    prior: EncodedDataset | None = None
    weight: float = 1.0

    def batches(self, settings: Train) -> Callable[[int, int], list[Batch]]:
        """Return ``(step, micro) -> batches``: the subject's, and the class's beside it."""
        size, micros = settings.batch_size, settings.gradient_accumulation
        rows = [self.dataset.batches(size, micros)]
        if self.prior is not None:
            rows.append(prior_pictures.weighted(self.prior.batches(size, micros), self.weight))
        return lambda step, micro: [row(step, micro) for row in rows]

    def references(self) -> tuple[list[Reference], list[Reference]]:
        """Return the training pictures and the held-out ones, cut as training cuts them."""
        held_out = _references(self.held_out) if self.held_out else []
        return _references(self.sheet), held_out

    def some_keepers(self, most: int = 12) -> list[Reference]:
        """Return the first of the pictures that keep the class, to be shown."""
        from tunekit.data import open_rgb
        from tunekit.evaluation.measure import Reference

        some = self.keepers[:most]
        return [Reference(kept.name, open_rgb(kept.path), kept.caption) for kept in some]

    def contact_sheets(self) -> list[tuple[str, str]]:
        """Return what training and evaluation saw, as titled HTML for the report."""
        from tunekit.data import contact

        sheets = [("Training pictures", contact.section(self.sheet))]
        if self.held_out is not None:
            sheets.append(("Held out: never trained on", contact.section(self.held_out)))
        return sheets


def question_of(recipe: Recipe) -> Question:
    """Return what the recipe's evaluation asks."""
    from tunekit.evaluation.measure import Question

    return Question(
        kind=recipe.evaluate.kind,
        trigger=recipe.data.trigger,
        class_noun=recipe.data.class_noun,
        prompts=recipe.evaluate.prompts,
        seeds=recipe.evaluate.seeds,
        seed=recipe.train.seed,
    )


def drawing_of(recipe: Recipe, resolution: int) -> DrawSettings:
    """Return how samples and the evaluation's pictures are drawn."""
    from tunekit.inference import DrawSettings

    evaluate = recipe.evaluate
    return DrawSettings(
        steps=evaluate.steps,
        guidance_scale=evaluate.guidance_scale,
        scheduler=evaluate.scheduler,
        negative_prompt=evaluate.negative_prompt,
        width=resolution,
        height=resolution,
    )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Hold back the libraries' own bars and remarks; what matters is told by the run itself."""
    import diffusers
    import transformers

    from tunekit.families.base import PromptCutWarning

    said: list[Any] = [diffusers.utils.logging, transformers.utils.logging]
    levels = [logging.get_verbosity() for logging in said]
    bars = [logging.is_progress_bar_enabled() for logging in said]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PromptCutWarning)
        for logging in said:
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        try:
            yield
        finally:
            for logging, level, bar in zip(said, levels, bars, strict=True):
                logging.set_verbosity(level)
                if bar:
                    logging.enable_progress_bar()


def prepare(recipe: Recipe, reporter: Reporter, cache: Cache | None = None) -> Prepared:
    """Check and load everything; raises UserError, and writes nothing but to the cache.

    cache: where encoded pictures and words are kept; who trains holds it with `using` to the end.
    """
    from tunekit import adapters, families, objective, optim
    from tunekit.data import Cache
    from tunekit.inference import default_device
    from tunekit.train import check_precision

    device = default_device()
    check_precision(device, recipe.train.precision)
    optim.check_optimizer(recipe.train)
    base = families.describe(recipe.base)
    resolutions = recipe.data.resolutions or (base.default_resolution,)
    sheet = _sheet(recipe, base, reporter)
    held_out = _sheet(recipe, base, reporter, recipe.data.holdout) if recipe.data.holdout else None
    _refuse_shared(sheet, held_out)
    _check_judges(recipe)
    family = families.load(recipe.base, device)
    _check_drawing(recipe, family, resolutions)
    objective.check(recipe.train.objective, family.schedule)
    notes = [*sheet.summary(), *_cut_prompts(recipe, family)]
    notes += objective.notes(recipe.train.objective, family.schedule)
    notes += optim.notes(recipe.train, device.type)
    for note in notes:
        reporter.note(note)
    names = tuple(family.text_encoders)
    learns = recipe.adapter.trains_text_encoder()
    cache = cache or Cache(say=reporter.note)
    with cache.using():
        encode = _encoder(recipe, family, sheet.multiple, cache, reporter)
        dataset = encode(sheet.examples, recipe.data, resolutions)
        prior: EncodedDataset | None = None
        keepers: list[Example] = []
        if recipe.data.prior is not None:
            keepers = prior_pictures.examples(recipe.data, family, resolutions[0], reporter)
            prior = encode(keepers, prior_pictures.section(recipe.data), resolutions[:1])
    adapter = adapters.get(recipe.adapter.kind).attach(family, recipe.adapter, recipe.train.seed)
    # Made here to be refused, where it does not suit these parameters, before anything is written.
    optim.build_optimizer(recipe.train, adapter.parameter_groups())
    idle = ("vae",) if learns else ("vae", *names)
    return Prepared(
        device,
        resolutions[0],
        sheet,
        held_out,
        family,
        dataset,
        adapter,
        idle,
        notes,
        tuple(keepers),
        prior,
        recipe.data.prior.weight if recipe.data.prior else 1.0,
    )


def _sheet(
    recipe: Recipe, base: Description, reporter: Reporter, folder: str | None = None
) -> DataSheet:
    """Check the training pictures, or those of another folder, as this base will see them."""
    from tunekit.data import preflight

    with contextlib.ExitStack() as stack:
        ticks: list[Ticker] = []

        def tick(done: int, total: int) -> None:
            if not ticks:  # only now it is known how many there are
                name = "checking" if folder is None else "held-out"
                ticks.append(stack.enter_context(reporter.stage(name, total)))
            ticks[0]()

        return preflight(
            recipe.data,
            None if recipe.data.resolutions else base.default_resolution,
            multiple=base.size_multiple,
            folder=folder,
            cut_words=base.cut_words if folder is None else None,
            progress=tick,
        )


def _check_judges(recipe: Recipe) -> None:
    """Load the judges and let them go: an hour of training must not end at a missing file."""
    from tunekit.evaluation.judges import load_judges

    question = question_of(recipe)
    judges = load_judges(recipe.evaluate)
    judges.clip.check_texts([question.plain(prompt) for prompt in question.prompts])


def _check_drawing(recipe: Recipe, family: Family, resolutions: Sequence[int]) -> None:
    """Raise UserError for settings that no picture could be drawn or trained with."""
    multiple = family.size_multiple
    if bad := [str(resolution) for resolution in resolutions if resolution % multiple]:
        raise UserError(
            f"data.resolution: {', '.join(bad)} is not a multiple of {multiple}, which this base "
            "needs"
        )
    drawing_of(recipe, resolutions[0])
    family.pipeline(recipe.evaluate.scheduler)


def _refuse_shared(sheet: DataSheet, held_out: DataSheet | None) -> None:
    from tunekit.data.sheet import shared_pictures

    if held_out is not None and (shared := shared_pictures(sheet, held_out)):
        trained, held = shared[0]
        raise UserError(
            f"data.holdout: {held_out.folder / held} is the training picture {trained}; held-out "
            "pictures must never be trained on, or the ceiling of the scores means nothing"
        )


def _cut_prompts(recipe: Recipe, family: Family) -> list[str]:
    told = [question_of(recipe).told(prompt) for prompt in recipe.evaluate.prompts]
    cut = [(prompt, family.cut_words(prompt)) for prompt in told]
    return [
        f'warning: the text encoder never reads the end of this prompt: "{words}" (of "{prompt}")'
        for prompt, words in cut
        if words
    ]


def _encoder(
    recipe: Recipe, family: Family, multiple: int, cache: Cache, reporter: Reporter
) -> Callable[[Sequence[Example], Data, Sequence[int]], EncodedDataset]:
    """Return what encodes examples, by the settings of a data section, at some resolutions."""
    from tunekit.data import EncodedDataset, fingerprint

    encoders, settings = family.text_encoders, recipe.train
    weights = {
        f"{name}.{key}": tensor
        for name, encoder in encoders.items()
        for key, tensor in encoder.state_dict().items()
    }
    configs = map(_config, encoders.values())
    pictures = fingerprint(family.vae.state_dict(), family.name, _config(family.vae))
    texts = fingerprint(weights, family.name, family.tokenization(), *configs)

    def encode(
        examples: Sequence[Example], data: Data, resolutions: Sequence[int]
    ) -> EncodedDataset:
        return EncodedDataset.encode(
            examples,
            data,
            resolution=resolutions,
            multiple=multiple,
            seed=settings.seed,
            encode_image=family.encode_image,
            image_fingerprint=pictures,
            encode_prompt=None if recipe.adapter.trains_text_encoder() else family.encode_prompt,
            text_fingerprint=texts,
            batch_size=settings.batch_size,
            batches=settings.steps * settings.gradient_accumulation,
            cache=cache,
            stage=reporter.stage,
        )

    return encode


def _config(module: nn.Module) -> str:
    """Return a component's settings as text: with its weights they decide what it computes."""
    config: Any = module.config
    settings = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    return json.dumps(settings, sort_keys=True, default=str)


def _references(sheet: DataSheet) -> list[Reference]:
    from tunekit.data.encode import training_view
    from tunekit.evaluation.measure import Reference

    resolution = sheet.resolutions[0]
    return [
        Reference(
            example.name,
            training_view(example, sheet.data, resolution, sheet.multiple),
            example.caption,
        )
        for example in sheet.examples
    ]
