"""What a picture weighs in the loss: by its mask and its class, in one pass or in parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from looped import Load, Pictures, attach, settings

from tunekit import diffusion, seeding
from tunekit.data.dataset import Batch
from tunekit.families.base import Family
from tunekit.train import StepRecord, TrainingError, train


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
        far = dataclasses.replace(batch, latents=batch.latents.repeat(1, 1, 1, 2))  # another shape
        alone, other = record(lambda *_: subject), record(lambda *_: [far, prior])
        assert counts == [4, 4, 4]
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
