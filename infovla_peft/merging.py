"""Adapters written into the weights of their base, and taken out again, each time with a check of every layer.

A merge that goes wrong (another base, another scale, weights too coarse for the update) leaves a policy that looks
whole and reaches nothing. So every adapted layer is asked for its output before and after, and must agree.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .adapter_files import AdapterError
from .adapters import active_adapter, base_model
from .files import atomic_folder
from .models.openvla.quantization import quantization_of

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference of a layer's output relative to its largest value, by the type of the base's weights. Rounding
alone gives about a tenth of it on layers of OpenVLA's width (unverified beyond the tiny ones)."""
_PROBES = 4


def merge(model: PeftModel, *, tolerance: float | None = None) -> float:
    """Write the active adapter into the weights, in place, and check that every layer still gives the same.

    Args:
        tolerance: see `TOLERANCE`, its values by default.

    Returns:
        The largest relative difference of a layer's output.

    Raises:
        AdapterError: nothing to merge, a base in 4 bits, or a layer's output has changed; the adapter is then taken
            out again.
    """
    name = active_adapter(model)
    if name is None:
        raise AdapterError("no adapter is active, so there is nothing to merge; activate one first")
    if (held := quantization_of(base_model(model))) != "none":
        raise AdapterError(f"a base held in 4 bits ({held}) is too coarse to merge into; keep the adapter unmerged")
    layers = _layers(model, name)
    if any(layer.merged for layer in layers.values()):
        raise AdapterError("an adapter is merged already; unmerge it first")
    before = _outputs(layers)
    model.merge_adapter(adapter_names=[name])
    try:
        return _compare(layers, before, tolerance, "merging")
    except AdapterError:
        model.unmerge_adapter()
        raise


def unmerge(model: PeftModel, *, tolerance: float | None = None) -> float:
    """Take the merged adapter out of the weights again, in place, and check every layer as `merge` does.

    The base's weights come back up to rounding, not bit for bit: load the base again where that matters.

    Raises:
        AdapterError: nothing is merged, or a layer's output has changed.
    """
    layers = {name: layer for name, layer in _layers(model, None).items() if layer.merged}
    if not layers:
        raise AdapterError("no adapter is merged, so there is nothing to take out")
    before = _outputs(layers)
    model.unmerge_adapter()
    return _compare(layers, before, tolerance, "unmerging")


def save_merged(
    model: PeftModel, processor: Any, folder: str | os.PathLike[str], *, tolerance: float | None = None
) -> Path:
    """Merge the active adapter and write base and adapter as one checkpoint in safetensors, which needs no PEFT.

    `model` is used up: its adapters are gone afterwards.

    Args:
        folder: a new or an empty one.

    Raises:
        AdapterError: see `merge`; nothing is written then.
        FileExistsError: the folder holds something, which stays.
    """
    if Path(folder).exists() and not (Path(folder).is_dir() and not any(Path(folder).iterdir())):
        raise FileExistsError(f"{folder} is not empty; name a new folder for the merged checkpoint, or empty this one")
    merge(model, tolerance=tolerance)
    tuner: Any = model.base_model
    merged = tuner.unload()
    with atomic_folder(folder) as temporary:
        merged.save_pretrained(temporary)
        processor.save_pretrained(temporary)
    return Path(folder)


def _layers(model: nn.Module, name: str | None) -> dict[str, Any]:
    found = {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {path: layer for path, layer in found.items() if name is None or name in layer.lora_A}


def _outputs(layers: dict[str, Any]) -> dict[str, Tensor]:
    modules = [module for layer in layers.values() for module in layer.modules()]
    training = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False  # an adapter's dropout is no part of what is merged
        return _answers(layers)
    finally:
        for module, before in zip(modules, training, strict=True):
            module.training = before


def _answers(layers: dict[str, Any]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {path: layer(_probe(layer, index)).float() for index, (path, layer) in enumerate(layers.items())}


def _probe(layer: Any, seed: int) -> Tensor:
    """Random input of a layer: (_PROBES, features), or of a convolution one patch per probe."""
    weight = layer.get_base_layer().weight
    shape = (_PROBES, *weight.shape[1:])
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(weight.device, weight.dtype)


def _compare(layers: dict[str, Any], before: dict[str, Tensor], tolerance: float | None, what: str) -> float:
    largest = 0.0
    for path, after in _outputs(layers).items():
        dtype = layers[path].get_base_layer().weight.dtype
        allowed = TOLERANCE.get(dtype, max(TOLERANCE.values())) if tolerance is None else tolerance
        scale = float(before[path].abs().max()) or 1.0
        difference = float((after - before[path]).abs().max()) / scale
        if not difference <= allowed:
            raise AdapterError(
                f"{what} changes the output of {path} by {difference:.1e} of its largest value, allowed {allowed:.0e} "
                f"(weights in {dtype}); merge into a base in float32, or keep the adapter unmerged"
            )
        largest = max(largest, difference)
    return largest
