"""What a computation allocates, written down while it runs on tensors without content.

Under torch's FakeTensorMode every operation yields tensors of the right shape, type and device and
computes nothing. The ledger sees each of them come and go, saved for the backward pass or not.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tunekit.plan.heap import Heap

SAVED, GRADIENTS, PASSING = "saved for backward", "gradients", "temporaries"


@dataclass
class Phase:
    """A part of a run: the most bytes that lived at once in it, and which weights were read.

    peak: bytes by what they were for, at the moment of the most. read: bytes of weights by
    component that operations took in. held: the most bytes that the allocator held, 0 unasked.
    """

    name: str
    held: int = 0
    peak: dict[str, int] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """The most bytes at once."""
        return sum(self.peak.values())


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes down what is allocated and freed, by phase.

    weights: storage key -> (component, bytes) of what is there from the beginning, which is not
    written down but only whether it is read. heap: the allocator that is asked for the same.
    """

    def __init__(self, weights: Mapping[int, tuple[str, int]], heap: Heap | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._heap = heap
        self.phases: list[Phase] = []
        self._weights = weights
        self._live: dict[int, tuple[str, int]] = {}
        self._sums: dict[str, int] = {}
        self._read: set[int] = set()
        self._kept: dict[str, list[int]] = {}
        self._number = 0  # keys of what is kept count down; storages' are addresses

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Begin a phase of the run; what lives goes on living."""
        made = Phase(name, peak=dict(self._sums))
        if self._heap is not None:
            self._heap.begin()
        self.phases.append(made)
        self._read.clear()
        yield made
        if self._heap is not None:
            made.held = self._heap.most
        for key in self._read:
            component, size = self._weights[key]
            made.read[component] = made.read.get(component, 0) + size

    def keep(self, what: str, sizes: Iterable[int]) -> None:
        """Hold so many bytes each, such as an optimizer's state, until `drop`."""
        for size in sizes:
            self._number -= 1
            self._kept.setdefault(what, []).append(self._number)
            self._take(self._number, what, size)

    def drop(self, *names: str) -> None:
        """Let go of what was kept under these names."""
        for what in names:
            for key in self._kept.pop(what, []):
                self._give(key)

    def call(self, what: str, tensor: Tensor) -> None:
        """Say what a tensor is for."""
        key = tensor.untyped_storage()._cdata
        if key in self._live:
            before, size = self._live[key]
            self._sums[before] -= size
            self._sums[what] = self._sums.get(what, 0) + size
            self._live[key] = (what, size)

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Know what is saved for the backward pass as such."""

        def pack(tensor: Tensor) -> Tensor:
            self.call(SAVED, tensor)
            return tensor.detach()  # the tensor itself would hold what holds it

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Of a table of words only the rows asked for are read.
        if func is not torch.ops.aten.embedding.default:
            for taken in tree_iter((args, kwargs)):
                if isinstance(taken, Tensor):
                    key = taken.untyped_storage()._cdata
                    if key in self._weights:
                        self._read.add(key)
        made = func(*args, **(kwargs or {}))
        for tensor in tree_iter(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in self._live and key not in self._weights:
                    self._take(key, PASSING, storage.nbytes())
                    weakref.finalize(storage, self._give, key)
        return made

    def _take(self, key: int, what: str, size: int) -> None:
        self._live[key] = (what, size)
        self._sums[what] = self._sums.get(what, 0) + size
        if self._heap is not None:
            self._heap.take(key, size)
        if self.phases and sum(self._sums.values()) > self.phases[-1].bytes:
            self.phases[-1].peak = dict(self._sums)

    def _give(self, key: int) -> None:
        what, size = self._live.pop(key)
        self._sums[what] -= size
        if self._heap is not None:
            self._heap.give(key)


def hollow(modules: Mapping[str, nn.Module], mode: FakeTensorMode) -> Callable[[Tensor], Any]:
    """Put tensors without content in the place of all tensors on the device "meta" in modules.

    They claim to be on the CPU, so that operations choose what they choose there. Returns what
    gives, of a tensor that was replaced, the one that stands there now.
    """
    held: dict[int, tuple[Tensor, Tensor]] = {}  # the old ones too, whose ids must stay theirs

    def of(old: Tensor) -> Tensor:
        if id(old) not in held:
            with mode:
                made: Tensor = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                if isinstance(old, nn.Parameter):
                    made = nn.Parameter(made, requires_grad=old.requires_grad)
            held[id(old)] = (old, made)
        return held[id(old)][1]

    def put(own: dict[str, Any]) -> None:
        for name, value in own.items():
            if isinstance(value, Tensor) and value.is_meta:
                own[name] = of(value)
            elif isinstance(value, tuple) and any(isinstance(one, Tensor) for one in value):
                own[name] = tuple(of(one) for one in value)

    for whole in modules.values():
        for module in whole.modules():
            put(module._parameters)
            put(module._buffers)
            put(module.__dict__)
    return of
