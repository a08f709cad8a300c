"""The loop: reproducible step by step, exact under accumulation, stopped before it does harm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from looped import Load, Pictures, assert_equal, attach, run, settings, untimed, watch_gradients
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tunekit import diffusion, seeding
from tunekit.families.base import Family
from tunekit.train import train


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
