"""New words: only their rows can change, every vector learns, and files carry them to others."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import tunekit
from tunekit import families, tokens, words
from tunekit.adapters import Adapter
from tunekit.data.dataset import Batch
from tunekit.errors import UserError
from tunekit.export import export_adapter
from tunekit.families.base import Family
from tunekit.inference import DrawSettings, Painter, load
from tunekit.info import describe
from tunekit.inspection import inspect
from tunekit.loading import VerificationError, load_file
from tunekit.progress import Silent
from tunekit.recipe import RecipeError, dump_yaml, load_recipe, recipe_from
from tunekit.runfolder import RunFolder
from tunekit.schema import Base, Token, Train
from tunekit.train import Loop

Load = Callable[..., Family]
Tree = dict[str, Any]
ZORP = Token(name="<zorp>", vectors=3)
HAT = Token(name="<hat>", vectors=1, init="red")
LORA = {"kind": "lora", "rank": 2}
OLD = ["a red robot on the beach", ""]
NEW = ["a <zorp> robot", "a <hat> in the snow, <zorp>"]
QUICK = DrawSettings(steps=2, guidance_scale=3.0)


def attach(family: Family, *taught: Token, adapter: Any = None, seed: int = 0) -> Adapter:
    settings = None
    if adapter is not None:
        from tunekit import adapters

        settings = adapters.get(adapter["kind"]).Settings(**adapter)
    return tokens.attach(family, settings, taught, "robot", seed)


def table(family: Family) -> Tensor:
    """Return the vocabulary's own rows."""
    module: Any = family.text_encoders["text_encoder"].get_input_embeddings()
    while hasattr(module, "table"):
        module = module.table
    weight: Tensor = module.weight
    return weight


@torch.no_grad()
def encoded(family: Family, prompts: list[str]) -> Tensor:
    (hidden,) = family.encode_prompt(prompts).values()
    return hidden


def batches(family: Family, captions: list[str] = NEW) -> Callable[[int, int], Batch]:
    size = family.default_resolution
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(3)) * 2 - 1
    latents = family.encode_image(pixels)

    def batch(step: int, micro: int) -> Batch:
        return Batch(
            latents=latents,
            conditioning={},
            names=("one.png", "two.png"),
            captions=tuple(captions),
        )

    return batch


def teach(family: Family, adapter: Adapter, captions: list[str] = NEW, **train: Any) -> Loop:
    settings = Train(**{"steps": 4, "batch_size": 2, "learning_rate": 0.01} | train)
    loop = Loop(family, adapter, settings, encode=family.encode_prompt)
    assert len(list(loop.run(batches(family, captions)))) == settings.steps
    return loop


def moved(adapter: Adapter, before: dict[str, Tensor]) -> dict[str, list[bool]]:
    """Return for each word whether each of its vectors differs from what it was."""
    now = adapter.state()
    return {
        name: [not torch.equal(a, b) for a, b in zip(now[name], before[name], strict=True)]
        for name in now
        if name.startswith("tokens.")
    }


class TestTraining:
    def test_attached_words_change_nothing_but_themselves(self, load_tiny: Load) -> None:
        family = load_tiny()
        before, rows = encoded(family, OLD), table(family).clone()
        vocabulary = dict(family.tokenizers["text_encoder"].get_vocab())
        adapter = attach(family, ZORP, HAT)
        assert torch.equal(encoded(family, OLD), before)
        # it starts as the class noun, three times
        assert torch.equal(encoded(family, ["a <zorp>"]), encoded(family, ["a robot robot robot"]))
        teach(family, adapter)
        assert torch.equal(table(family), rows)
        assert torch.equal(encoded(family, OLD), before)
        assert not torch.equal(
            encoded(family, ["a <zorp>"]), encoded(family, ["a robot robot robot"])
        )
        adapter.detach()
        assert torch.equal(table(family), rows)
        assert torch.equal(encoded(family, OLD), before)
        assert dict(family.tokenizers["text_encoder"].get_vocab()) == vocabulary
        assert isinstance(
            family.text_encoders["text_encoder"].get_input_embeddings(),  # type: ignore[operator]
            torch.nn.Embedding,
        )

    def test_only_the_new_rows_are_parameters(self, load_tiny: Load) -> None:
        family = load_tiny()
        adapter = attach(family, ZORP, HAT)
        assert adapter.parameter_count() == 4 * table(family).shape[1]
        trains = [p for m in (family.denoiser, *family.text_encoders.values())
                  for p in m.parameters() if p.requires_grad]  # fmt: skip
        assert {id(p) for p in trains} == {id(p) for p in adapter.trained().values()}

    def test_every_vector_of_every_word_learns(self, load_tiny: Load) -> None:
        family = load_tiny()
        adapter = attach(family, ZORP, HAT)
        before = adapter.state()
        teach(family, adapter, weight_decay=0.0)
        assert moved(adapter, before) == {
            "tokens.text_encoder.<zorp>": [True] * 3,
            "tokens.text_encoder.<hat>": [True],
        }
        own = tokens.words_of(adapter)
        assert own is not None
        assert own.unmoved() == []

    def test_a_word_that_nobody_says_is_found_out(self, load_tiny: Load) -> None:
        family = load_tiny()
        adapter = attach(family, ZORP, HAT)
        # AdamW's weight decay makes it shorter all the same
        teach(family, adapter, ["a <zorp> robot", "<zorp>"], weight_decay=0.5)
        own = tokens.words_of(adapter)
        assert own is not None
        assert own.unmoved() == ["vector 1 of <hat>"]

    def test_vectors_that_the_encoder_never_reads_are_found_out(self, load_tiny: Load) -> None:
        family = load_tiny()
        adapter = attach(family, ZORP)
        long = "a red robot on the beach, a blue cat in the snow <zorp>"
        kept = len(family.tokenizers["text_encoder"](words.expand(
            family.tokenizers["text_encoder"], long)).input_ids) - 16  # fmt: skip
        assert kept > 0, "the prompt is longer than the encoder reads"
        with pytest.warns(UserWarning, match="never"):
            teach(family, adapter, [long, long])
        own = tokens.words_of(adapter)
        assert own is not None
        assert own.unmoved()

    @pytest.mark.parametrize("optimizer", ["adamw", "lion", "schedulefree_adamw", "adafactor"])
    def test_after_stop_at_a_word_stays_bit_by_bit(self, optimizer: str, load_tiny: Load) -> None:
        if optimizer in ("lion", "schedulefree_adamw"):
            pytest.importorskip("pytorch_optimizer")
        family = load_tiny()
        early = ZORP.model_copy(update={"stop_at": 0.5, "keep_norm": optimizer == "adamw"})
        adapter = attach(family, early, HAT, adapter=LORA)
        settings = Train(steps=6, batch_size=2, learning_rate=0.01, optimizer=optimizer)
        loop = Loop(family, adapter, settings, encode=family.encode_prompt)
        states = [adapter.state()]
        for _ in loop.run(batches(family)):
            states.append(adapter.state())
        name = "tokens.text_encoder.<zorp>"
        assert not torch.equal(states[3][name], states[0][name])
        for state in states[4:]:
            assert torch.equal(state[name], states[3][name])
        for other in states[0].keys() - {name}:
            assert not torch.equal(states[6][other], states[3][other]), other

    def test_kept_norms_are_the_vocabularys(self, load_tiny: Load) -> None:
        family = load_tiny()
        kept = ZORP.model_copy(update={"keep_norm": True, "init": "random"})
        adapter = attach(family, kept, HAT)
        norm = table(family).norm(dim=1).mean()
        teach(family, adapter, learning_rate=0.1)
        rows = adapter.state()["tokens.text_encoder.<zorp>"]
        assert torch.allclose(rows.norm(dim=1), norm.expand(3), rtol=1e-5)
        free = adapter.state()["tokens.text_encoder.<hat>"].norm(dim=1)
        assert not torch.allclose(free, norm.expand(1), rtol=1e-2)

    def test_words_have_their_own_rate(self, load_tiny: Load) -> None:
        family = load_tiny()
        fast = ZORP.model_copy(update={"learning_rate": 0.5})
        loop = teach(family, attach(family, fast, HAT, adapter=LORA), steps=1)
        rates = {group["name"]: group["lr"] for group in loop.optimizer.param_groups}
        assert rates["token <zorp>"] == 0.5
        assert rates["token <hat>"] == 0.01

    def test_muon_takes_the_adapter_and_adamw_the_words(self, load_tiny: Load) -> None:
        family = load_tiny()
        loop = teach(family, attach(family, ZORP, adapter=LORA), optimizer="muon")
        muon, adamw = loop.optimizer.members  # type: ignore[attr-defined]
        assert [group["name"] for group in adamw.param_groups] == ["token <zorp>"]
        assert "token <zorp>" not in [group["name"] for group in muon.param_groups]
        fresh = load_tiny()
        alone = attach(fresh, ZORP)
        with pytest.raises(UserError, match="nothing that trains here is one"):
            teach(fresh, alone, optimizer="muon")

    @pytest.mark.parametrize("ema", [None, 0.9])
    @pytest.mark.parametrize("adapter", [None, LORA], ids=["alone", "pivotal"])
    def test_what_goes_on_is_what_never_stopped(
        self, adapter: Any, ema: float | None, load_tiny: Load
    ) -> None:
        kept = ZORP.model_copy(update={"keep_norm": True, "init": "random"})
        taught = (kept, HAT.model_copy(update={"stop_at": 0.7}))
        settings = Train(steps=6, batch_size=2, learning_rate=0.01, ema=ema, schedule="cosine")
        family = load_tiny()
        whole = attach(family, *taught, adapter=adapter)
        loop = Loop(family, whole, settings, encode=family.encode_prompt)
        saved: dict[str, dict[str, Tensor]] = {}
        for record in loop.run(batches(family)):
            if record.step == 3:
                saved = loop.state()
        other = load_tiny()
        again = attach(other, *taught, adapter=adapter)
        resumed = Loop(other, again, settings, encode=other.encode_prompt)
        resumed.load_state(saved)
        assert len(list(resumed.run(batches(other), 3))) == 3
        for kind, tensors in loop.state().items():
            for name, value in tensors.items():
                assert torch.equal(resumed.state()[kind][name], value), (kind, name)

    def test_strength_goes_from_the_first_words_to_what_was_learned(self, load_tiny: Load) -> None:
        family = load_tiny()
        adapter = attach(family, ZORP)
        teach(family, adapter)
        taught = encoded(family, ["a <zorp>"])
        adapter.set_scale(0.0)
        assert torch.equal(encoded(family, ["a <zorp>"]), encoded(family, ["a robot robot robot"]))
        adapter.set_scale(1.0)
        assert torch.equal(encoded(family, ["a <zorp>"]), taught)

    def test_a_base_in_half_precision_learns_in_full(self, load_tiny: Load) -> None:
        family = load_tiny(dtype="bf16")
        adapter = attach(family, ZORP)
        teach(family, adapter)
        assert all(p.dtype == torch.float32 for p in adapter.trained().values())
        assert encoded(family, NEW).dtype == torch.bfloat16


class TestStarts:
    def test_words_take_turns(self, load_tiny: Load) -> None:
        family = load_tiny()
        adapter = attach(family, ZORP.model_copy(update={"init": "red robot"}))
        tokenizer = family.tokenizers["text_encoder"]
        red, robot = words.known(tokenizer, "red robot")
        rows = adapter.state()["tokens.text_encoder.<zorp>"]
        assert torch.equal(rows, table(family)[[red, robot, red]])

    def test_random_draws_have_the_vocabularys_statistics(self, load_tiny: Load) -> None:
        wide = Token(name="<zorp>", vectors=14, init="random")
        rows = [
            attach(load_tiny(), wide, seed=seed).state()["tokens.text_encoder.<zorp>"]
            for seed in (1, 1, 2)
        ]
        assert torch.equal(rows[0], rows[1])
        assert not torch.equal(rows[0], rows[2])
        weight = table(load_tiny())
        assert float(rows[0].std()) == pytest.approx(float(weight.std()), rel=0.15)

    def test_a_file_starts_where_another_ended(self, load_tiny: Load, tmp_path: Path) -> None:
        rows = torch.randn(3, 32)
        save_file({"<other>": rows}, tmp_path / "other.safetensors")
        start = ZORP.model_copy(update={"init": str(tmp_path / "other.safetensors")})
        adapter = attach(load_tiny(), start)
        assert torch.equal(adapter.state()["tokens.text_encoder.<zorp>"], rows)
        family = load_tiny()
        fewer = start.model_copy(update={"vectors": 2})
        with pytest.raises(UserError, match=r"its vectors are \[3, 32\]; <zorp> needs \[2, 32\]"):
            attach(family, fewer, adapter=LORA)
        attach(family, ZORP, adapter=LORA)  # nothing was left attached


class TestPrompts:
    def test_what_diffusers_reads_is_what_is_trained(self, load_tiny: Load) -> None:
        family = load_tiny()
        attach(family, ZORP, HAT)
        tokenizer, pipeline = family.tokenizers["text_encoder"], family.pipeline()
        for prompt in [*NEW, *OLD, "<zorp>, <zorp>!", "a<zorp>b", "a <zorp>_1 robot"]:
            assert words.expand(tokenizer, prompt) == pipeline.maybe_convert_prompt(
                prompt, tokenizer
            )
        assert words.expand(tokenizer, "a <zorp>") == "a <zorp> <zorp>_1 <zorp>_2"

    def test_capitals_are_the_same_word(self, load_tiny: Load) -> None:
        family = load_tiny()
        painter = Painter.of(family, attach(family, ZORP.model_copy(update={"init": "random"})))
        assert torch.equal(encoded(family, ["a <ZORP>"]), encoded(family, ["a <zorp>"]))
        one, other = (painter.draw(text, 1, QUICK) for text in ("a <Zorp>", "a <zorp>"))
        assert one.tobytes() == other.tobytes()

    def test_each_vector_takes_a_words_place(self, load_tiny: Load, tree: Any) -> None:
        family = load_tiny()
        attach(family, Token(name="<zorp>", vectors=12))
        assert family.cut_words("a <zorp> robot") == ""
        assert "snow" in family.cut_words("a <zorp> in the snow")
        description = families.describe(Base(model=str(tree()["base"]["model"])))
        assert description.cut_words("a <zorp> in the snow") == ""
        description.add_words([Token(name="<zorp>", vectors=12)], "robot")
        assert "snow" in description.cut_words("a <zorp> in the snow")


class TestRecipes:
    @pytest.fixture
    def made(self, tree: Callable[..., Tree]) -> Callable[..., Tree]:
        def make(*listed: dict[str, Any], **sections: Any) -> Tree:
            whole = tree(data={"trigger": "<zorp>", "captions": {"trigger": "insert"}})
            whole["adapter"] = sections.pop("adapter", None)
            for name, values in sections.items():
                whole[name] = whole.get(name, {}) | values
            return whole | {"tokens": list(listed or ({"name": "<zorp>", "vectors": 2},))}

        return make

    @pytest.mark.parametrize(
        ("listed", "sections", "said"),
        [
            ([], {}, r"adapter: is missing: What may change"),
            ([{"name": "<zorp>"}] * 2, {}, r'tokens.1.name: "<zorp>" is a token already'),
            ([{"name": "<zorp>"}, {"name": "zorp"}], {}, r"tokens.1.name: .*contain each other"),
            ([{"name": "<Zorp>"}], {}, r'tokens.0.name: .*write "<zorp>"'),
            ([{"name": "<zo rp>"}], {}, r"tokens.0.name: "),
            ([{"name": "<zorp>"}, {"name": "<kohya>"}], {}, "name of an adapter file"),
            ([{"name": "<zorp>", "init": "x.pt"}], {}, r"tokens.0.init: .*is a pickle"),
            ([{"name": "<zorp>", "init": "x.safetensors"}], {}, r"tokens.0.init: there is no file"),
            ([{"name": "<zorp>", "vectors": 0}], {}, r"tokens.0.vectors: must be at least 1"),
            ([{"name": "<zorp>", "lr": 1}], {}, r"tokens.0.lr: unknown key.*learning_rate"),
            ([{"name": "<hat>"}], {}, r"data.trigger: .*says none of the tokens"),
            ([{"name": "<zorp>", "stop_at": 0.5}], {}, r"tokens.0.stop_at: .*no adapter"),
            (
                [{"name": "<zorp>", "keep_norm": True}],
                {"train": {"optimizer": "schedulefree_adamw"}},
                r"tokens.0.keep_norm: contradicts",
            ),
            (
                [{"name": "<zorp>"}],
                {"train": {"text_encoder_learning_rate": 0.1}},
                r"text_encoder_learning_rate: is set, but no adapter",
            ),
            ([{"name": "<zorp>"}], {"export": {"layouts": ["kohya"]}}, r"export.layouts: says how"),
            (
                [{"name": "<zorp>"}],
                {"data": {"prior": {"prompts": ["a <zorp>"]}}},
                r"data.prior.prompts: .*untouched base does not know",
            ),
        ],
    )
    def test_contradictions_are_refused(
        self, listed: Any, sections: Any, said: str, made: Callable[..., Tree]
    ) -> None:
        whole = made(**sections) | {"tokens": listed}
        with pytest.raises(RecipeError, match=said):
            recipe_from(whole)

    def test_a_recipe_comes_back_as_it_was_written(
        self, made: Callable[..., Tree], tmp_path: Path
    ) -> None:
        recipe = recipe_from(made(adapter=LORA))
        (tmp_path / "r.yaml").write_text(dump_yaml(recipe))
        assert load_recipe(tmp_path / "r.yaml") == recipe

    @pytest.mark.parametrize(
        ("token", "said"),
        [
            ({"name": "robot"}, r'knows "robot" already'),
            ({"name": "uare"}, r'"uare" is a part of "square"'),
            ({"name": "<zorp>", "init": "blargh"}, r'no word "blargh" \(read as .*\)'),
            ({"name": "<zorp>", "init": "red robot"}, "is 2 words, and <zorp> has 1 vectors"),
            ({"name": "<zorp>", "vectors": 60}, "a prompt has room for 14"),
        ],
    )
    def test_what_the_base_must_say_is_refused_before_anything_is_written(
        self, token: Any, said: str, made: Callable[..., Tree], tmp_path: Path
    ) -> None:
        whole = made(token, data={"trigger": token["name"], "class": "toy"})
        whole["data"]["class"] = "robot"
        if token["name"] == "robot":
            whole["data"]["class"] = "cat"
        with pytest.raises(UserError, match=said):
            tunekit.train(whole, out=tmp_path / "run", reporter=Silent())
        assert not (tmp_path / "run").exists()
        (tmp_path / "r.yaml").write_text(dump_yaml(recipe_from(whole)))
        found = [f for f in inspect(tmp_path / "r.yaml").findings if f.code == "tokens"]
        assert found
        assert found[0].severity == "error"

    def test_a_word_in_no_caption_is_an_error(
        self, made: Callable[..., Tree], tmp_path: Path
    ) -> None:
        whole = made({"name": "<zorp>"}, {"name": "<hat>"})
        (tmp_path / "r.yaml").write_text(dump_yaml(recipe_from(whole)))
        seen = inspect(tmp_path / "r.yaml")
        assert not seen.ok
        assert [f.text for f in seen.findings if f.code == "token-unsaid"] == [
            "no caption says <hat>, so it would learn nothing"
        ]
        with pytest.raises(UserError, match="no caption says <hat>"):
            tunekit.train(whole, out=tmp_path / "run", reporter=Silent())

    def test_articles_fit_a_word_in_brackets(self) -> None:
        from tunekit.data.captions import holds, insert_trigger

        assert insert_trigger("an owl", "<zorp>", "owl") == "a <zorp> owl"
        assert insert_trigger("a fox", "<umi>", "fox") == "an <umi> fox"
        assert holds("a <zorp>, waving", "<zorp>")
        assert not holds("a <zorp>x", "<zorp>")


class TestFiles:
    def test_two_words_are_two_files(self, tree: Callable[..., Tree], tmp_path: Path) -> None:
        whole: Any = tree(data={"trigger": "<zorp>"})
        whole["adapter"], whole["tokens"] = None, [ZORP.model_dump(), HAT.model_dump()]
        recipe = recipe_from(whole)
        family = families.load(recipe.base)
        adapter = attach(family, ZORP, HAT)
        teach(family, adapter)
        files = export_adapter(family, adapter, recipe, tmp_path)
        assert [(f.path.name, f.word) for f in files] == [
            ("tiny-zorp.safetensors", "<zorp>"),
            ("tiny-hat.safetensors", "<hat>"),
        ]
        fresh = families.load(recipe.base)
        for number, file in enumerate(files):
            load_file(fresh, file.path, str(number))
        assert torch.equal(encoded(fresh, NEW), encoded(family, NEW))
        assert RunFolder(tmp_path, recipe)

    @pytest.mark.parametrize(
        ("tensors", "said"),
        [
            ({"<zorp>": torch.ones(2, 31)}, "31 wide.*are 32 wide"),
            ({"<zorp>": torch.ones(0, 32)}, "no word has that"),
            ({"<zorp>": torch.ones(200, 32)}, "no word has that"),
            ({"<zorp>": torch.full((2, 32), float("nan"))}, "NaN"),
            ({"<zorp>": torch.ones(2, 32, dtype=torch.int64)}, "other than real numbers"),
            ({"a word": torch.ones(2, 32)}, "cannot stand in a prompt"),
            ({"robot": torch.ones(2, 32)}, 'knows "robot" already'),
            ({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(2, 40)}, "other text encoders"),
            ({"clip_l": torch.ones(2, 32), "clip_g": torch.ones(3, 40)}, "other numbers of"),
        ],
    )
    def test_hostile_files_are_refused(
        self, tensors: dict[str, Tensor], said: str, load_tiny: Load, tmp_path: Path
    ) -> None:
        path = tmp_path / "hostile.safetensors"
        save_file(tensors, path)
        family = load_tiny()
        before = encoded(family, OLD)
        with pytest.raises((UserError, VerificationError), match=said):
            load_file(family, path, "x")
        assert torch.equal(encoded(family, OLD), before)

    def test_pickles_are_refused(self, load_tiny: Load, tmp_path: Path) -> None:
        for name in ("zorp.pt", "zorp.bin", "zorp.safetensors"):
            path = tmp_path / name
            path.write_bytes(pickle.dumps({"string_to_param": {"*": [1.0]}}))
            with pytest.raises(UserError, match=str(path)):
                load(Base(model=load_tiny().label), [path])
            with pytest.raises(UserError, match=str(path)):
                describe(path)

    def test_files_of_other_trainers_are_read(self, load_tiny: Load, tmp_path: Path) -> None:
        rows = torch.randn(2, 32)
        path = tmp_path / "floof.safetensors"
        save_file({"emb_params": rows}, path)
        family = load_tiny()
        loaded = load_file(family, path, "x")
        assert loaded.tensors == 1
        assert torch.equal(loaded.changes["text_encoder/floof"](), rows)
        assert describe(path).words[0].word == "floof"

    def test_info_suspects_vectors_that_never_trained(self, tmp_path: Path) -> None:
        path = tmp_path / "zorp.safetensors"
        save_file({"<zorp>": torch.ones(3, 32)}, path)
        assert "vectors of <zorp> that are the same" in describe(path).suspicious[0]
