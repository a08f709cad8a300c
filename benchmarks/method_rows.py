"""What benchmarks/methods.py compares, what is expected of it, and how docs/methods.md tells it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunekit.recipe import Recipe, load_recipe

ROOT = Path(__file__).parent.parent
REFERENCE = "character-lora.yaml"
UNSEEN = ("train.sample_every=0", "train.checkpoint_every=0")  # nothing but training is timed


@dataclass(frozen=True)
class Method:
    """A row: what it is called, a recipe of recipes/ and what is changed in it."""

    title: str
    recipe: str
    changes: tuple[str, ...] = ()

    def load(self, *more: str) -> Recipe:
        """Return the recipe as this row trains it."""
        return load_recipe(ROOT / "recipes" / self.recipe, [*self.changes, *UNSEEN, *more])


METHODS = {
    "lora": Method("LoRA", REFERENCE),
    "lora-attention": Method(
        "LoRA, attention alone",
        REFERENCE,
        ("adapter.targets=attention", "train.learning_rate=4e-3"),
    ),
    "rslora": Method("rsLoRA", REFERENCE, ("adapter.rslora=true", "train.learning_rate=1e-3")),
    "dora": Method("DoRA", "character-dora.yaml"),
    "loha": Method("LoHa", "character-loha.yaml"),
    "lokr": Method("LoKr", "character-lokr.yaml"),
    "oft": Method("OFT", "character-oft.yaml"),
    "boft": Method("BOFT", "character-boft.yaml"),
    "full": Method("full, no prior", "dreambooth-full.yaml", ("data.prior=null",)),
    "full-prior": Method("full, prior (DreamBooth)", "dreambooth-full.yaml"),
    "custom-diffusion": Method(
        "keys and values, prior (Custom Diffusion)",
        "dreambooth-full.yaml",
        ("adapter.targets=[attn2.to_k, attn2.to_v]", "train.learning_rate=1e-3"),
    ),
    "lora-text": Method(
        "LoRA, text encoder too",
        REFERENCE,
        ("adapter.text_encoder=true", "train.text_encoder_learning_rate=5e-4"),
    ),
    "lora-prior": Method("LoRA, prior (DreamBooth-LoRA)", "dreambooth-lora.yaml"),
    "textual-inversion": Method("textual inversion", "textual-inversion.yaml"),
    "pivotal": Method("pivotal: new word and LoRA", "pivotal.yaml"),
    "nf4": Method("LoRA, base in nf4", REFERENCE, ("base.quantize=nf4",)),
    "int8": Method("LoRA, base in int8", REFERENCE, ("base.quantize=int8",)),
}


@dataclass(frozen=True)
class Expectation:
    """What a method should reach; `judge` returns whether it does, and what was measured."""

    text: str
    judge: Callable[[Mapping[str, Any]], tuple[bool, str]]
    needs: tuple[str, ...]


def each(row: Mapping[str, Any], key: str) -> list[float]:
    """Return a number of every run of a row, one a seed."""
    return [float(run[key]) for run in row["runs"]]


def mean(row: Mapping[str, Any], key: str) -> float:
    """Return the mean of a number over a row's runs."""
    return statistics.mean(each(row, key))


def shares(row: Mapping[str, Any]) -> list[float]:
    """Return the share of the likeness gap that each run closed, in percent."""
    return [100 * float(run["likeness"]["closed"]) for run in row["runs"]]


def closed(row: Mapping[str, Any]) -> float:
    """Return the share of the likeness gap that was closed, in percent, the mean of the runs."""
    return statistics.mean(shares(row))


def spread(row: Mapping[str, Any]) -> str:
    """Return what the runs' shares deviate from their mean, as in " ± 3"; "" of a single run."""
    found = shares(row)
    return f" \N{PLUS-MINUS SIGN} {statistics.stdev(found):.0f}" if len(found) > 1 else ""


def at_least(name: str, share: float) -> Expectation:
    """Expect a method to close so many percent of the gap."""

    def judge(rows: Mapping[str, Any]) -> tuple[bool, str]:
        found = closed(rows[name])
        return found >= share, f"{found:.1f} %"

    return Expectation(f"{METHODS[name].title} closes {share:.0f} % or more", judge, (name,))


def beside(name: str, other: str, below: float) -> Expectation:
    """Expect a method to be no more than `below` points under another."""

    def judge(rows: Mapping[str, Any]) -> tuple[bool, str]:
        found = closed(rows[name]) - closed(rows[other])
        return found >= -below, f"{closed(rows[name]):.1f} %, {signed(found)} points"

    text = f"no more than {below:.0f} points under" if below else "no less than"
    said = f"{METHODS[name].title}: {text} {METHODS[other].title}"
    return Expectation(said, judge, (name, other))


def keeps_the_class(name: str, share: float) -> Expectation:
    """Expect that pictures of the class stay so diverse, in percent of the base's own."""

    def judge(rows: Mapping[str, Any]) -> tuple[bool, str]:
        found = 100 * mean(rows[name], "diversity")
        return found >= share, f"{found:.0f} %"

    said = f"{METHODS[name].title} keeps {share:.0f} % or more of the class's diversity"
    return Expectation(said, judge, (name,))


def less_diverse(name: str, other: str, least: float) -> Expectation:
    """Expect that a method takes so many points of diversity more than another does."""

    def judge(rows: Mapping[str, Any]) -> tuple[bool, str]:
        lost, kept = (100 * mean(rows[which], "diversity") for which in (name, other))
        return kept - lost >= least, f"{lost:.0f} % beside {kept:.0f} %"

    said = f"{METHODS[name].title}: diversity falls clearly below that of {METHODS[other].title}"
    return Expectation(said, judge, (name, other))


EXPECTED = [
    *(at_least(name, 75) for name in ("lora", "dora", "loha", "lokr", "full-prior")),
    keeps_the_class("full-prior", 90),
    less_diverse("full", "full-prior", 15),
    *(at_least(name, 40) for name in ("oft", "boft")),
    at_least("textual-inversion", 45),
    beside("pivotal", "lora", 0),
    *(beside(name, "lora", 3) for name in ("nf4", "int8")),
]


def signed(value: float) -> str:
    """Return a number with its sign, a true minus."""
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def in_order(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rows of known methods, as METHODS lists them."""
    return {name: rows[name] for name in METHODS if name in rows}


NOTHING = "With the bundled models of this version nothing of it has been measured yet."


def table(rows: Mapping[str, Any]) -> list[str]:
    """Return the table in Markdown, or the sentence that there is none."""
    if not rows:
        return [NOTHING]
    heads = (
        "method | seeds | steps | likeness | fidelity | diversity | leak | drift | trains | file | "
    )
    heads += "time | memory"
    lines = [f"| {heads} |", "|---|" + "--:|" * heads.count("|")]
    for name, one in in_order(rows).items():
        cells = [
            f"{METHODS[name].title}",
            f"{len(one['runs'])}",
            f"{mean(one, 'steps'):.0f}",
            f"{closed(one):.0f}{spread(one)} %",
            signed(mean(one, "fidelity_change")),
            f"{100 * mean(one, 'diversity'):.0f} %",
            f"{round(100 * mean(one, 'leak'))} %".replace("-", "\N{MINUS SIGN}"),
            f"{round(100 * mean(one, 'drift'))} %",  # an integer: no "-0"
            f"{mean(one, 'trained_numbers'):,.0f}",
            f"{mean(one, 'file_bytes') / 1e6:.2f} MB",
            f"{mean(one, 'processor_seconds'):.0f} s",
            f"{mean(one, 'peak_memory_bytes') / 1e6:.0f} MB",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def verdicts(rows: Mapping[str, Any]) -> list[str]:
    """Return what was expected and what came of it, in Markdown."""
    if not rows:
        return [NOTHING]
    lines = ["| expected | measured | |", "|---|---|---|"]
    for one in EXPECTED:
        if all(name in rows for name in one.needs):
            met, told = one.judge(rows)
            lines.append(f"| {one.text} | {told} | {'met' if met else '**not met**'} |")
    return lines


def written(page: str, rows: Mapping[str, Any]) -> str:
    """Return the page with its tables made anew, each between two comments."""
    for name, lines in (("table", table(rows)), ("expected", verdicts(rows))):
        before, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->\n")
        assert end, f"the page has no place for its {name}"
        page = "".join([before, begin, *(f"{line}\n" for line in lines), end, after])
    return page
