"""The frozen teacher: the base with its adapters off, or an earlier adapter. Runs once per stage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional as F

from .adapters import active_adapter, base_model, fingerprint, switch
from .bars import progress_bar
from .data.chunks import FrameTable
from .data.collator import VLACollator
from .data.sampling import Augmentation, Views
from .distributed import gather_pieces, is_main, my_share, reshard
from .features import FeatureTap, Pooling, extract_features, policy_output
from .losses import summarize_cross_modal
from .memory import Anchors


@contextmanager
def teacher_mode(model: nn.Module, adapter: str | None = None) -> Iterator[None]:
    """Run the model as the teacher: evaluation mode, no gradient.

    On leaving, also by an exception, the active adapter (or that all are off) and *every* `requires_grad` and
    `training` flag is as before (PEFT alone would make frozen adapters trainable). The backward pass of a student
    belongs outside.

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
    off = active_adapter(model) is None
    try:
        model.eval()
        with torch.no_grad(), nullcontext() if off or adapter is not None else peft_model.disable_adapter():
            if adapter is not None:
                switch(peft_model, adapter)
            yield
    finally:
        if adapter is not None:
            peft_model.set_adapter(active)
            if off:
                peft_model.base_model.disable_adapter_layers()
        for parameter, flag in gradients:
            parameter.requires_grad_(flag)
        for module, flag in training:
            module.training = flag
        reshard(model)  # what is gathered still has the flags of the teacher


@contextmanager
def _statistics(model: Any, statistics: dict[str, Any]) -> Iterator[None]:
    """Let `predict_action` un-normalise with these statistics."""
    before = model.config.norm_stats
    model.config.norm_stats = statistics
    try:
        yield
    finally:
        model.config.norm_stats = before


def anchor_spec(
    model: nn.Module, data: FrameTable, collator: VLACollator, rows: NDArray[np.int64], views: Views, *,
    adapter: str | None, tap_layer: int, temperature: float, dtype: str, pooling: Pooling = None,
) -> dict[str, str]:  # fmt: skip
    """All that the anchors of some rows depend on; equal specifications mean equal anchors.

    What the collator does (crop, normalisation, prompt, cameras) enters by what it makes of three of the rows.
    """
    content = hashlib.sha256(
        json.dumps([data.frame[rows].tolist(), sorted({data.tasks[k] for k in data.task[rows]})]).encode()
    )
    content.update(data.states[rows].tobytes() + views.shifts.tobytes() + views.proprio_noise.tobytes())
    for name, tensor in sorted(collator(data.__getitems__(rows[[0, len(rows) // 2, -1]])).items()):
        content.update(name.encode() + tensor.numpy().tobytes())
    return {
        "base": fingerprint(model)["weights"],
        "teacher": "base" if adapter is None else fingerprint(model, adapter)["weights"],
        "rows": str(len(rows)),
        "content": content.hexdigest(),
        "tap_layer": str(tap_layer),
        "temperature": str(temperature),
        "dtype": dtype,
        **({} if pooling is None else {"pooling": pooling}),
    }


def compute_anchors(
    model: nn.Module,
    data: FrameTable,
    collator: VLACollator,
    *,
    adapter: str | None = None,
    tap_layer: int = -1,
    pooling: Pooling = None,
    temperature: float = 0.1,
    views: Views | None = None,
    rows: NDArray[np.int64] | None = None,
    batch_size: int = 16,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    dtype: str = "no",
    name: str = "memory",
) -> Anchors:
    """The teacher's features and output of some frames, in all views. Runs the model views · rows / batch_size times.

    Several processes share the batches and exchange what they find: all get the anchors of one process, bit for bit.

    Args:
        model: not wrapped by DistributedDataParallel; on any device, where the batches are moved to.
        data: the frames.
        adapter: None = the base.
        tap_layer, pooling, temperature: as for the student.
        views: of these rows; None = the frames themselves.
        rows: which rows of `data`; None = all.
        autocast: the context in which the student will run, and `dtype`, its name: half precision of both must agree.
        name: under which `spec` has them.

    Returns:
        Anchors on the CPU, float32.
    """
    rows = np.arange(len(data)) if rows is None else rows
    views = Views.draw(data, 1, Augmentation(), 0).rows(rows) if views is None else views
    spec = anchor_spec(
        model,
        data,
        collator,
        rows,
        views,
        adapter=adapter,
        tap_layer=tap_layer,
        temperature=temperature,
        dtype=dtype,
        pooling=pooling,
    )
    inner = base_model(model)
    device = next(inner.parameters()).device
    order = np.stack(np.meshgrid(np.arange(views.count), np.arange(len(rows)), indexing="ij"), -1).reshape(-1, 2)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    found: list[tuple[Tensor, ...]] = []
    with teacher_mode(model, adapter):
        for number in progress_bar(
            my_share(len(batches)), desc="anchors", unit="batch", delay=2, disable=None if is_main() else True
        ):
            view, row = batches[number].T
            samples = views.samples(data, rows[row], view, row)
            batch = {name: tensor.to(device) for name, tensor in collator(samples).items()}
            with autocast(), FeatureTap(inner, tap_layer) as tap:
                output = model(**batch, return_logits=False)
            features = extract_features(tap.hidden, output.token_roles, pooling=pooling)
            summary = summarize_cross_modal(
                features.vision, features.language, None, features.language_mask, temperature=temperature
            )
            words = features.language_mask.sum(1)
            tensors = (features.action, summary.affinity, summary.fused, policy_output(output), words)
            found.append(tuple(tensor.float().cpu() for tensor in tensors))
    found = gather_pieces(found, len(batches))
    longest = max(affinity.shape[2] for _, affinity, _, _, _ in found)
    padded = [(a, F.pad(affinity, (0, longest - affinity.shape[2])), f, o, w) for a, affinity, f, o, w in found]
    whole = [torch.cat(parts) for parts in zip(*padded, strict=True)]
    action, affinity, fused, answer, words = (
        tensor.view(views.count, len(rows), *tensor.shape[1:]) for tensor in whole
    )
    return Anchors(action, affinity, fused, answer, words[0].long(), torch.from_numpy(views.shifts), {name: spec})


def teacher_answers(
    model: nn.Module,
    data: FrameTable,
    collator: VLACollator,
    *,
    adapter: str | None = None,
    rows: NDArray[np.int64],
    views: Views,
    batch_size: int = 16,
) -> NDArray[np.float32]:
    """The actions the teacher would take, as `predict_action` decodes them.

    Args:
        rows, views: which frames, and their views, of which the first is used.

    Returns:
        (rows, T, A), the model's convention, not normalised.
    """
    inner: Any = base_model(model)
    acting: Any = model  # not `inner`: FSDP2 gathers the parameters when the outermost module is called
    device, normaliser = next(inner.parameters()).device, collator.normaliser
    batches = [slice(start, start + batch_size) for start in range(0, len(rows), batch_size)]
    answers: list[NDArray[np.float32]] = []
    with _statistics(inner, normaliser.as_statistics()), teacher_mode(model, adapter):
        for number in progress_bar(
            my_share(len(batches)), desc="answers", unit="batch", delay=2, disable=None if is_main() else True
        ):
            part = batches[number]
            samples = views.samples(data, rows[part], 0, part)
            batch = {name: tensor.to(device) for name, tensor in collator.observations(samples).items()}
            actions = np.asarray(acting.predict_action(**batch, unnorm_key=normaliser.key), dtype=np.float32)
            answers.append(actions.reshape(len(rows[part]), -1, actions.shape[-1]))
    return np.concatenate(gather_pieces(answers, len(batches)))
