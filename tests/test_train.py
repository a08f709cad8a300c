"""The loop: reproducible step by step, exact under accumulation, stopped before it does harm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tunekit import adapters, diffusion, seeding
from tunekit.adapters.base import Adapter
from tunekit.data.dataset import Batch
from tunekit.errors import UserError
from tunekit.families.base import Family
from tunekit.schema import Train
from tunekit.train import StepRecord, TrainingError, train

Load = Callable[..., Family]
CAPTIONS = ("a zorp robot", "a zorp robot on the beach", "a red robot", "")
NAMES = tuple(f"zorp/{i}.png" for i in range(4))


def attach(family: Family, seed: int = 0, **settings: Any) -> Adapter:
    lora = adapters.get("lora")
    return lora.attach(family, lora.Settings(kind="lora", **{"rank": 4} | settings), seed)


class Pictures:
    """Four pictures, handed out `size` at a time and in turn: micro-batch m of a step starts at
    m * size."""

    def __init__(self, family: Family, size: int = 4, text: bool = False) -> None:
        edge = family.default_resolution
        pixels = torch.rand(4, 3, edge, edge, generator=torch.Generator().manual_seed(9)) * 2 - 1
        self.latents = family.encode_image(pixels)
        self.conditioning = {} if text else family.encode_prompt(CAPTIONS)
        self.size = size
        self.asked: list[tuple[int, int]] = []

    def __call__(self, step: int, micro: int) -> Batch:
        self.asked.append((step, micro))
        rows = [(micro * self.size + i) % 4 for i in range(self.size)]
        return Batch(
            latents=self.latents[rows],
            conditioning={key: value[rows] for key, value in self.conditioning.items()},
            names=tuple(NAMES[i] for i in rows),
            captions=tuple(CAPTIONS[i] for i in rows),
        )


def settings(**values: Any) -> Train:
    return Train(**{"steps": 3, "batch_size": 4, "learning_rate": 1e-3} | values)


def run(
    load_tiny: Load, adapter: dict[str, Any] | None = None, size: int = 4, **values: Any
) -> Any:
    """Train afresh and return (state, records)."""
    family = load_tiny("sd", prediction_type="v_prediction")
    attached = attach(family, **adapter or {})
    encode = family.encode_prompt if attached.trains_text_encoder else None
    pictures = Pictures(family, size, text=encode is not None)
    records = list(train(family, attached, pictures, settings(**values), encode=encode))
    return attached.state(), records


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def untimed(records: Sequence[StepRecord]) -> list[StepRecord]:
    timed = {"images_per_second": 0.0, "seconds": 0.0, "memory_bytes": 0}
    return [dataclasses.replace(record, **timed) for record in records]


class TestReproducibility:
    @pytest.mark.parametrize(
        "adapter", [{}, {"dropout": 0.3}, {"text_encoder": True, "targets": "full"}]
    )
    def test_the_same_seed_twice_is_bit_equal(
        self, load_tiny: Load, adapter: dict[str, Any]
    ) -> None:
        torch.manual_seed(1)
        first, records = run(
            load_tiny, adapter, objective={"noise_offset": 0.05, "min_snr_gamma": 5.0}
        )
        torch.manual_seed(2)
        second, again = run(
            load_tiny, adapter, objective={"noise_offset": 0.05, "min_snr_gamma": 5.0}
        )
        assert_equal(first, second)
        assert untimed(records) == untimed(again)

    @pytest.mark.parametrize("adapter", [{}, {"dropout": 0.3}])
    def test_another_seed_is_another_run(self, load_tiny: Load, adapter: dict[str, Any]) -> None:
        first, _ = run(load_tiny, adapter)
        other, _ = run(load_tiny, adapter, seed=1)
        assert any(not torch.equal(first[name], other[name]) for name in first)

    def test_the_global_stream_is_left_alone(self, load_tiny: Load) -> None:
        torch.manual_seed(3)
        wanted = torch.rand(4)
        torch.manual_seed(3)
        run(load_tiny, {"dropout": 0.3})
        assert torch.equal(torch.rand(4), wanted)

    @pytest.mark.parametrize(("gamma", "offset"), [(None, 0.0), (5.0, 0.0), (None, 0.3)])
    def test_any_step_can_be_computed_alone(
        self, load_tiny: Load, gamma: float | None, offset: float
    ) -> None:
        """Step 2's loss, from the definition: the noise and timesteps hang on the seed alone."""
        family = load_tiny("sd", prediction_type="v_prediction")
        adapter, pictures = attach(family), Pictures(family)
        chosen = settings(
            learning_rate=0.0,
            seed=11,
            objective={"min_snr_gamma": gamma, "noise_offset": offset},
        )
        record = list(train(family, adapter, pictures, chosen))[2]
        t = diffusion.sample_timesteps(family.schedule, 4, seeding.generator(11, "timesteps", 2))
        x = pictures.latents
        noise = torch.empty_like(x)
        for i in range(4):
            draw = seeding.generator(11, f"noise/{i}", 2)
            noise[i] = torch.randn(x.shape[1:], generator=draw)
            noise[i] += offset * torch.randn(len(x[i]), 1, 1, generator=draw)
        a = family.schedule.alphas_cumprod[t].reshape(-1, 1, 1, 1)
        with torch.no_grad():
            prediction = family.predict(
                a.sqrt() * x + (1 - a).sqrt() * noise, t, pictures.conditioning
            )
        wanted = a.sqrt() * noise - (1 - a).sqrt() * x
        snr = a / (1 - a)
        weight = snr.clamp(max=gamma) / (snr + 1) if gamma else torch.ones_like(a)
        loss = (weight * (prediction - wanted).square()).mean().item()
        assert record.loss == pytest.approx(loss, rel=1e-5)

    def test_a_loop_started_later_goes_on_with_the_same_steps(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        pictures = Pictures(family)
        whole = list(train(family, attach(family), pictures, settings(learning_rate=0.0)))
        family = load_tiny("sd")
        late = Pictures(family)
        part = list(train(family, attach(family), late, settings(learning_rate=0.0), start=2))
        assert untimed(part) == untimed(whole[2:])
        assert late.asked == [(2, 0)]


class TestAccumulation:
    @pytest.mark.parametrize("size", [1, 2])
    @pytest.mark.parametrize("gamma", [None, 5.0])
    def test_parts_equal_the_whole_batch(
        self, load_tiny: Load, size: int, gamma: float | None
    ) -> None:
        whole, records = run(load_tiny, objective={"min_snr_gamma": gamma})
        parts, again = run(
            load_tiny,
            size=size,
            batch_size=size,
            gradient_accumulation=4 // size,
            objective={"min_snr_gamma": gamma},
        )
        for one, other in zip(records, again, strict=True):
            assert one.loss == pytest.approx(other.loss, rel=1e-5)
            assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        for name in whole:
            # Adam's first steps are the gradient's sign: where that is 0, rounding decides.
            assert (whole[name] - parts[name]).abs().mean() < 2e-6, name

    def test_gradients_equal_those_of_the_whole_batch(self, load_tiny: Load) -> None:
        """Read off as the change by plain steps, which show a gradient as it is."""
        gradients = []
        for size in (4, 1):
            family = load_tiny("sd")
            adapter = attach(family)
            seen = watch_gradients(adapter)
            chosen = settings(
                steps=1, batch_size=size, gradient_accumulation=4 // size, max_grad_norm=0.0
            )
            list(train(family, adapter, Pictures(family, size), chosen))
            gradients.append(seen)
        assert gradients[0].keys() == gradients[1].keys()
        assert gradients[0]
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradient, gradients[1][name], atol=1e-6, rtol=1e-4)

    def test_batches_are_asked_for_in_order(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        pictures = Pictures(family, 2)
        chosen = settings(steps=2, batch_size=2, gradient_accumulation=2)
        list(train(family, attach(family), pictures, chosen))
        assert pictures.asked == [(0, 0), (0, 1), (1, 0), (1, 1)]


def watch_gradients(adapter: Adapter) -> dict[str, Tensor]:
    """Return a dict that fills with what has been accumulated in each parameter."""
    seen: dict[str, Tensor] = {}
    for name, parameter in adapter.trained().items():

        def keep(p: Tensor, name: str = name) -> None:
            assert p.grad is not None
            seen[name] = p.grad.clone()

        parameter.register_post_accumulate_grad_hook(keep)
    return seen


class TestWeights:
    """What a batch says its pictures count, and pictures of the class beside them."""

    @pytest.fixture
    def family(self, load_tiny: Load) -> Family:
        return load_tiny("sd")

    @pytest.fixture
    def record(self, family: Family) -> Callable[..., StepRecord]:
        """Return a function that gives a step's record; nothing is learned between two."""
        adapter = attach(family)

        def step(batches: Any, **values: Any) -> StepRecord:
            chosen = settings(steps=1, learning_rate=0.0, **values)
            return next(train(family, adapter, batches, chosen))

        return step

    def losses(self, record: Any, pictures: Pictures) -> list[float]:
        """Return each picture's loss in the first step, with the noise of its own place."""
        rows = []
        for row in range(4):
            weights = torch.zeros(4)
            weights[row] = 4
            batch = dataclasses.replace(pictures(0, 0), weights=weights)
            rows.append(record(lambda step, micro, b=batch: b).loss)
        return rows

    def test_a_weight_multiplies_a_pictures_loss(self, family: Family, record: Any) -> None:
        pictures = Pictures(family)
        each = self.losses(record, pictures)
        assert record(pictures).loss == pytest.approx(sum(each) / 4, rel=1e-5)
        weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
        batch = dataclasses.replace(pictures(0, 0), weights=weights)
        found = record(lambda step, micro: batch).loss
        wanted = sum(w * loss for w, loss in zip(weights.tolist(), each, strict=True)) / 4
        assert found == pytest.approx(wanted, rel=1e-5)

    def test_weights_count_the_same_in_parts(self, family: Family, record: Any) -> None:
        weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
        whole, halves = Pictures(family), Pictures(family, 2)

        def weighted(pictures: Pictures) -> Callable[[int, int], Batch]:
            def batches(step: int, micro: int) -> Batch:
                rows = weights[micro * pictures.size :][: pictures.size]
                return dataclasses.replace(pictures(step, micro), weights=rows)

            return batches

        one = record(weighted(whole))
        other = record(weighted(halves), batch_size=2, gradient_accumulation=2)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)

    def test_only_what_the_mask_shows_is_learned_from(self, family: Family, record: Any) -> None:
        pictures = Pictures(family)
        batch = pictures(0, 0)
        mask = torch.ones(4, 1, *batch.latents.shape[2:])
        ones = dataclasses.replace(batch, mask=mask)
        plain = record(pictures)
        assert record(lambda step, micro: ones).loss == pytest.approx(plain.loss)
        mask = torch.zeros_like(mask)
        mask[..., : mask.shape[-1] // 2] = 1
        half = dataclasses.replace(batch, mask=mask)
        left = record(lambda step, micro: half)
        # The same in numbers of its own: the loss by hand, from the definition.
        t = diffusion.sample_timesteps(family.schedule, 4, seeding.generator(0, "timesteps", 0))
        noise = torch.stack(
            [
                diffusion.sample_noise(
                    tuple(batch.latents.shape[1:]), seeding.generator(0, f"noise/{i}", 0)
                )
                for i in range(4)
            ]
        )
        noisy = diffusion.add_noise(family.schedule, batch.latents, noise, t)
        with torch.no_grad():
            off = family.predict(noisy, t, batch.conditioning) - diffusion.target(
                family.schedule, batch.latents, noise, t
            )
        edge = batch.latents.shape[-1] // 2
        assert left.loss == pytest.approx(off[..., :edge].square().mean().item(), rel=1e-5)
        assert left.loss != pytest.approx(plain.loss, rel=1e-3)

    def test_pictures_of_the_class_stand_beside_the_subject(
        self, family: Family, record: Any
    ) -> None:
        """Their loss is added with their weight, and the subject's draws stay what they were."""
        pictures = Pictures(family)
        batch = pictures(0, 0)
        alone = record(pictures)
        assert alone.prior_loss is None
        found = {}
        for weight in (1.0, 0.25):
            prior = dataclasses.replace(
                batch, prior=True, weights=torch.full((4,), weight), names=("class",) * 4
            )
            told = record(lambda step, micro, p=prior: [batch, p])
            assert told.loss == pytest.approx(alone.loss, rel=1e-5)
            found[weight] = told
        first, other = found[1.0].prior_loss, found[0.25].prior_loss
        assert first is not None
        assert other == pytest.approx(first / 4)
        # Noise and timesteps of their own: the same pictures, another loss.
        assert first != pytest.approx(alone.loss, rel=1e-3)
        assert found[1.0].grad_norm != pytest.approx(alone.grad_norm, rel=1e-3)

    def test_pictures_of_the_class_have_a_mean_of_their_own(
        self, family: Family, record: Any
    ) -> None:
        """However many stand beside a step, and however they are cut: of another shape, too."""
        pictures, halves = Pictures(family), Pictures(family, 2)
        whole = dataclasses.replace(pictures(0, 0), prior=True)
        one = record(lambda step, micro: [pictures(step, micro), whole])

        def cut(step: int, micro: int) -> list[Batch]:
            part = halves(step, micro)
            return [part, dataclasses.replace(part, prior=True)]

        other = record(cut, batch_size=2, gradient_accumulation=2)
        assert one.loss == pytest.approx(other.loss, rel=1e-5)
        assert one.prior_loss == pytest.approx(other.prior_loss, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-4)
        wide = dataclasses.replace(whole, latents=whole.latents.repeat(1, 1, 1, 2))
        assert record(lambda step, micro: [pictures(0, 0), wide]).loss == one.loss

    @pytest.mark.parametrize("marked", ["subject", "class", "both", "none"])
    def test_pictures_of_one_shape_share_a_pass_and_change_nothing_by_it(
        self, family: Family, record: Any, marked: str
    ) -> None:
        """What one kind says of its pictures (weights, masks) is not said of the other's."""
        pictures, counts = Pictures(family), list[int]()
        family.denoiser.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
        batch = pictures(0, 0)
        mask = torch.zeros_like(batch.latents[:, :1])
        mask[..., :2] = 1
        says = {"weights": torch.tensor([1.0, 0.5, 2.0, 0.25]), "mask": mask}
        subject = dataclasses.replace(batch, **says if marked in ("subject", "both") else {})
        own = {"prior": True, "names": ("class",) * 4}
        prior = dataclasses.replace(batch, **own | (says if marked in ("class", "both") else {}))
        wide = dataclasses.replace(prior, latents=prior.latents.repeat(1, 1, 1, 2), mask=None)
        alone, other = record(lambda *_: subject), record(lambda *_: [pictures(0, 0), prior])
        assert counts == [4, 8]
        both = record(lambda *_: [subject, prior])
        assert both.loss == pytest.approx(alone.loss, rel=1e-5)
        assert both.prior_loss == pytest.approx(other.prior_loss, rel=1e-5)
        assert both.images_per_second * both.seconds == pytest.approx(8)
        counts.clear()
        assert record(lambda *_: [subject, wide]).loss == pytest.approx(alone.loss, rel=1e-5)
        assert counts == [4, 4]
        counts.clear()
        record(lambda *_: [subject, prior], batch_size=2, gradient_accumulation=2)
        assert counts == [8, 8]

    def test_a_bad_picture_of_the_class_is_named(self, family: Family, record: Any) -> None:
        batch = Pictures(family)(0, 0)
        bad = batch.latents.clone()
        bad[2] = math.nan
        prior = dataclasses.replace(
            batch, latents=bad, prior=True, names=tuple(f"prior/{i}" for i in range(4))
        )
        with pytest.raises(TrainingError, match=r"with prior/2 \(timestep \d+, \"a red robot\"\);"):
            record(lambda step, micro: [batch, prior])


class TestGuards:
    def broken(self, family: Family, row: int, value: float) -> Pictures:
        pictures = Pictures(family)
        plain = pictures.__call__

        class Broken(Pictures):
            def __init__(self) -> None:
                self.asked = []

            def __call__(self, step: int, micro: int) -> Batch:
                batch = plain(step, micro)
                if step < 2:
                    return batch
                latents = batch.latents.clone()
                latents[row, 0, 0, 0] = value
                return dataclasses.replace(batch, latents=latents)

        return Broken()

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_loss_that_is_not_finite_stops_before_the_step(
        self, load_tiny: Load, value: float
    ) -> None:
        family = load_tiny("sd")
        adapter = attach(family)
        steps = train(family, adapter, self.broken(family, 1, value), settings(steps=5))
        next(steps), next(steps)
        good = adapter.state()
        with pytest.raises(TrainingError) as caught:
            next(steps)
        line = str(caught.value)
        assert line.startswith("step 3 of 5: the loss is ")
        assert "zorp/1.png (timestep " in line
        assert "zorp/0.png" not in line, "only the picture at fault is named"
        assert "train.learning_rate" in line
        assert "\n" not in line
        assert isinstance(caught.value, UserError)
        assert (caught.value.step, caught.value.names) == (3, ("zorp/1.png",))
        assert_equal(good, adapter.state())
        assert all(p.grad is None for p in adapter.trained().values())

    def test_a_gradient_that_is_not_finite_stops_before_the_step(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        adapter = attach(family)
        steps = train(family, adapter, Pictures(family), settings(steps=5))
        next(steps)
        good = adapter.state()
        parameter = next(iter(adapter.trained().values()))
        parameter.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
        with pytest.raises(TrainingError) as caught:
            next(steps)
        line = str(caught.value)
        assert line.startswith("step 2 of 5: the gradient's norm is ")
        assert all(name in line for name in NAMES)
        assert_equal(good, adapter.state())

    def test_weights_blown_up_by_the_rate_are_found(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        steps = train(
            family,
            attach(family, targets="full"),
            Pictures(family),
            settings(learning_rate=10.0, steps=2000),
        )
        with pytest.raises(TrainingError, match="it is 10"):
            list(steps)

    def test_fp16_without_a_gpu_is_refused_at_once(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        with pytest.raises(UserError, match=r"train\.precision: fp16 needs a GPU"):
            train(family, attach(family), Pictures(family), settings(precision="fp16"))


class TestLearning:
    @pytest.mark.parametrize("adapter", [{}, {"text_encoder": True, "dropout": 0.2}])
    def test_a_rate_of_0_changes_nothing(self, load_tiny: Load, adapter: dict[str, Any]) -> None:
        family = load_tiny("sd")
        attached = attach(family, **adapter)
        before = attached.state()
        encode = family.encode_prompt if attached.trains_text_encoder else None
        pictures = Pictures(family, text=encode is not None)
        chosen = settings(learning_rate=0.0, weight_decay=0.1)
        records = list(train(family, attached, pictures, chosen, encode=encode))
        assert_equal(before, attached.state())
        assert all(r.lr == 0 and r.grad_norm > 0 for r in records)

    @pytest.mark.parametrize(("text_rate", "moves"), [(0.0, False), (1e-3, True)])
    def test_the_text_encoder_has_a_rate_of_its_own(
        self, load_tiny: Load, text_rate: float, moves: bool
    ) -> None:
        family = load_tiny("sd")
        adapter = attach(family, text_encoder=True)
        before = adapter.state()
        chosen = settings(text_encoder_learning_rate=text_rate)
        pictures = Pictures(family, text=True)
        list(train(family, adapter, pictures, chosen, encode=family.encode_prompt))
        for name, value in adapter.state().items():
            moved = not torch.equal(before[name], value)
            assert moved is (moves or name.startswith("denoiser.")), name

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_one_picture_is_learned(self, load_tiny: Load, precision: str) -> None:
        """The error at fixed noise and timesteps falls; the two share a process."""
        family = load_tiny("sd", prediction_type="v_prediction")
        adapter, pictures = attach(family, targets="full", rank=8), Pictures(family)
        before = error(family, pictures)
        chosen = settings(steps=60, learning_rate=5e-3, precision=precision)
        records = list(train(family, adapter, pictures, chosen))
        assert all(p.dtype == torch.float32 for p in adapter.trained().values())
        assert error(family, pictures) < 0.7 * before
        assert records[-1].loss < records[0].loss

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])
    def test_the_precision_is_what_is_computed_in(self, load_tiny: Load, precision: str) -> None:
        """Every layer's output has it; what is trained keeps its digits in fp32."""
        family = load_tiny("sd")
        adapter, pictures = attach(family), Pictures(family)
        seen: set[torch.dtype] = set()
        for layer in family.denoiser.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                layer.register_forward_hook(lambda layer, args, out: seen.add(out.dtype))
        list(train(family, adapter, pictures, settings(steps=1, precision=precision)))
        assert seen == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert {p.dtype for p in adapter.trained().values()} == {torch.float32}

    def test_clipping_shortens_the_step_and_reports_the_norm_before(self, load_tiny: Load) -> None:
        for limit in (1e-3, 0.0):
            family = load_tiny("sd")
            adapter = attach(family)
            clipped: dict[str, float] = {}

            def look(optimizer: Any, *_: Any, clipped: dict[str, float] = clipped) -> None:
                grads = [p.grad for g in optimizer.param_groups for p in g["params"]]
                clipped["norm"] = torch.stack([g.norm() for g in grads]).norm().item()

            handle = register_optimizer_step_pre_hook(look)
            chosen = settings(steps=1, max_grad_norm=limit)
            record = next(train(family, adapter, Pictures(family), chosen))
            handle.remove()
            assert record.grad_norm > 1e-3
            wanted = limit or record.grad_norm
            assert clipped["norm"] == pytest.approx(wanted, rel=1e-2)

    def test_between_steps_the_adapter_draws_without_dropout(self, load_tiny: Load) -> None:
        family = load_tiny("sd")
        adapter = attach(family, dropout=0.5)
        pictures = Pictures(family)
        for _ in train(family, adapter, pictures, settings()):
            assert error(family, pictures) == error(family, pictures)
            assert all(p.grad is None for p in adapter.trained().values())

    def test_records_say_what_happened(self, load_tiny: Load) -> None:
        _, records = run(load_tiny, steps=4, schedule="linear")
        assert [r.step for r in records] == [1, 2, 3, 4]
        assert {r.steps for r in records} == {4}
        assert [r.lr for r in records] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])
        for record in records:
            assert record.loss > 0
            assert record.grad_norm > 0
            assert record.images_per_second == pytest.approx(4 / record.seconds)
            assert record.memory_bytes > 50_000_000
            assert not record.skipped


@torch.no_grad()
def error(family: Family, pictures: Pictures) -> float:
    t = torch.tensor([100, 400, 700, 950])
    noise = torch.randn(pictures.latents.shape, generator=torch.Generator().manual_seed(4))
    noisy = diffusion.add_noise(family.schedule, pictures.latents, noise, t)
    prediction = family.predict(noisy, t, pictures.conditioning)
    wanted = diffusion.target(family.schedule, pictures.latents, noise, t)
    return (prediction - wanted).square().mean().item()
