"""What the scores mean, in plain words, kind to nobody: the same text stands in report and JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LEARNED, PARTLY, BARELY = 0.75, 0.4, 0.1  # shares of the gap closed
FELL, SLIPPED = -5.0, -2.0  # points of prompt fidelity
LEAKED, TINGED = 0.4, 0.15  # shares of the gap closed without the trigger
MOVED = 0.5  # share of the distance between the base's own pictures

Sentence = dict[str, str]


def verdict(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return {"outcome", "headline", "sentences"} for the content of a scores.json.

    `outcome` is learned, partly, barely, not, or unknown (there was nothing to compare with); each
    sentence is {"tone": good | fair | poor, "text"}.
    """
    sums = result["scores"]
    outcome = _outcome(sums["likeness"]["closed"])
    sentences = [
        _likeness(result, outcome),
        _fidelity(result),
        _leak(result),
        _copied(result),
    ]
    return {
        "outcome": outcome,
        "headline": _headline(result, outcome),
        "sentences": [sentence for sentence in sentences if sentence],
    }


def _outcome(closed: float | None) -> str:
    if closed is None:
        return "unknown"
    for name, least in (("learned", LEARNED), ("partly", PARTLY), ("barely", BARELY)):
        if closed >= least:
            return name
    return "not"


def subject_of(result: Mapping[str, Any]) -> str:
    """Return what was taught as one calls it: "zorp robot"."""
    return f"{result['trigger']} {result['class']}"


def percent(share: float) -> str:
    """Return a share as whole percent, with a true minus sign."""
    return f"{round(100 * share)} %".replace("-", "\N{MINUS SIGN}")


def points(value: float) -> str:
    """Return points with their sign."""
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


def _headline(result: Mapping[str, Any], outcome: str) -> str:
    name = subject_of(result)
    fell = result["scores"]["fidelity"]["change"] < FELL
    headline = {
        "learned": f"It learned {name}, but no longer follows its prompts."
        if fell
        else f"It learned {name}.",
        "partly": f"It learned {name} in part.",
        "barely": f"It barely learned {name}.",
        "not": f"It did not learn {name}.",
        "unknown": f"Whether it learned {name} cannot be told.",
    }
    return headline[outcome]


def _likeness(result: Mapping[str, Any], outcome: str) -> Sentence:
    sums, kind = result["scores"]["likeness"], result["kind"]
    real = "real pictures" if sums["ceiling_from"] == "held-out" else "its training pictures"
    what = f"the {kind}"
    if outcome == "unknown":
        why = (
            "there is one training picture and nothing held out to compare with"
            if sums["ceiling"] is None
            else f"the untouched base already comes as close to {what} as {real} do"
        )
        return {"tone": "fair", "text": f"No share can be given: {why}."}
    if outcome == "not":
        text = (
            f"Its pictures are no closer to {what} than the untouched base's "
            f"({percent(sums['closed'])} of the way to {real}). Train for longer, or with a higher "
            "learning rate or rank."
        )
        return {"tone": "poor", "text": text}
    seen = sum(prompt["trained_with"] for prompt in result["prompts"])
    count = len(result["prompts"])
    prompts = f"{count} prompt{'s' * (count != 1)}" + (
        " it was not trained with" if not seen else f", {seen} of them training captions"
    )
    text = (
        f"On {prompts}, its pictures went {percent(sums['closed'])} of the way from the untouched "
        f"base to {real} of {what}."
    )
    if outcome != "learned":
        text += " More steps, a higher learning rate or a higher rank may close the rest."
    return {"tone": "good" if outcome == "learned" else "fair", "text": text}


def _fidelity(result: Mapping[str, Any]) -> Sentence:
    change = result["scores"]["fidelity"]["change"]
    told = f"({points(change)} points)"
    if change < FELL:
        return {
            "tone": "poor",
            "text": f"It lost hold of its prompts {told}: fewer steps, a lower learning rate or "
            "more varied captions would keep it.",
        }
    if change < SLIPPED:
        text = f"It follows its prompts a little less than the base does {told}."
        return {"tone": "fair", "text": text}
    return {"tone": "good", "text": f"It follows its prompts as well as the base does {told}."}


def _leak(result: Mapping[str, Any]) -> Sentence | None:
    """Say what became of pictures without the trigger: taught too, or changed otherwise."""
    sums = result["scores"]
    share, moved = sums["leak"]["closed"], sums["shift"]["closed"]
    plain = f'"a {result["class"]}"' if result["kind"] == "subject" else "other pictures"
    if share is not None and share >= TINGED:
        told = f"({percent(share)} of the gap closed)"
        if share >= LEAKED:
            return {"tone": "poor", "text": f"It leaked into {plain} without the trigger {told}."}
        return {"tone": "fair", "text": f"Without the trigger, {plain} took on some of it {told}."}
    if moved is not None and moved >= MOVED:
        text = f"Without the trigger, {plain} changed as well"
        return {"tone": "fair", "text": f"{text} ({percent(moved)} of the way to another picture)."}
    if share is None and moved is None:
        return None
    return {"tone": "good", "text": f"Without the trigger, {plain} stayed much as before."}


def _copied(result: Mapping[str, Any]) -> Sentence | None:
    copied = result["scores"]["copied"]
    if copied["closest_real_pair"] is None:
        return None
    if not copied["count"]:
        return {"tone": "good", "text": "No picture looks copied from the training pictures."}
    return {
        "tone": "poor" if copied["score"] > 0.25 else "fair",
        "text": f"{copied['count']} of {copied['of']} pictures look copied from the training ones.",
    }
