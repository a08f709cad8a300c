"""The contact sheet: one page that shows every picture, its crop, its words and its remarks."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tunekit.data import contact
from tunekit.data.sheet import DataSheet, examine
from tunekit.errors import UserError
from tunekit.schema import Data

X = "\N{MULTIPLICATION SIGN}"


@pytest.fixture
def sheet(tmp_path: Path, data: Callable[..., Data]) -> Callable[..., DataSheet]:
    """Return a function that saves pictures of these sizes by name and examines them."""

    def make(sizes: dict[str, tuple[int, int]], **changes: Any) -> DataSheet:
        folder = tmp_path / "pictures"
        folder.mkdir(exist_ok=True)
        for seed, (name, size) in enumerate(sizes.items()):
            values = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(values).resize(size, Image.Resampling.NEAREST).save(folder / name)
        return examine(data(folder, **changes), changes.pop("resolution", 64))

    return make


def test_the_page_is_whole_and_asks_nothing_of_the_network(sheet: Any) -> None:
    page = contact.page(sheet({"a.png": (100, 100), "wide.png": (400, 200)}))
    HTMLParser().feed(page)
    assert page.count("<figure") == 2
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert "<script" not in page
    assert "prefers-color-scheme: dark" in page
    assert "default-src 'none'" in page


def test_pictures_are_small_and_have_their_shape(sheet: Any) -> None:
    page = contact.page(sheet({"a.png": (1200, 600), "b.png": (90, 70)}))
    urls = re.findall(r'src="data:image/(\w+);base64,([^"]+)"', page)
    shown = [Image.open(io.BytesIO(base64.b64decode(code))) for _, code in urls]
    assert [kind for kind, _ in urls] == ["jpeg", "png"]
    assert [picture.size for picture in shown] == [(320, 160), (90, 70)]


def test_a_crop_is_drawn_where_training_cuts(sheet: Any) -> None:
    page = contact.page(sheet({"wide.png": (400, 200), "square.png": (100, 100)}))
    assert 'viewBox="0 0 400 200"' in page
    assert 'class="edge" x="100" y="0" width="200" height="200"' in page
    assert page.count('class="edge"') == 1, "nothing is drawn where nothing is cut"
    assert f"to 64 {X} 64: scaled 0.32{X}, 50% cut off" in page
    four = contact.page(sheet({"wide.png": (400, 200)}, crop="random"))
    assert four.count('class="edge"') == 4


def test_words_are_shown_as_they_are_and_the_trigger_marked(sheet: Any, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.txt").write_text('a Zorp <b>robot</b> & "zorpish" <script>')
    page = contact.page(sheet({"a.png": (100, 100)}))
    assert (
        "a <mark>Zorp</mark> &lt;b&gt;robot&lt;/b&gt; &amp; &#34;zorpish&#34; &lt;script&gt;"
        in page
    )


def test_remarks_stand_at_their_pictures(sheet: Any, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "broken (2).png").write_bytes(b"")
    Image.new("RGB", (80, 80)).save(tmp_path / "pictures" / "black (1).png")
    page = contact.page(sheet({"ok.png": (90, 90)}))
    parts = page.split("<figure")[1:]
    cards = {re.findall("<h3>(.*?)</h3>", part)[0]: part for part in parts}
    assert "shows one colour" in cards["black (1).png"]
    assert 'contact-card warning"' in cards["black (1).png"]
    assert "an empty file" in cards["broken (2).png"]
    assert "<img" not in cards["broken (2).png"]
    assert "<li" not in cards["ok.png"]
    assert "1 error and 1 warning" in page


def test_buckets_are_drawn_with_their_counts(sheet: Any) -> None:
    sizes = {"a.png": (200, 100), "b.png": (200, 100), "c.png": (100, 200)}
    page = contact.page(sheet(sizes, buckets={"step": 8}))
    assert page.count(f"<b>88 {X} 40</b>2 pictures") == 1
    assert page.count(f"<b>40 {X} 88</b>1 picture<") == 1


def test_a_mask_fades_what_it_leaves_out(sheet: Any, tmp_path: Path) -> None:
    made = sheet({"a.png": (100, 100)})
    plain = contact.page(made)
    mask = Image.new("L", (100, 100), 0)
    mask.paste(255, (0, 0, 50, 100))
    mask.save(tmp_path / "pictures" / "a.mask.png")
    masked = made.data.model_validate(made.data.model_dump() | {"mask": {}})
    page = contact.page(examine(masked, 64))
    assert "mask keeps 50%" in page
    urls = [re.findall(r'src="data:image/png;base64,([^"]+)"', text)[0] for text in (plain, page)]
    files = [io.BytesIO(base64.b64decode(url)) for url in urls]
    before, after = (np.asarray(Image.open(file)).astype(np.int32) for file in files)
    assert (before[:, :50] == after[:, :50]).all()
    assert after[:, 50:].std(axis=2).max() < 1, "grey where it does not count"


def test_a_large_set_shows_those_with_remarks_and_counts_the_rest(
    sheet: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(contact, "MOST_CARDS", 3)
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (80, 80)).save(tmp_path / "pictures" / "z.png")
    page = contact.page(sheet({f"{n}.png": (90, 90) for n in range(5)}))
    assert re.findall("<h3>(.*?)</h3>", page) == ["0.png", "1.png", "z.png"]
    assert "3 more pictures are not shown" in page


def test_held_out_pictures_visits_and_repeats(sheet: Any) -> None:
    made = sheet({"a.png": (90, 90), "b.png": (90, 90)})
    page = contact.page(made, held_out=made, sentences=["Two steps."], visits=made.visits(2, 3))
    assert "Held out: never trained on" in page
    assert page.count("shown 3 times") == 2
    assert "Two steps." in page


def test_a_section_can_stand_in_another_page(sheet: Any) -> None:
    part = contact.section(sheet({"a.png": (90, 90)}))
    assert part.count("<figure") == 1
    assert "<html" not in part
    used = set(re.findall(r'class="(contact-[\w-]+)', part))
    assert used
    assert all(f".{name}" in contact.styles() for name in used)


def test_a_picture_that_went_away_is_named(sheet: Any, tmp_path: Path) -> None:
    made = sheet({"a.png": (90, 90)})
    (tmp_path / "pictures" / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png: was there at the start, now cannot be read"):
        contact.page(made)
