"""`torch.compile`, block by block: each transformer block is compiled alone, the model around it runs as it is.

Blocks of one kind share their compiled code, so the wait does not grow with the depth. The tapped layer is left as it
is: compiled code would leave out the hook that reads its output.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .adapters import base_model


def repeated_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of a model by name that stand in a list of at least two of one kind, no two within each other."""
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        alike = isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(block) for block in module}) == 1
        if alike and not any(name.startswith(f"{outer}.") for outer in blocks):
            blocks |= {f"{name}.{index}": block for index, block in module.named_children()}
    return blocks


def check_compilable(device: str) -> None:
    """Fail before the training rather than in its first step.

    Raises:
        ValueError: code for the processor needs a C++ compiler, and there is none that works.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    if device == "cpu":
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise ValueError(
                "torch_compile needs a C++ compiler: install one (`apt-get install g++`), name it in the variable "
                "CXX, or train without torch_compile"
            ) from error


@contextmanager
def compiled_blocks(model: nn.Module, tap_layer: int, *, backend: str = "inductor") -> Iterator[list[str]]:
    """Within this, the blocks of a model run compiled; weights, names and what is saved stay as they are.

    Args:
        model: an OpenVLA, with or without adapters.
        tap_layer: the layer that is read by a hook, as in `InfoVLAConfig`.
        backend: of `torch.compile`.

    Yields:
        Names of the compiled modules.
    """
    inner: Any = base_model(model)
    tapped = inner.tap_module(tap_layer)
    blocks = {name: block for name, block in repeated_blocks(inner).items() if block is not tapped}
    for block in blocks.values():
        block.compile(backend=backend)
    try:
        yield list(blocks)
    finally:
        for block in blocks.values():
            block._compiled_call_impl = None
