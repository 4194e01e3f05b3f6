"""The frozen teacher: the base with its adapters off, or the adapter of the stage before. Runs once per stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from .adapters import base_model, fingerprint
from .data.chunks import ChunkDataset
from .data.collator import VLACollator
from .features import FeatureTap, extract_features
from .losses import summarize_cross_modal
from .memory import Anchors

_VIEWS = 2  # stream of random numbers, beside those of `data.sampling`


@contextmanager
def teacher_mode(model: nn.Module, adapter: str | None = None) -> Iterator[None]:
    """Run the model as the teacher: evaluation mode, no gradient.

    On leaving, also by an exception, the active adapter and *every* `requires_grad` and `training` flag is as before
    (PEFT alone would make frozen adapters trainable). The backward pass of a student belongs outside.

    Args:
        adapter: None = the base, all adapters off; otherwise the name of one of the model's adapters.

    Raises:
        ValueError: the model has no such adapter.
    """
    peft_model: Any = model if isinstance(model, PeftModel) else None
    known = list(peft_model.peft_config) if peft_model is not None else []
    if adapter is not None and adapter not in known:
        raise ValueError(f"the teacher's adapter {adapter!r} is not loaded; the model has {known or 'none'}")
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    active = peft_model.active_adapter if peft_model is not None else None
    try:
        model.eval()
        with torch.no_grad(), _without_adapters(model) if adapter is None else nullcontext():
            if adapter is not None:
                peft_model.set_adapter(adapter, inference_mode=True)
            yield
    finally:
        if active is not None and adapter is not None:
            peft_model.set_adapter(active)
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)
        for module, flag in training:
            module.training = flag


def _without_adapters(model: nn.Module) -> AbstractContextManager[None]:
    if not isinstance(model, PeftModel):
        return nullcontext()
    context: AbstractContextManager[None] = model.disable_adapter()
    return context


def view_shifts(frames: int, views: int, shift: int, seed: int) -> NDArray[np.int64]:
    """(views, frames, 2) pixels by which each view of each memory frame is moved; the first is the frame itself."""
    shifts = np.random.default_rng((seed, _VIEWS)).integers(-shift, shift + 1, (views, frames, 2))
    shifts[0] = 0
    return shifts


def anchor_spec(
    model: nn.Module, data: ChunkDataset, *, adapter: str | None, tap_layer: int, temperature: float,
    shifts: NDArray[np.int64], dtype: str,
) -> dict[str, str]:  # fmt: skip
    """All that anchors depend on; equal specifications mean equal anchors."""
    rows = hashlib.sha256(json.dumps([data.tasks, data.task.tolist(), data.frame.tolist()]).encode())
    rows.update(data.states.tobytes() + shifts.tobytes())
    return {
        "base": fingerprint(model)["weights"],
        "teacher": "base" if adapter is None else fingerprint(model, adapter)["weights"],
        "rows": rows.hexdigest(),
        "image": f"{data.pipeline.side} px, {', '.join(data.cameras)}",
        "tap_layer": str(tap_layer),
        "temperature": str(temperature),
        "dtype": dtype,
    }


def compute_anchors(
    model: nn.Module,
    data: ChunkDataset,
    collator: VLACollator,
    *,
    adapter: str | None = None,
    tap_layer: int = -1,
    temperature: float = 0.1,
    shifts: NDArray[np.int64] | None = None,
    batch_size: int = 16,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    dtype: str = "no",
) -> Anchors:
    """The teacher's features of all memory frames, in all views. Runs the model views · frames / batch_size times.

    Args:
        model: not wrapped by DistributedDataParallel; on any device, where the batches are moved to.
        data: the memory's frames.
        adapter: None = the base.
        tap_layer, temperature: as for the student.
        shifts: (V, N, 2), see `view_shifts`; None = the frames themselves.
        autocast: the context in which the student will run, and `dtype`, its name: half precision of both must agree.

    Returns:
        Anchors on the CPU, float32.
    """
    shifts = np.zeros((1, len(data), 2), dtype=np.int64) if shifts is None else shifts
    spec = anchor_spec(
        model, data, adapter=adapter, tap_layer=tap_layer, temperature=temperature, shifts=shifts, dtype=dtype
    )
    inner = base_model(model)
    device = next(inner.parameters()).device
    batches: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    order = np.stack(np.meshgrid(np.arange(len(shifts)), np.arange(len(data)), indexing="ij"), -1).reshape(-1, 2)
    with teacher_mode(model, adapter), tqdm(total=len(order), desc="anchors", unit="frame", delay=2) as bar:
        for start in range(0, len(order), batch_size):
            view, row = order[start : start + batch_size].T
            samples = replace(data.__getitems__(row), shifts=shifts[view, row])
            batch = {name: tensor.to(device) for name, tensor in collator(samples).items()}
            with autocast(), FeatureTap(inner, tap_layer) as tap:
                roles = model(**batch, return_logits=False).token_roles
            features = extract_features(tap.hidden, roles)
            summary = summarize_cross_modal(
                features.vision, features.language, None, features.language_mask, temperature=temperature
            )
            found = (features.action, summary.affinity, summary.fused, features.language_mask.sum(1))
            batches.append(tuple(tensor.float().cpu() for tensor in found))  # type: ignore[arg-type]
            bar.update(len(row))
    longest = max(affinity.shape[2] for _, affinity, _, _ in batches)
    padded = [(a, F.pad(affinity, (0, longest - affinity.shape[2])), f, w) for a, affinity, f, w in batches]
    whole = [torch.cat(parts) for parts in zip(*padded, strict=True)]
    action, affinity, fused, words = (tensor.view(*shifts.shape[:2], *tensor.shape[1:]) for tensor in whole)
    return Anchors(action, affinity, fused, words[0].long(), torch.from_numpy(shifts), spec)
