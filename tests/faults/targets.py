"""What is fuzzed: for each reader good inputs, a way to spoil them, and the call that reads them.

`read` must return or raise UserError, whatever `strike` leaves in its folder. The fuzz tests feed
each a few hundred inputs, benchmarks/fuzz as many as one likes.
"""

from __future__ import annotations

import json
import re
import shutil
import tarfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

from mutate import VALUES, encoded, some_bytes, some_json, some_text, some_tree
from PIL import Image

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Target:
    """A reader under fire.

    prepare: an empty folder -> the good inputs, made once a process. strike: chance, the good
    inputs, an empty folder -> what `read` is called with. dear: a tenth of a second an input.
    """

    name: str
    prepare: Callable[[Path], Any]
    strike: Callable[[Random, Any, Path], Any]
    read: Callable[[Any], object]
    dear: bool = False


# Recipes

HOSTILE_YAML = (
    "!!python/object/apply:os.system ['touch canary']",
    "!!python/name:os.system",
    "!!python/object/new:os.system [touch canary]",
    "!!map [1]", "!!binary aGFsbG8=", "!!set {a, b}", "!!omap [a: 1]", "!x y", "!<tag:x> y",
    "&a [*a, *a]", "*a", "&a", "<<: *a", "<<: {a: 1}", "? a\n: b", "? [a, b]\n: c", "---", "...",
    "--- x\n--- y", "%YAML 9.9", "%TAG ! tag:x:", "\t", "\ta: 1", "\0", "\x85", "\u2028", "\ufeff",
    "1e-4", "1e999", "-1e999", ".nan", ".inf", "0x1F", "0o17", "017", "1_000", "12:30:45", "1e",
    "2026-01-01", "2026-99-99", "2026-01-01T00:00:00Z", "yes", "no", "on", "~", "null", "",
    "'", '"', '"\\x"', '"\\ud800"', "|", ">", "|9", "[", "]", "{", "}", "[[[[", "{a: {a: {",
    "[1, 2", "{a", "- a", "-", "- - - -", "a: b: c", ": x", "#", "@x", "`x", "%x", "a" * 2000,
    "9" * 5000, "[" * 30, "{trigger}", "../../../../etc/passwd", "~nobody-here/x", "/dev/zero",
    "/proc/self/mem", "org/model", "hf://x/y", "toybox", "lora", "full", "extends: bad.yaml",
    "extends: /dev/zero", "extends: ../../x.yaml", "extends: [a]", "name: x", "train: {steps: 1}",
    "data:", "source: [{path: train}, {path: train}]", "{path: train, weight: .inf}",
)  # fmt: skip
VALID: dict[str, Any] = {
    "name": "good",
    "base": {"model": "toybox", "dtype": "fp32", "variant": None},
    "data": {
        "source": [{"path": "pictures", "repeats": 2}],
        "trigger": "<zorp>",
        "class": "robot",
        "resolution": 64,
        "captions": {"template": "a {trigger} {class}", "dropout": 0.1, "shuffle": True},
        "mask": {"source": "files"},
        "buckets": {"step": 8},
        "prior": {"count": 4, "prompts": ["a {class}"]},
    },
    "adapter": {"kind": "lora", "rank": 4, "alpha": 2, "targets": ["attn"]},
    "tokens": [{"name": "<zorp>", "vectors": 2, "init": "robot"}],
    "train": {
        "steps": 3,
        "batch_size": 1,
        "learning_rate": 1e-4,
        "optimizer": "adamw",
        "optimizer_args": {"eps": 1e-8},
        "schedule": "cosine",
        "ema": 0.99,
        "objective": {"min_snr_gamma": 5.0},
    },
    "evaluate": {"prompts": ["a {trigger}"], "seeds": [1], "kind": "subject", "steps": 2},
    "export": {"layouts": ["diffusers"], "dtype": "fp16"},
}


def _recipes(folder: Path) -> list[str]:
    from ruamel.yaml import YAML

    text = BytesIO()
    YAML().dump(VALID, text)
    shipped = [
        path.read_text()
        for path in sorted(
            (ROOT / "recipes").glob("*.yaml"), key=lambda p: p.stem != "character-lora"
        )
    ]
    here = [re.sub(r"datasets/\w+/(\w+)", r"pictures/\1", text) for text in shipped]
    return [*here, text.getvalue().decode()]


def _picture(size: tuple[int, int] = (64, 64), shade: int = 0, kind: str = "PNG") -> bytes:
    data = BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").rotate(shade).save(data, kind)
    return data.getvalue()


def _strike_recipe(rng: Random, texts: list[str], where: Path) -> tuple[Path, list[str]]:
    for name in ("train", "held_out"):
        (where / "pictures" / name).mkdir(parents=True)
    (where / "character-lora.yaml").write_text(texts[0])  # the others extend it
    path = where / "bad.yaml"
    text = some_text(rng, rng.choice(texts), HOSTILE_YAML)
    data = encoded(text)
    path.write_bytes(some_bytes(rng, data) if rng.random() < 0.3 else data)
    keys = ("name", "train.steps", "base.model", "data.source", "tokens", "adapter", "a.b", "", ".")
    overrides = [
        f"{rng.choice(keys)}{rng.choice(('=', '=', ''))}{rng.choice(HOSTILE_YAML)}"
        for _ in range(rng.choice((0, 0, 1, 3)))
    ]
    return path, overrides


def _read_recipe(given: tuple[Path, list[str]]) -> object:
    from tunekit.recipe import dump_yaml, load_recipe

    return dump_yaml(load_recipe(*given))


def _strike_tree(rng: Random, texts: list[str], where: Path) -> Any:
    for name in ("train", "held_out"):
        (where / "pictures" / name).mkdir(parents=True)
    values = (*VALUES, *HOSTILE_YAML)
    found = some_tree(rng, VALID, values)
    return found if isinstance(found, dict) else {"name": found}


def _read_tree(tree: Any) -> object:
    from tunekit.recipe import dump_yaml, recipe_from

    return dump_yaml(recipe_from(tree))


# Folders of pictures and words

ROWS = [
    {"file_name": "0.png", "text": "a zorp robot"},
    {"file_name": "1.png", "text": ["a zorp", "a robot"], "text_2": "more", "weight": 2.0},
    {"file_name": "sub/2.png", "text": "ein {trigger}", "mask": "2.mask.png", "split": "train"},
]
LISTED = (
    "../0.png", "/etc/passwd", "sub/../../x.png", "sub", ".", "", "link.png", "0.PNG", "C:\\0.png",
    "0.png\0", "metadata.jsonl", "a" * 5000, "é.png", "e\u0301.png", "{file_name}", "con", "-",
    '"', '""', "'", ",", ",,,,", ";", "\t", "=1+1", "\r", "file_name,text", "file_name,file_name",
    '"a\n b', "0.png,a\x00b", "0.png," + "x" * 20_000,
    '{"file_name": "0.png", "file_name": "1.png"}',
    "null", "[]", "3", '{"file_name": null}', '{"a":' * 5000, '{"file_name": "\\ud800.png"}',
    '{"weight": NaN}', '{"file_name": "0.png", "text": "x", "weight": ' + "9" * 5000 + "}",
)  # fmt: skip


def _folder(folder: Path) -> dict[str, bytes]:
    import numpy as np

    mask = BytesIO()
    Image.fromarray(np.tri(64, dtype=np.uint8) * 255).save(mask, "PNG")
    found = {
        name: _picture(shade=at * 5) for at, name in enumerate(("0.png", "1.png", "sub/2.png"))
    }
    return {**found, "2.mask.png": mask.getvalue()}


def _lay(files: Mapping[str, bytes], where: Path) -> Path:
    root = where / "pictures"
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def _strike_jsonl(rng: Random, files: dict[str, bytes], where: Path) -> Path:
    root = _lay(files, where)
    if rng.random() < 0.2:
        (root / "link.png").symlink_to("/etc/passwd")
    lines = [some_json(rng, row) if rng.random() < 0.5 else json.dumps(row) for row in ROWS]
    text = "\n".join(lines)
    if rng.random() < 0.5:
        text = some_text(rng, text, LISTED)
    data = encoded(text)
    (root / "metadata.jsonl").write_bytes(some_bytes(rng, data) if rng.random() < 0.3 else data)
    return root


def _strike_csv(rng: Random, files: dict[str, bytes], where: Path) -> Path:
    root = _lay(files, where)
    text = (
        'file_name,text,weight,mask\n0.png,a robot,1,\n1.png,"a, b",,\nsub/2.png,x,2,2.mask.png\n'
    )
    data = encoded(some_text(rng, text, LISTED))
    (root / "metadata.csv").write_bytes(some_bytes(rng, data) if rng.random() < 0.3 else data)
    return root


NAMES = (
    "0.txt", "1.caption", "0.caption", "sub/2.txt", "sub/2.cap", "x.txt", "0.png.txt", "0.mask.png",
    "0-masklabel.png", "99999999999999999999_zorp/a.png", "3_zorp robot/a.png", "0_x/a.png",
    "\u0665_x/a.png", ".hidden.png", "é.txt", "e\u0301.png", "E\u0301.txt", "a.heic", "META.csv",
    "metadata.csv", "sub/metadata.jsonl", "0.PNG", "{x}.png", "1.webp", "\x1b[31m.png", "a\nb.png",
)  # fmt: skip
CAPTIONS = (
    "", " ", "\n", "a\0b", "{", "{trigger}", "{trigger.x}", "{{", "a" * 9999, "a" * 10_001, "\r\r",
    "a, b, c", "\ufeffx", "\u202eabc", "\x1b]0;x\x07", "\ud800", "((a:1.5))", ",,,,",
)  # fmt: skip


def _strike_sidecars(rng: Random, files: dict[str, bytes], where: Path) -> Path:
    root = _lay(files, where)
    for _ in range(rng.choice((1, 2, 5))):
        path = root / rng.choice(NAMES)
        path.parent.mkdir(parents=True, exist_ok=True)
        data = encoded(rng.choice(CAPTIONS))
        if path.suffix in (".png", ".webp") and rng.random() < 0.8:
            data = some_bytes(rng, rng.choice(list(files.values())))
        path.write_bytes(some_bytes(rng, data) if rng.random() < 0.2 else data)
    return root


def _read_data(path: Path) -> object:
    """Look at pictures and words as a run does: read, decode, check, and tell."""
    from tunekit.data.cache import Cache
    from tunekit.data.sheet import examine
    from tunekit.schema import Data

    settings = {"trigger": "zorp", "class": "robot", "mask": {"source": "files"}}
    data = Data(source=str(path), **settings)  # type: ignore[arg-type]
    sheet = examine(data, 64, cache=Cache(path.parent / "cache"))
    return [str(finding) for finding in sheet.findings]


# Tables and shards


def _tar(members: Mapping[str, bytes], rng: Random | None = None) -> bytes:
    data = BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            if rng and rng.random() < 0.2:
                kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE, b"S")
                info.type, info.linkname = rng.choice(kinds), rng.choice(LISTED)[:90]
            tar.addfile(info, BytesIO(content))
    return data.getvalue()


def _shards(folder: Path) -> dict[str, bytes]:
    return {
        "a.png": _picture(),
        "a.txt": b"a zorp robot",
        "b.png": _picture(shade=9),
        "b.json": b'{"text": "a robot", "weight": 2}',
        "b.mask.png": _picture(shade=30),
    }


def _strike_tar(rng: Random, members: dict[str, bytes], where: Path) -> Path:
    names = (
        "../x.png",
        "/x.png",
        "c.pkl",
        "a.b.png",
        "c.jpg",
        "a.caption",
        ".x.png",
        "d",
        "\u00e9.png",
    )
    held = dict(members)
    for _ in range(rng.choice((0, 1, 2, 4))):
        name = rng.choice((*held, *names))
        content = rng.choice((*held.values(), *(encoded(text) for text in CAPTIONS)))
        held[name] = some_bytes(rng, content) if rng.random() < 0.5 else content
    if rng.random() < 0.3:
        held["b.json"] = encoded(some_json(rng, {"text": "a robot", "weight": 2}))
    data = _tar(held, rng)
    path = where / "a.tar"
    path.write_bytes(some_bytes(rng, data) if rng.random() < 0.6 else data)
    return path


def _tables(folder: Path) -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = [_picture(), _picture(shade=9)]
    tables: list[dict[str, Any]] = [
        {"image": pictures, "text": ["a zorp", "a robot"], "weight": [1.0, 2.0]},
        {
            "image": [{"bytes": data, "path": "/etc/passwd"} for data in pictures],
            "caption": ["a", "b"],
        },
        {
            "image": [{"bytes": None, "path": "/etc/passwd"}],
            "text": [["a", None]],
            "mask": pictures[:1],
        },
        {"image": [b"", None], "text": [None, ""], "weight": [float("nan"), -1.0]},
        {"image": ["/etc/passwd"], "text": ["a"]},
        {"a": [b"x"], "b": [b"y"], "text": [1]},
        {"image": [], "text": []},
    ]
    found = []
    for table in tables:
        data = BytesIO()
        pq.write_table(pa.table(table), data)
        found.append(data.getvalue())
    return found


def _strike_table(rng: Random, tables: list[bytes], where: Path) -> Path:
    path = where / "a.parquet"
    data = rng.choice(tables)
    if rng.random() < 0.5:  # the footer stands at the end
        cut = max(0, len(data) - rng.choice((8, 100, 600)))
        data = data[:cut] + some_bytes(rng, data[cut:])
    path.write_bytes(some_bytes(rng, data, tables) if rng.random() < 0.7 else data)
    return path


# Pictures


def pictures(folder: Path) -> list[bytes]:
    """Return a small picture of every kind that is read."""
    import numpy as np

    grey = np.linspace(0, 65535, 24 * 20).reshape(20, 24)
    colour = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8))
    alpha = colour.convert("RGBA")
    alpha.putalpha(Image.fromarray((grey / 257).astype(np.uint8)))
    palette, more = colour.quantize(16), [colour.rotate(90), colour.rotate(180)]
    exif = Image.Exif()
    exif[0x0112] = 6
    sixteen = Image.fromarray(grey.astype(np.uint16))
    wanted: list[tuple[Image.Image, str, dict[str, Any]]] = [
        (colour, "PNG", {"exif": exif}),
        (colour, "PNG", {"save_all": True, "append_images": more}),
        *((image, "PNG", {}) for image in (alpha, palette, sixteen, colour.convert("1"))),
        (colour, "JPEG", {"exif": exif, "icc_profile": b"x" * 200}),
        (colour, "JPEG", {"progressive": True, "quality": 30}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour, "MPO", {"save_all": True, "append_images": more}),
        (colour, "WEBP", {}),
        (alpha, "WEBP", {"lossless": True, "exif": exif}),
        (alpha, "WEBP", {"save_all": True, "append_images": more}),
        (palette, "GIF", {"save_all": True, "append_images": more}),
        (palette, "GIF", {"transparency": 3}),
        (colour, "BMP", {}),
        (palette, "DIB", {}),
        *((colour, "TIFF", {"compression": c}) for c in (None, "tiff_lzw", "jpeg", "packbits")),
        (colour, "TIFF", {"compression": "tiff_adobe_deflate", "tiffinfo": exif}),
        (sixteen, "TIFF", {}),
        (alpha, "AVIF", {}),
    ]
    found = []
    for image, kind, options in wanted:
        data = BytesIO()
        image.save(data, kind, **options)
        found.append(data.getvalue())
    return found


def _strike_picture(rng: Random, seeds: list[bytes], where: Path) -> Path:
    path = where / "a.png"
    path.write_bytes(some_bytes(rng, rng.choice(seeds), seeds))
    return path


def _read_picture(path: Path) -> object:
    from tunekit.data.images import decode, pixel_hash

    return pixel_hash(decode(path).image)


def emptied(folder: Path) -> Path:
    """Return `folder`, made if need be, with nothing in it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def run_once(target: Target, rng: Random, seeds: Any, where: Path) -> bool:
    """Feed `target` one input in the empty folder `where`; return whether it was refused.

    Any exception but UserError comes through: that is a fault found.
    """
    from tunekit.errors import UserError

    given = target.strike(rng, seeds, where)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            target.read(given)
        except UserError as error:
            refusal = str(error)
        else:
            return False
    assert refusal.strip(), "a line for people"
    return True


DATA = (
    Target("recipe text", _recipes, _strike_recipe, _read_recipe),
    Target("recipe tree", _recipes, _strike_tree, _read_tree),
    Target("metadata.jsonl", _folder, _strike_jsonl, _read_data),
    Target("metadata.csv", _folder, _strike_csv, _read_data),
    Target("sidecars", _folder, _strike_sidecars, _read_data),
    Target("tar", _shards, _strike_tar, _read_data),
    Target("parquet", _tables, _strike_table, _read_data),
    Target("pictures", pictures, _strike_picture, _read_picture),
)
