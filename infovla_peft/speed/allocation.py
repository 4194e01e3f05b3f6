"""How much memory some work takes at its peak.

On a CPU there is no counter of live tensors, and a process's peak RSS holds whatever the allocator keeps, the
libraries, and all contestants of one process at once. So the allocations and releases that torch's profiler records
are added up in the order of their times: exact to the byte, the same in every run, and of this work alone. On a GPU
it is the allocator's own peak counter.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile


class PeakMemory:
    """Measures what runs inside it, in this thread.

    Args:
        device: whose memory.

    Attributes:
        peak: bytes that lived at the peak, beyond those that lived before; known on leaving.

    Example:
        >>> with PeakMemory() as memory:
        ...     _ = torch.ones(256).square().square().sum()
        >>> memory.peak  # two vectors of 256 float32 at a time
        2048
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)
        self._before = self.peak = 0
        self._profile: Any = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
        else:
            self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profile is None:
            torch.cuda.synchronize(self._device)
            self.peak = int(torch.cuda.max_memory_allocated(self._device)) - self._before
            return
        self._profile.__exit__(kind, error, trace)
        events = self._profile.profiler.kineto_results.events()
        changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
        live = 0
        for _, change in changes:
            live += change
            self.peak = max(self.peak, live)


def resident_memory(*holders: nn.Module | torch.optim.Optimizer | Iterable[Tensor] | None) -> int:
    """Bytes of modules (parameters, gradients, buffers), optimisers and iterables of tensors, each storage once."""
    storages: dict[int, int] = {}
    for holder in holders:
        for tensor in _tensors(holder):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(holder: Any) -> Iterable[Tensor]:
    if holder is None:
        return
    if isinstance(holder, nn.Module):
        for parameter in holder.parameters():
            yield parameter
            if parameter.grad is not None:
                yield parameter.grad
        yield from holder.buffers()
    elif hasattr(holder, "param_groups"):
        for state in holder.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
    else:
        yield from holder
