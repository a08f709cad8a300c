"""Everything a run needs, checked and loaded before anything is written.

The cheapest checks come first: pictures, then the judges of the evaluation, then the base.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunekit import identity, prior, sheets
from tunekit.data import sheet
from tunekit.errors import UserError
from tunekit.ranks import ALONE, Ranks

if TYPE_CHECKING:
    import torch

    from tunekit.adapters import Adapter
    from tunekit.data import Batch, Cache, DataSheet, EncodedDataset, Example
    from tunekit.evaluation.measure import Question, Reference
    from tunekit.families import Description, Family
    from tunekit.inference import DrawSettings
    from tunekit.progress import Reporter
    from tunekit.recipe import Recipe
    from tunekit.schema import Data, Train
    from tunekit.sheets import Sheets

MOST_REFERENCES = 100
"""Pictures of a source that are held in memory, to be judged against and shown in the report."""


@dataclass
class Prepared:
    """What a run starts from.

    sheet: the training pictures; held_out: those never trained on; keepers: those that keep the
    class as it was. references: of both, cut as training cuts them; looks: all three as titled
    HTML. They are taken now: from here on, the sources may go. idle: the components that training
    itself does not use. dataset, prior: training pictures and keepers, encoded; weight: of the
    keepers' loss.
    """

    device: torch.device
    resolution: int
    sheet: DataSheet
    held_out: DataSheet | None
    keepers: DataSheet | None
    references: tuple[list[Reference], list[Reference]]
    looks: list[tuple[str, str]]
    family: Family
    dataset: EncodedDataset
    prior: EncodedDataset | None
    weight: float
    adapter: Adapter
    idle: tuple[str, ...]
    notes: list[str]

    def batches(self, settings: Train, ranks: Ranks = ALONE) -> Callable[[int, int], list[Batch]]:
        """Return ``(step, micro) -> batches``: the subject's, and the class's beside it.

        ranks: the process whose share of each it is.
        """
        cut = settings.batch_size, settings.gradient_accumulation, ranks.rank, ranks.count
        rows = [self.dataset.batches(*cut)]
        if self.prior is not None:
            rows.append(prior.weighted(self.prior.batches(*cut), self.weight))
        return lambda step, micro: [row(step, micro) for row in rows]

    def renew(self, recipe: Recipe) -> None:
        """Load the base afresh and attach what may change, as it was before training."""
        from tunekit import families

        self.let_go()  # both at once would take twice the memory
        self.family = families.load(recipe.base, self.device)
        self.adapter = _attached(recipe, self.family)

    def let_go(self) -> None:
        """Drop the base and what is attached to it from memory, until `renew`."""
        for name in ("family", "adapter"):
            vars(self).pop(name, None)
        gc.collect()  # modules and their hooks know each other

    def manifest(self) -> dict[str, dict[str, str]]:
        """Return what each picture is, by its part in the run and its name: for a run that resumes.

        What counts is the content: pixels, captions, mask, and how often and how much it counts.
        """
        parts = {"training": self.sheet, "held out": self.held_out, "class": self.keepers}
        return {
            part: {
                e.name: f"{e.key} {e.mask_pixels} {e.repeats} {e.weight:g}" for e in sheet.examples
            }
            for part, sheet in parts.items()
            if sheet is not None
        }

    def some_keepers(self, most: int = 12) -> list[Reference]:
        """Return the first of the pictures that keep the class, to be shown."""
        return _references(self.keepers, most)[0] if self.keepers else []


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


def prepare(
    recipe: Recipe, reporter: Reporter, cache: Cache | None = None, ranks: Ranks = ALONE
) -> Prepared:
    """Check and load everything; raises UserError, and writes nothing but to the cache.

    cache: where encoded pictures and words are kept; who trains holds it with `using` to the end.
    ranks: this process among those of the run; what only the first one needs, others lack.
    """
    from tunekit import families, objective, optim
    from tunekit.data import Cache
    from tunekit.inference import default_device

    device = default_device()
    data = recipe.data
    ranks.check(recipe.train)
    _check_machine(recipe, device)
    base = families.describe(recipe.base)
    if recipe.tokens:
        base.add_words(recipe.tokens, data.class_noun)
    cache = cache or Cache(say=reporter.note)
    with cache.using():
        words = [token.name for token in recipe.tokens]
        seen = sheets.look(data, recipe.train, base, reporter, words, cache)
        seen.check()
        if ranks.leads:
            _check_judges(recipe)
        family = families.load(recipe.base, device)
        _check_drawing(recipe, family, seen.training.resolutions)
        objective.check(recipe.train.objective, family.schedule)
        references, told = _all_references(seen.training, seen.held_out, ranks)
        idle = ("vae",) if recipe.trains_text_encoder() else ("vae", *family.text_encoders)
        notes = [seen.training.headline(), *map(sheet.told, seen.findings), *told]
        notes += [*_notes(recipe, base, family, idle), *ranks.notes(recipe.train)]
        for note in notes:
            reporter.note(note)
        encode = _encoder(recipe, family, base.size_multiple, cache, reporter)
        dataset = encode(seen.training.examples, data, seen.training.resolutions)
        keepers = _keepers(data, seen, family, cache, reporter)
        kept = encode(keepers.examples, keepers.data, keepers.resolutions[:1]) if keepers else None
        looks = _looks(seen, keepers) if ranks.leads else []
    adapter = _attached(recipe, family)
    # Made here to be refused, where it does not suit these parameters, before anything is written.
    optim.build_optimizer(recipe.train, adapter.parameter_groups())
    return Prepared(
        device=device,
        resolution=seen.training.resolutions[0],
        sheet=seen.training,
        held_out=seen.held_out,
        keepers=keepers,
        references=references,
        looks=looks,
        family=family,
        dataset=dataset,
        prior=kept,
        weight=data.prior.weight if data.prior else 1.0,
        adapter=adapter,
        idle=idle,
        notes=notes,
    )


def _attached(recipe: Recipe, family: Family) -> Adapter:
    from tunekit import tokens

    noun, seed = recipe.data.class_noun, recipe.train.seed
    return tokens.attach(family, recipe.adapter, recipe.tokens, noun, seed)


def _keepers(
    data: Data, seen: Sheets, family: Family, cache: Cache, reporter: Reporter
) -> DataSheet | None:
    """Return the pictures that keep the class: those of a folder, or drawn by the base."""
    if data.prior is None:
        return None
    if seen.prior is not None:
        return prior.taken(seen.prior, data)
    return prior.drawn(data, family, seen.training.resolutions[0], cache, reporter)


def _looks(seen: Sheets, keepers: DataSheet | None) -> list[tuple[str, str]]:
    """Return what training and evaluation see, as titled HTML for the report."""
    from tunekit.data import contact

    titled = {
        "Training pictures": seen.training,
        "Held out: never trained on": seen.held_out,
        "Pictures of the class, trained beside": keepers,
    }
    return [(title, contact.section(sheet)) for title, sheet in titled.items() if sheet]


def _check_machine(recipe: Recipe, device: torch.device) -> None:
    """Raise UserError for what this machine or its packages cannot do."""
    from tunekit import forward, optim, quantize
    from tunekit.train import check_precision

    check_precision(device, recipe.train.precision)
    optim.check_optimizer(recipe.train)
    if recipe.base.quantize is not None:
        quantize.check(recipe.base.quantize)
    forward.check(recipe.train)


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
    if negative := recipe.evaluate.negative_prompt:
        family.drawing("", negative, 1.0)  # refused here, where the base takes none


def _notes(recipe: Recipe, base: Description, family: Family, idle: Sequence[str]) -> Iterator[str]:
    """Yield what there is to tell of these settings on this base."""
    from tunekit import objective, optim, quantize

    yield from _cut_prompts(recipe, base)
    yield from objective.notes(recipe.train.objective, family.schedule)
    yield from optim.notes(recipe.train, family.device.type)
    yield from quantize.notes(family.denoiser, family.dtype)
    size = sum(quantize.bytes_held(family.components()[name]) for name in idle)
    verb = "is" if len(idle) == 1 else "are"
    yield (
        f"{' and '.join(idle)} ({size / 1e6:,.1f} MB) {verb} not in memory while training: what "
        "they made of the pictures and words is cached"
    )


def _cut_prompts(recipe: Recipe, base: Description) -> list[str]:
    told = [question_of(recipe).told(prompt) for prompt in recipe.evaluate.prompts]
    cut = [(prompt, base.cut_words(prompt)) for prompt in told]
    return [
        f'warning: the text encoder never reads the end of this prompt: "{words}" (of "{prompt}")'
        for prompt, words in cut
        if words
    ]


def _encoder(
    recipe: Recipe, family: Family, multiple: int, cache: Cache, reporter: Reporter
) -> Callable[[Sequence[Example], Data, Sequence[int]], EncodedDataset]:
    """Return what encodes examples, by the settings of a data section, at some resolutions."""
    from tunekit.data import EncodedDataset

    settings = recipe.train
    pictures, texts = identity.of_pictures(family), identity.of_words(family)

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
            encode_prompt=None if recipe.trains_text_encoder() else family.encode_prompt,
            text_fingerprint=texts,
            batch_size=settings.batch_size,
            batches=settings.steps * settings.gradient_accumulation,
            cache=cache,
            stage=reporter.stage,
        )

    return encode


def _all_references(
    training: DataSheet, held_out: DataSheet | None, ranks: Ranks
) -> tuple[tuple[list[Reference], list[Reference]], list[str]]:
    """Return what is judged against, by the first process, and what there is to tell of it."""
    if not ranks.leads:
        return ([], []), []
    ours, told = _references(training)
    apart, more = _references(held_out) if held_out else ([], [])
    return (ours, apart), [*told, *more]


def _references(sheet: DataSheet, most: int = MOST_REFERENCES) -> tuple[list[Reference], list[str]]:
    """Return a sheet's pictures as training sees them, at most so many, and a word if not all."""
    from tunekit.data.encode import training_view
    from tunekit.evaluation.measure import Reference

    count = len(sheet.examples)
    taken = min(count, most)
    chosen = [sheet.examples[place * count // taken] for place in range(taken)]
    resolution = sheet.resolutions[0]
    found = [
        Reference(e.name, training_view(e, sheet.data, resolution, sheet.multiple), e.caption)
        for e in chosen
    ]
    told = f"{sheet.label}: {most} of its {count:,} pictures, evenly chosen, are judged against"
    return found, [told] if count > most else []
