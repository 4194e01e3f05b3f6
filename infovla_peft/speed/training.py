"""The contestants of `infovla bench train` and `infovla bench memory`: stages that learn one task, on equal terms.

All have the same weights, the same adapter and equal batches (as many samples, of one sequence length), and take
their steps in 🤗 Trainer's own loop (see stepping.py):

- **plain**: LoRA fine-tuning, the whole batch of the current task (`method="sequential"`).
- **er**: replay only, half of the batch out of the memory.
- **infovla**: the defaults: half of the batch replayed, half of that being counterfactual frames (so that neither
  sees more samples than the other); RAC, CMI and output against a full bank of 1024 stored anchors.
- **infovla_100_tasks**: the same with 100 past tasks instead of 2.
- **naive**: see naive.py; half of the batch out of the memory.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PrinterCallback

from ..adapters import add_adapter
from ..command_options import positive
from ..config import InfoVLAConfig
from ..data.counterfactual import CounterfactualDataset
from ..data.sampling import Augmentation, Views
from ..memory import Anchors
from ..teacher import compute_anchors, teacher_answers
from ..trainer import InfoVLATrainer
from .naive import NaiveInfoVLATrainer
from .stepping import SteppedTraining
from .workload import DECODINGS, SHAPES, Workload

FEW_TASKS, MANY_TASKS = 2, 100
CONTESTANTS = {
    "plain": "sequential", "er": "er", "infovla": "infovla", "infovla_100_tasks": "infovla", "naive": "infovla_paper",
}  # fmt: skip
"""Name → method."""
_ASKED = 16


class _PreparedTrainer(InfoVLATrainer):
    """Asks its teacher about a few frames of each table; the anchors of all others are copies of those.

    A step's cost does not depend on their values, and asking about 3000 frames would outlast what is measured.
    """

    def prepare_anchors(self) -> Anchors | None:
        rehearsal = self.rehearsal
        if not rehearsal.terms:
            return super().prepare_anchors()
        model: Any = self.model
        parts = []
        for table in rehearsal.tables:
            rows = np.arange(min(_ASKED, len(table)))
            views = Views.draw(table, 1, Augmentation(), 0).rows(rows)
            copied = np.arange(len(table)) % len(rows)
            if isinstance(table, CounterfactualDataset):
                table.answer(teacher_answers(model, table, self._collator, rows=rows, views=views)[copied])
            few = compute_anchors(model, table, self._collator, rows=rows, views=views, name=table.tasks[0])
            tensors = {
                name: tensor[copied] if name == "words" else tensor[:, copied]
                for name, tensor in few.tensors().items()
            }
            parts.append(Anchors(**tensors, spec={}))
        rehearsal.use(Anchors.join(parts))
        return rehearsal.anchors


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What both benchmarks can be asked."""
    parser.add_argument("--batch_size", type=positive, default=16, help="samples per step")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="tiny", help="of the model, see speed/workload.py")
    parser.add_argument(
        "--decoding", choices=DECODINGS, default="autoregressive", help="plain OpenVLA, or OpenVLA-OFT with L1 head"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the models train")


def make_trainer(name: str, workload: Workload, folder: str, options: argparse.Namespace) -> InfoVLATrainer:
    """One contestant.

    Raises:
        ValueError: no GPU where one is wanted.
    """
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU here; leave the option out to measure on the CPU")
    past = {"plain": 0, "infovla_100_tasks": MANY_TASKS}.get(name, FEW_TASKS)
    model, processor = workload.build()
    config = InfoVLAConfig(
        output_dir=str(Path(folder) / name),
        method=CONTESTANTS[name],  # type: ignore[arg-type]
        use_cpu=options.device == "cpu",
        bf16=options.device == "cuda",
        per_device_train_batch_size=options.batch_size,
        max_steps=1_000_000,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        counterfactual_frames=1024,
    )
    kind = {"naive": NaiveInfoVLATrainer}.get(name, _PreparedTrainer)
    trainer = kind(
        add_adapter(model, "new", config),
        config,
        workload.dataset(processor),
        workload.collator(model, processor),
        memory=workload.memory(past) if past else None,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


@contextmanager
def contest(names: Sequence[str], options: argparse.Namespace) -> Iterator[dict[str, SteppedTraining]]:
    """Contestants that have taken their first step."""
    workload = Workload(MANY_TASKS if "infovla_100_tasks" in names else FEW_TASKS, options.shape, options.decoding)
    with tempfile.TemporaryDirectory(prefix="infovla-bench-") as folder, ExitStack() as stack:
        yield {
            name: stack.enter_context(SteppedTraining(make_trainer(name, workload, folder, options))) for name in names
        }
