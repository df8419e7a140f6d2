"""Race detector for global memory between two barriers of a program, in Triton's interpreter.

The interpreter runs a block's operations one after another, so it hides a missing barrier. On a GPU another thread may
already store, or not yet have stored, what an operation loads. :class:`Watch` fails where the order would matter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter


class Watch:
    """Fails at an access out of a launch's tensors, and where two threads or two programs could race.

    Between two barriers nothing is loaded or stored that was stored. Nothing is stored that was loaded either, but at
    the addresses of one of the last three loads: a value that is read, changed and written back.

    Attributes:
        accesses: operations that were watched
        phases: barriers that were passed
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        """Watch the launches of ``module``, one of metakern.triton."""
        self.accesses = self.phases = 0
        self._program: Any = None
        self._ranges = np.zeros((0, 2), np.uint64)
        self._written: dict[int, Any] = {}
        self._read: dict[int, Any] = {}
        self._new_phase()
        self._patch(monkeypatch, module)

    def _patch(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        builder, launch = interpreter.InterpreterBuilder, module.launch
        load, store, barrier = builder.create_masked_load, builder.create_masked_store, builder.create_barrier

        def watched_load(self_: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            self._load(self_.grid_idx, pointers.data[mask.data])
            return load(self_, pointers, mask, *rest)

        def watched_store(self_: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._store(self_.grid_idx, pointers.data[mask.data])
            return store(self_, pointers, value, mask, *rest)

        def watched_barrier(self_: Any) -> Any:
            self.phases += 1
            self._new_phase()
            return barrier(self_)

        def watched_launch(kernel: Any, grid: int, config: Any, *args: Any, **constants: Any) -> None:
            tensors = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor) and x.numel()]
            pairs = sorted((x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in tensors)
            self._ranges = np.array(pairs, np.uint64)
            self._written, self._read, self._program = {}, {}, None
            launch(kernel, grid, config, *args, **constants)

        monkeypatch.setattr(builder, "create_masked_load", watched_load)
        monkeypatch.setattr(builder, "create_masked_store", watched_store)
        monkeypatch.setattr(builder, "create_barrier", watched_barrier)
        monkeypatch.setattr(module, "launch", watched_launch)

    def _new_phase(self) -> None:
        self._loads: list[frozenset[int]] = []
        self._stored: set[int] = set()

    def _begin(self, program: Any, addresses: np.ndarray) -> frozenset[int]:
        if program != self._program:
            self._program = program
            self._new_phase()
        self.accesses += 1
        inside = np.zeros(addresses.shape, bool)
        for first, end in self._ranges:
            inside |= (addresses >= first) & (addresses < end)
        assert inside.all(), "an access out of the tensors of the launch"
        result = frozenset(addresses.ravel().tolist())
        assert self._stored.isdisjoint(result), "an access to what the same phase has stored"
        assert all(self._written.get(a, program) == program for a in result), "two programs share what one writes"
        return result

    def _load(self, program: Any, addresses: np.ndarray) -> None:
        loaded = self._begin(program, addresses)
        self._loads.append(loaded)
        self._read.update(dict.fromkeys(loaded, program))

    def _store(self, program: Any, addresses: np.ndarray) -> None:
        stored = self._begin(program, addresses)
        for age, loaded in enumerate(reversed(self._loads)):
            same = age < 3 and loaded == stored
            assert same or loaded.isdisjoint(stored), "a store of what the same phase has loaded"
        assert all(self._read.get(a, program) == program for a in stored), "two programs share what one writes"
        self._stored |= stored
        self._written.update(dict.fromkeys(stored, program))
