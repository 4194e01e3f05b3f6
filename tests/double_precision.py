"""A Llama decoder in double precision throughout, in transformers 4.40 as in 5: nothing rounds by the processor."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn


class _TorchInDouble:
    """The module `torch` with double precision under the name of single precision."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.double()


@contextmanager
def compute_in_double(model: nn.Module, modeling_llama: Any) -> Iterator[None]:
    """Llama's norms, rotary angles and logits go through single precision whatever the model's type: not in here.

    Args:
        model: its weights in double precision already.
        modeling_llama: the module of transformers that `model`'s decoder is of.
    """
    for module in model.modules():
        if isinstance(frequencies := getattr(module, "inv_freq", None), Tensor):
            size = 2 * len(frequencies)
            base = getattr(module, "base", None) or module.config.rope_parameters["rope_theta"]  # type: ignore[union-attr]
            module.inv_freq = base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    with (
        mock.patch.object(modeling_llama, "torch", _TorchInDouble()),
        mock.patch.object(Tensor, "float", _in_double),
    ):
        yield
