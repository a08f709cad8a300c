"""The formulas of each kind, against the same reckoned another way, number by number."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tunekit.changes import deltas

RANDOM = torch.Generator().manual_seed(5)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=RANDOM, dtype=torch.float32) * 0.3


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_low_rank(kernel: tuple[int, ...]) -> None:
    weight = draw(6, 5, *kernel)
    down, up = draw(2, 5, *kernel), draw(6, 2, *(1 for _ in kernel))
    wanted = torch.zeros_like(weight)
    for rank in range(2):
        for out in range(6):
            wanted[out] += 4.0 / 2 * up[out, rank].flatten()[0] * down[rank]
    found = deltas.change({"down": down, "up": up}, 4.0, weight)
    torch.testing.assert_close(found, wanted)
    unsaid = deltas.change({"down": down, "up": up}, None, weight)
    torch.testing.assert_close(unsaid, wanted / 2, msg="without alpha it is the rank")


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_loha(kernel: tuple[int, ...]) -> None:
    weight = draw(6, 5, *kernel)
    width = weight[0].numel()
    parts = {f"hada_w{n}_a": draw(6, 2) for n in (1, 2)}
    parts |= {f"hada_w{n}_b": draw(2, width) for n in (1, 2)}
    wanted = torch.empty(6, width)
    for out in range(6):
        for into in range(width):
            one, two = (
                sum(parts[f"hada_w{n}_a"][out, r] * parts[f"hada_w{n}_b"][r, into] for r in (0, 1))
                for n in (1, 2)
            )
            wanted[out, into] = one * two * 3.0 / 2
    found = deltas.change(parts, 3.0, weight)
    torch.testing.assert_close(found, wanted.reshape(weight.shape))


@pytest.mark.parametrize("kernel", [(), (3, 3)])
@pytest.mark.parametrize("halves", ["whole", "second", "both"])
def test_lokr(kernel: tuple[int, ...], halves: str) -> None:
    """Block (i, j) of the weight, as [out, in], changes by w1[i, j] times w2."""
    weight = draw(2 * 3, 2 * 4, *kernel)
    one_a, one_b, two_a, two_b = draw(2, 2), draw(2, 2), draw(3, 2), draw(2, 4 * 9 if kernel else 4)
    one = one_a @ one_b if halves == "both" else one_a
    two = draw(3, 4, *kernel) if halves == "whole" else (two_a @ two_b).reshape(3, 4, *kernel)
    parts = {"lokr_w1_a": one_a, "lokr_w1_b": one_b} if halves == "both" else {"lokr_w1": one}
    parts |= {"lokr_w2": two} if halves == "whole" else {"lokr_w2_a": two_a, "lokr_w2_b": two_b}
    wanted = torch.empty_like(weight)
    for i in range(2):
        for j in range(2):
            wanted[3 * i : 3 * i + 3, 4 * j : 4 * j + 4] = one[i, j] * two
    scale = 1.0 if halves == "whole" else 3.0 / 2  # readers find no rank in whole matrices
    torch.testing.assert_close(deltas.change(parts, 3.0, weight), wanted * scale)


def rotation(blocks: Tensor) -> Tensor:
    """Return (I + Q)(I - Q)^-1 by an inverse."""
    skew = (blocks - blocks.mT).double()
    one = torch.eye(blocks.shape[-1], dtype=torch.float64)
    turn: Tensor = (one + skew) @ torch.linalg.inv(one - skew)
    return turn


def side_by_side(blocks: Tensor) -> Tensor:
    """Return [n * b, n * b] with the blocks [n, b, b] on its diagonal."""
    size = blocks.shape[-1]
    whole = torch.zeros(len(blocks) * size, len(blocks) * size, dtype=blocks.dtype)
    for number, block in enumerate(blocks):
        whole[number * size :, number * size :][:size, :size] = block
    return whole


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_oft_turns_blocks_of_outputs(kernel: tuple[int, ...]) -> None:
    weight, blocks = draw(8, 5, *kernel), draw(2, 4, 4)
    whole = side_by_side(rotation(blocks))
    torch.testing.assert_close(whole @ whole.T, torch.eye(8, dtype=torch.float64))
    wanted = (whole.T @ weight.double().flatten(1)).float().reshape(weight.shape)
    found = deltas.change({"oft_blocks": blocks}, 1000.0, weight)
    torch.testing.assert_close(weight + found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernel", [(), (3, 3)])
def test_boft_joins_outputs_ever_further_apart(kernel: tuple[int, ...]) -> None:
    """Factor i pairs the places j and j + 2^i b / 2 of each stretch of 2^i b."""
    size, count, out = 4, 3, 16
    weight, blocks = draw(out, 5, *kernel), draw(count, out // size, size, size)
    rows = weight.double().flatten(1)
    for number in range(count):
        run = 2**number * size // 2
        order = [
            start + half * run + place
            for start in range(0, out, 2 * run)
            for place in range(run)
            for half in (0, 1)
        ]
        turned = side_by_side(rotation(blocks[number])) @ rows[order]
        rows = torch.empty_like(rows)
        rows[order] = turned
    found = deltas.change({"oft_blocks": blocks}, 1000.0, weight)
    wanted = rows.float().reshape(weight.shape)
    torch.testing.assert_close(weight + found, wanted, atol=1e-5, rtol=1e-5)


def test_a_small_alpha_holds_turns_back() -> None:
    weight, blocks = draw(8, 5), draw(2, 4, 4)
    length = float((blocks - blocks.mT).norm())
    held = deltas.change({"oft_blocks": blocks}, length / 2, weight)
    torch.testing.assert_close(held, deltas.change({"oft_blocks": blocks / 2}, None, weight))


def test_a_difference_is_itself() -> None:
    weight, diff = draw(4, 3, 3, 3), draw(4, 3, 3, 3)
    assert deltas.change({"diff": diff}, None, weight).equal(diff)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"down": (2, 5)}, "down are no factors of a kind"),
        ({"down": (2, 4), "up": (6, 2)}, r"the shape \[6, 4\], not \[6, 5\]"),
        ({"hada_t1": (2, 2, 3, 3)}, "no factors of a kind"),
        ({"diff": (5, 5)}, r"\[5, 5\], not \[6, 5\]"),
    ],
)
def test_what_does_not_fit_is_refused(parts: dict[str, tuple[int, ...]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        deltas.change({name: draw(*shape) for name, shape in parts.items()}, None, draw(6, 5))
