"""What a training step keeps in memory: Info-VLA beside plain replay, plain fine-tuning and the paper's wording.

Peak memory is what lives throughout (weights, optimiser, the bank of anchors; all other anchors lie on the disk) and
the most that one step adds to it; how it is counted: speed/allocation.py. And what the loss of plain OpenVLA adds to
the hidden states it is taken from: with logits at the positions that predict actions, and at all positions.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .allocation import PeakMemory, resident_memory
from .harness import Report
from .naive import NaiveInfoVLATrainer
from .stepping import SteppedTraining
from .training import CONTESTANTS, contest
from .training import add_arguments as _add_arguments
from .workload import Workload


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `infovla bench memory`."""
    _add_arguments(parser)


def run(options: argparse.Namespace) -> Report:
    """Memory of a training step."""
    report = Report(
        f"Memory of a training step of the {options.shape} model, {options.decoding}, batches of {options.batch_size}"
    )
    for name in ("batch_size", "shape", "decoding", "device"):
        report.note(name, getattr(options, name))
    with contest(list(CONTESTANTS), options) as trainings:
        add_training_memory(report, trainings, options)
    add_loss_memory(report, options)
    return report


def add_training_memory(report: Report, trainings: Mapping[str, SteppedTraining], options: argparse.Namespace) -> None:
    """Weights and peak of every contestant, and the ratios."""
    models: dict[str, float] = {}
    peaks: dict[str, float] = {}
    added: dict[str, float] = {}
    for name, training in trainings.items():
        trainer = training.trainer
        model = cast(nn.Module, trainer.model)
        held = [model, *([trainer.frozen] if isinstance(trainer, NaiveInfoVLATrainer) else [])]
        negatives = trainer.rehearsal.negatives
        bank = negatives.bank if negatives is not None else None
        models[name] = resident_memory(*held)
        meter = PeakMemory(options.device)
        training.step(lambda meter=meter: meter)  # type: ignore[misc]
        added[name] = meter.peak
        optimiser = cast(Any, trainer.optimizer)
        lasting = resident_memory(*held, getattr(optimiser, "optimizer", optimiser), bank.tensors() if bank else None)
        peaks[name] = lasting + meter.peak
    for what, found in (("model_memory", models), ("step_memory", added), ("peak_memory", peaks)):
        for name, size in found.items():
            report.add_figure(f"{what}_{name}", size, "B")
    report.add_ratio("peak_memory_ratio_infovla_er", peaks["infovla"], peaks["er"], at_most=1.05)
    report.add_ratio("step_memory_ratio_infovla_er", added["infovla"], added["er"])
    report.add_ratio("peak_memory_ratio_naive_infovla", peaks["naive"], peaks["infovla"])
    report.add_ratio("model_memory_ratio_naive_infovla", models["naive"], models["infovla"], at_least=1.9)


def add_loss_memory(report: Report, options: argparse.Namespace) -> None:
    """Peak of head and loss alone, forward and backward, on the hidden states of one batch of plain OpenVLA."""
    workload = Workload(1, options.shape, "autoregressive")
    model, processor = workload.build()
    batch = workload.collator(model, processor)(workload.dataset(processor).__getitems__(range(options.batch_size)))
    patches = model.vision_backbone.featurizer.shape.num_patches * model.vision_backbone.num_images
    labels = F.pad(batch["labels"], (patches, 0), value=-100)  # BOS and patches have none
    labels = labels.to(options.device)
    width = model.config.text_config.hidden_size
    head = model.language_model.lm_head.requires_grad_(False).to(options.device)
    hidden = torch.randn(*labels.shape, width, device=options.device, requires_grad=True)

    def all_positions() -> Tensor:
        logits = head(hidden)[:, :-1].float()
        return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    def action_positions() -> Tensor:
        loss, _ = model.action_token_loss(hidden, labels, None)
        return cast(Tensor, loss)

    peaks: dict[str, float] = {}
    for name, loss in (("action", action_positions), ("all", all_positions)):
        with PeakMemory(options.device) as meter:
            value = loss()
            value.backward()  # type: ignore[no-untyped-call]
            del value
        hidden.grad = None
        peaks[name] = meter.peak
        report.add_figure(f"loss_memory_{name}_positions", meter.peak, "B")
    report.add_ratio("loss_memory_ratio_action_all_positions", peaks["action"], peaks["all"], at_most=0.3)
