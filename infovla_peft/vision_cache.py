"""What a frozen vision tower makes of the replayed frames, computed once per stage and kept on the disk.

Worth it where no adapter sits in the tower, and nothing else changes what it sees. Off by default: on the tiny model
the tower is a tenth of a step, and a frame of a fused 7B model takes 1.1 MB in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .adapters import base_model
from .bars import progress_bar
from .config import InfoVLAConfig
from .data.chunks import FrameTable
from .data.collator import VLACollator
from .data.sampling import Augmentation, Views
from .distributed import exchange, is_main, my_share
from .files import fsync, scratch_folder
from .methods import METHODS
from .teacher import teacher_mode
from .tensor_files import empty_tensor


def check_cacheable(model: nn.Module, config: InfoVLAConfig, *, replayed_anew: bool) -> None:
    """Raise a ValueError unless replayed frames have the same vision features throughout a stage.

    Args:
        replayed_anew: replay samples have no fixed views, so that `image_shift` moves them differently every time.
    """
    option, inner = "cache_vision_features", base_model(model)
    if inner.config.use_film:
        raise ValueError(f"{option}: with FiLM the vision tower reads the instruction; leave the option out")
    parameters = list(inner.vision_backbone.named_parameters())
    if any(parameter.requires_grad or ".lora_" in name for name, parameter in parameters):
        raise ValueError(
            f"{option} needs a vision tower without adapters; set lora_targets to layers of the language model "
            "(q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj), or leave the option out"
        )
    if METHODS[config.method].retrieves:
        raise ValueError(f"{option} knows nothing of the candidates of method={config.method!r}; leave it out")
    if replayed_anew and config.image_shift:
        raise ValueError(
            f"{option}: method={config.method!r} shifts replayed images anew every time; set image_shift to 0, or "
            "leave the option out"
        )


class VisionCache:
    """Features of all rows of some tables, numbered one after another, in all their views.

    The processes share the work: all call this together, see one file system, and map one file.

    Args:
        model: with a frozen vision tower, see `check_cacheable`, where it is trained.
        tables: the replayed frames.
        collator: makes the pixels that the model sees.
        views: of all rows; None = the frames themselves.
        folder: on a disk with room for them; nothing stays there.
        batch_size: of the forward passes.
        autocast: the context in which the student will run.
    """

    def __init__(
        self,
        model: nn.Module,
        tables: Sequence[FrameTable],
        collator: VLACollator,
        views: Views | None,
        folder: str | Path,
        *,
        batch_size: int,
        autocast: Callable[[], AbstractContextManager[object]],
    ) -> None:
        views = views if views is not None else Views.join([Views.draw(each, 1, Augmentation(), 0) for each in tables])
        begins = np.cumsum([0, *(len(table) for table in tables)])
        batches = [
            (table, view, rows, begin + rows)
            for table, begin in zip(tables, begins, strict=False)
            for view in range(views.count)
            for rows in np.array_split(np.arange(len(table)), -(-len(table) // batch_size))
        ]
        with nullcontext() if not is_main() else scratch_folder(Path(folder), "vision") as scratch:
            file = exchange(None if scratch is None else scratch / "features")[0]
            assert file is not None
            shape = views.count, int(begins[-1])
            with teacher_mode(model):
                self._features = _compute(model, batches, collator, views, autocast, file, shape)
            fsync(file)
            exchange(None)  # what all have found is there
        # The file has no name any more, and is gone with the tensor.

    def __call__(self, rows: NDArray[np.int64]) -> Tensor:
        """(R, patches, width) of frames given as (view, row) (R, 2), on the CPU."""
        view, row = torch.from_numpy(rows).unbind(1)
        return self._features[view, row]


_Batch = tuple[FrameTable, int, NDArray[np.int64], NDArray[np.int64]]
"""A table, a view, rows of the table, and the same rows numbered over all tables."""


def _compute(
    model: nn.Module,
    batches: Sequence[_Batch],
    collator: VLACollator,
    views: Views,
    autocast: Callable[[], AbstractContextManager[object]],
    file: Path,
    shape: tuple[int, int],
) -> Tensor:
    """Fill in this process's share of the features (V, N, patches, width), which all processes map from one file."""
    inner = base_model(model)
    device = next(inner.parameters()).device
    whole: Tensor | None = None
    for number in progress_bar(
        my_share(len(batches)), desc="vision", unit="batch", delay=2, disable=None if is_main() else True
    ):
        table, view, rows, place = batches[number]
        samples = views.samples(table, rows, view, place)
        pixels = collator.observations(samples)["pixel_values"].to(device)
        with autocast():
            found = inner.vision_backbone(pixels).cpu()
        if whole is None:
            whole = empty_tensor([*shape, *found.shape[1:]], found.dtype, file)
        whole[view, torch.from_numpy(place)] = found
    assert whole is not None  # every process has a share
    return whole
