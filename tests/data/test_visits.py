"""Full batches of one bucket, and every picture equally often."""

from __future__ import annotations

import pickle
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tunekit.data.visits import Round, Visits, expected, round_of, variant

ITEMS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3)), min_size=1, max_size=12)


def visits(items: list[tuple[str, int]], seed: int, batch_size: int) -> Visits:
    buckets, repeats = zip(*items, strict=True)
    return Visits(buckets, repeats, seed=seed, batch_size=batch_size)


@settings(max_examples=150, deadline=None)
@given(
    items=ITEMS,
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 2**63 - 1),
    rounds=st.integers(1, 2),
)
def test_over_a_round_every_picture_is_seen_equally_often(
    items: list[tuple[str, int]], batch_size: int, seed: int, rounds: int
) -> None:
    row = visits(items, seed, batch_size)
    seen: Counter[int] = Counter()
    for place in range(row.round.batches * rounds):
        batch = row.at(place)
        assert len(batch) == batch_size
        assert len({items[visit.item][0] for visit in batch}) == 1
        seen.update(visit.item for visit in batch)
    epochs = row.round.epochs * rounds
    assert seen == {item: epochs * repeats for item, (_, repeats) in enumerate(items)}


@settings(max_examples=60, deadline=None)
@given(
    items=ITEMS,
    batch_size=st.integers(1, 8),
    seed=st.integers(0, 2**63 - 1),
    batches=st.integers(1, 40),
)
def test_at_any_moment_visits_are_counted_and_within_what_is_expected(
    items: list[tuple[str, int]], batch_size: int, seed: int, batches: int
) -> None:
    row = visits(items, seed, batch_size)
    numbers: dict[int, list[int]] = {item: [] for item in range(len(items))}
    for place in range(batches):
        for visit in row.at(place):
            numbers[visit.item].append(visit.number)
    # Visit numbers are 0, 1, 2, ... in the order they are seen: no variant is left out.
    assert all(found == list(range(len(found))) for found in numbers.values())
    buckets, repeats = zip(*items, strict=True)
    told = expected(buckets, repeats, batch_size, batches)
    for item, (least, most) in enumerate(told):
        assert least <= len(numbers[item]) <= most
    whole = expected(buckets, repeats, batch_size, 2 * row.round.batches)
    assert whole == [(2 * row.round.epochs * r,) * 2 for r in repeats]
    for bucket in set(buckets):
        of_one = [len(numbers[i]) / r for i, (b, r) in enumerate(items) if b == bucket]
        assert max(of_one) - min(of_one) <= 1


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 9), batch_size=st.integers(1, 20), seed=st.integers(0, 2**63 - 1))
def test_one_bucket_is_a_permutation_an_epoch(count: int, batch_size: int, seed: int) -> None:
    row = visits([("a", 1)] * count, seed, batch_size)
    seen = [visit for place in range(12) for visit in row.at(place)]
    for epoch in range(len(seen) // count):
        part = seen[epoch * count : (epoch + 1) * count]
        assert sorted(visit.item for visit in part) == list(range(count))
        assert {visit.number for visit in part} == {epoch}


@settings(max_examples=60, deadline=None)
@given(items=ITEMS, batch_size=st.integers(1, 8), batches=st.integers(1, 40))
def test_what_is_expected_is_no_more_than_there_are(
    items: list[tuple[str, int]], batch_size: int, batches: int
) -> None:
    told = expected(*zip(*items, strict=True), batch_size, batches)
    assert sum(least for least, _ in told) <= batch_size * batches <= sum(most for _, most in told)
    assert max(most for _, most in told) <= batch_size * batches


def test_what_is_expected_is_exact() -> None:
    assert expected(["a"], [18], 2, 4) == [(8, 8)]
    assert expected("aab", [1, 1, 1], 1, 1) == [(0, 1)] * 3
    assert expected("aa", [1, 3], 1, 5) == [(1, 2), (3, 4)]
    # Each of the bounds is reached by some seed.
    items = [("a", 2), ("a", 3), ("b", 2)]
    told = expected(*zip(*items, strict=True), 2, 5)
    seen: list[set[int]] = [set(), set(), set()]
    for seed in range(300):
        row = visits(items, seed, 2)
        counts = Counter(visit.item for place in range(5) for visit in row.at(place))
        for item, found in enumerate(seen):
            found.add(counts[item])
    assert [(min(found), max(found)) for found in seen] == told


def test_a_round_is_the_shortest() -> None:
    assert round_of("aaab", [1] * 4, 2) == Round(epochs=2, batches=4)
    assert round_of("aabb", [1] * 4, 2).epochs == 1
    assert round_of("a", [1], 4).epochs == 4
    assert round_of("aab", [1, 1, 2], 2).epochs == 1
    assert round_of("ab", [3, 5], 4).epochs == 4


def test_any_batch_can_be_asked_for_at_once() -> None:
    items = [("ab"[n % 2], 1) for n in range(20)]
    far = visits(items, 3, 4).at(1_000_000_007)
    assert far == visits(items, 3, 4).at(1_000_000_007)
    forward = visits(items, 3, 4)
    wanted = [forward.at(place) for place in range(60)]
    backward = visits(items, 3, 4)
    assert [backward.at(place) for place in reversed(range(60))] == wanted[::-1]
    assert [visits(items, 4, 4).at(place) for place in range(60)] != wanted
    copy = pickle.loads(pickle.dumps(forward))
    assert [copy.at(place) for place in range(60)] == wanted


def test_buckets_are_shuffled_in_each_round() -> None:
    items = [("ab"[n % 2], 1) for n in range(16)]
    row = visits(items, 1, 2)
    turns = ["".join(items[row.at(p + 8 * r)[0].item][0] for p in range(8)) for r in range(6)]
    assert all(sorted(turn) == sorted("aaaabbbb") for turn in turns)
    assert len(set(turns)) > 3


@given(seed=st.integers(0, 99), variants=st.integers(1, 8), start=st.integers(0, 5))
def test_all_variants_before_one_comes_again(seed: int, variants: int, start: int) -> None:
    cycle = [variant(seed, "key", start * variants + n, variants) for n in range(variants)]
    assert sorted(cycle) == list(range(variants))
