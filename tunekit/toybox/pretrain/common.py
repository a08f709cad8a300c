"""What every pretraining stage shares: the optimizer, the resumable loop and its log."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

Step = Callable[[int], dict[str, torch.Tensor]]


def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Frugal:
    """Muon on every matrix and convolution, AdamW on the rest: few samples go a long way.

    Muon is torch's own, which takes 2-D tensors; convolutions are handed to it as views
    [out, in*k*k] that share their storage. Source: Jordan et al. 2024, torch.optim.Muon.
    """

    def __init__(self, modules: list[nn.Module], lr: float, weight_decay: float = 0.01) -> None:
        named = [(n, p) for m in modules for n, p in m.named_parameters() if p.requires_grad]
        tables = ("embedding", "embed_tokens", "conv_in", "conv_out", "logit_scale")
        is_matrix = [p.ndim >= 2 and not any(t in n for t in tables) for n, p in named]
        self.matrices = [p for (_, p), m in zip(named, is_matrix, strict=True) if m]
        self.others = [p for (_, p), m in zip(named, is_matrix, strict=True) if not m]
        self.views = [nn.Parameter(p.data.view(p.shape[0], -1)) for p in self.matrices]
        self.muon = torch.optim.Muon(
            self.views, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(self.others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
        self.lr = lr

    def step(self, share: float, max_norm: float = 1.0) -> float:
        """Clip, then step both at `share` (0..1) of the learning rate; gives the gradient norm."""
        norm = nn.utils.clip_grad_norm_([*self.matrices, *self.others], max_norm)
        for view, parameter in zip(self.views, self.matrices, strict=True):
            grad = parameter.grad
            view.grad = None if grad is None else grad.view(parameter.shape[0], -1)
        for optimizer in (self.muon, self.adamw):
            for group in optimizer.param_groups:
                group["lr"] = self.lr * share
            optimizer.step()  # type: ignore[no-untyped-call]
        for parameter in [*self.matrices, *self.others]:
            parameter.grad = None
        return float(norm)

    def state(self) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        for name, optimizer in (("muon", self.muon), ("adamw", self.adamw)):
            for index, slots in optimizer.state_dict()["state"].items():
                for slot, value in slots.items():
                    found[f"{name}.{index}.{slot}"] = torch.as_tensor(value)
        return found

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        for name, optimizer in (("muon", self.muon), ("adamw", self.adamw)):
            slots: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in state.items():
                owner, index, slot = key.split(".", 2)
                if owner == name:
                    slots.setdefault(int(index), {})[slot] = value
            whole = optimizer.state_dict()
            whole["state"] = slots
            optimizer.load_state_dict(whole)


@dataclass
class Stage:
    """One resumable training stage that leaves `folder/state.safetensors` and `log.jsonl`."""

    folder: Path
    modules: dict[str, nn.Module]
    optimizer: Frugal
    steps: int
    warmup: int = 100
    cooldown: float = 0.3  # share of the steps over which the learning rate falls to 0
    ema: float = 0.0  # decay of the average kept beside the weights; 0 keeps none
    save_every_seconds: float = 120.0
    writes: bool = True  # False for all but the first of several processes

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.step = 0
        self.samples = 0
        self.average = (
            {f"{m}.{n}": v.detach().clone() for m, mod in self.modules.items()
             for n, v in mod.state_dict().items()} if self.ema else {}
        )  # fmt: skip
        self._resume()

    def share(self, step: int) -> float:
        """Learning-rate factor: linear warm-up, constant, linear fall to zero."""
        rise = min(1.0, (step + 1) / self.warmup)
        fall = (self.steps - step) / max(1.0, self.cooldown * self.steps)
        return min(rise, max(0.0, fall), 1.0)

    def run(self, do: Step, batch: int) -> None:
        """Call `do(step) -> {"loss": ..., ...}`, step the optimizer, log, save; until done."""
        last_save = last_log = time.monotonic()
        since = self.step
        while self.step < self.steps:
            values = do(self.step)
            values["loss"].backward()  # type: ignore[no-untyped-call]
            norm = self.optimizer.step(self.share(self.step))
            self.step += 1
            self.samples += batch
            self._average()
            now = time.monotonic()
            if self.writes and (now - last_log > 10 or self.step == self.steps):
                speed = (self.step - since) * batch / (now - last_log)
                self._log({k: float(v.detach()) for k, v in values.items()}, norm, speed)
                last_log, since = now, self.step
            if self.writes and (now - last_save > self.save_every_seconds
                                or self.step == self.steps):  # fmt: skip
                self.save()
                last_save = now

    def _average(self) -> None:
        if not self.ema:
            return
        decay = min(self.ema, (1 + self.step) / (10 + self.step))
        for m, module in self.modules.items():
            for n, value in module.state_dict().items():
                kept = self.average[f"{m}.{n}"]
                if value.is_floating_point():
                    kept.lerp_(value.detach(), 1 - decay)
                else:
                    kept.copy_(value)

    def _log(self, values: dict[str, float], norm: float, speed: float) -> None:
        left = (self.steps - self.step) * (self.samples / max(1, self.step)) / max(speed, 1e-6)
        line: dict[str, Any] = {
            "step": self.step, "samples": self.samples, **values, "grad_norm": norm,
            "samples_per_second": speed,
        }  # fmt: skip
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        told = "  ".join(f"{k} {v:.4f}" for k, v in values.items())
        print(
            f"{self.folder.name}: step {self.step}/{self.steps}  {told}  "
            f"{speed:.0f} samples/s  {left / 60:.1f} min left",
            flush=True,
        )

    def save(self) -> None:
        """Write everything needed to go on, atomically."""
        tensors = {f"average.{k}": v.contiguous() for k, v in self.average.items()}
        for m, module in self.modules.items():
            tensors |= {f"module.{m}.{n}": v.detach().contiguous().clone()
                        for n, v in module.state_dict().items()}  # fmt: skip
        tensors |= {f"optimizer.{k}": v.contiguous() for k, v in self.optimizer.state().items()}
        meta = {"step": str(self.step), "samples": str(self.samples)}
        target = self.folder / "state.safetensors"
        save_file(tensors, target.with_suffix(".new"), meta)
        os.replace(target.with_suffix(".new"), target)

    def _resume(self) -> None:
        path = self.folder / "state.safetensors"
        if not path.exists():
            return
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            meta = file.metadata()
        state = load_file(path)
        self.step, self.samples = int(meta["step"]), int(meta["samples"])
        for m, module in self.modules.items():
            head = f"module.{m}."
            module.load_state_dict({k[len(head):]: v for k, v in state.items()
                                    if k.startswith(head)})  # fmt: skip
        for key in self.average:
            self.average[key].copy_(state[f"average.{key}"])
        self.optimizer.load_state(
            {k.removeprefix("optimizer."): v for k, v in state.items()
             if k.startswith("optimizer.")}
        )  # fmt: skip
        print(f"{self.folder.name}: goes on at step {self.step}", flush=True)

    def averaged(self, module: str) -> dict[str, torch.Tensor]:
        """The state dict of one module: the average where one is kept."""
        if not self.ema:
            return self.modules[module].state_dict()
        head = f"{module}."
        return {k[len(head) :]: v for k, v in self.average.items() if k.startswith(head)}


def batches(size: int, batch: int, step: int, seed: int) -> Iterator[int]:
    """Indices of one step's batch: a function of the step alone, so that resuming is exact.

    Every epoch is a fresh permutation of 0..size-1.
    """
    import numpy as np

    first = step * batch
    for position in range(first, first + batch):
        epoch, place = divmod(position, size)
        yield int(_permutation(np, size, seed, epoch)[place])


_KEPT: dict[tuple[int, int, int], Any] = {}


def _permutation(np: Any, size: int, seed: int, epoch: int) -> Any:
    key = (size, seed, epoch)
    if key not in _KEPT:
        if len(_KEPT) > 3:
            _KEPT.clear()
        _KEPT[key] = np.random.default_rng([seed, epoch]).permutation(size)
    return _KEPT[key]
