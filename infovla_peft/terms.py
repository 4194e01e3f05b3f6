"""The terms of the loss on replayed samples, and what they are contrasted with.

RAC and CMI are applied to memory samples, the output term to all replay samples: tying the features of the current
task's frames to the teacher's would leave no room to learn what is new in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from .config import InfoVLAConfig
from .features import Features
from .losses import (
    JointDistributionMLP,
    cmi_is_informative,
    cross_modal_mi_from_summaries,
    near_duplicates,
    output_distillation_loss,
    rac_is_informative,
    replay_anchor_contrastive_loss,
    summarize_cross_modal,
)
from .memory import Anchors
from .methods import METHODS


@dataclass(frozen=True)
class Bank:
    """Anchors of negatives, on the student's device.

    Attributes:
        action: (M, D).
        fused: (M, F).
    """

    action: Tensor
    fused: Tensor

    @cached_property
    def center(self) -> Tensor:
        """(D,), the mean of `action`."""
        return self.action.mean(dim=0)

    @cached_property
    def centered(self) -> Tensor:
        """(M, D), `action` without it."""
        return self.action - self.center

    def tensors(self) -> list[Tensor]:
        """What it holds, as far as it is used."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Contrast:
    """The replay samples of one batch, and what they are contrasted with.

    What depends on the batch alone lies on the CPU, as the anchors do, and is decided there, so that no step waits
    for an accelerator.

    Attributes:
        anchors: of the whole memory.
        own: (R, 2), (view, row) of this process's replay samples.
        negatives: (M, 2), (view, row) of further frames whose anchors are negatives.
        exclude: (R, R + M) bool, pairs that are no negatives.
        bank: anchors of the negatives, on the student's device.
    """

    anchors: Anchors
    own: Tensor
    negatives: Tensor
    exclude: Tensor
    bank: Bank

    @property
    def device(self) -> torch.device:
        """The student's."""
        return self.bank.action.device

    @cached_property
    def excluded(self) -> Tensor:
        """`exclude` on the student's device."""
        return self.exclude.to(self.device, non_blocking=True)

    @cached_property
    def words(self) -> int:
        """Most language tokens of one of the samples."""
        return int(self.anchors.words[self.own[:, 1]].max()) if len(self.own) else 0

    def anchors_of_own(self, name: str) -> Tensor:
        """(R, ...), the samples' own anchors of one kind, on the student's device."""
        table: Tensor = getattr(self.anchors, name)
        return table[tuple(self.own.T)].to(self.device, non_blocking=True)


class Negatives:
    """Chooses what replay samples are contrasted with: a fixed bank of stored anchors, or the rest of the mini-batch.

    With a bank, the other samples of the mini-batch are left out, so that the term of a sample depends neither on
    the batch nor on the number of processes. Its anchors are gathered once, and stay on the student's device.

    Args:
        trajectory, frame: (N,) of all memory frames; trajectories are numbered over all tasks.
        bank_size: at most so many; 0 = the mini-batch, of all processes.
        window: see `losses.near_duplicates`.
        seed: of the choice.
    """

    def __init__(self, trajectory: Tensor, frame: Tensor, *, bank_size: int, window: int, seed: int) -> None:
        self._trajectory, self._frame, self._window = trajectory, frame, window
        chosen = torch.randperm(len(frame), generator=torch.Generator().manual_seed(seed))[:bank_size].sort().values
        self._chosen = torch.stack((torch.zeros_like(chosen), chosen), dim=1)  # (M, 2), view 0
        self._bank: tuple[Anchors, Bank] | None = None

    @property
    def bank(self) -> Bank | None:
        """As gathered by the first call; None before, and without a fixed bank."""
        return self._bank[1] if self._bank is not None else None

    def __call__(self, anchors: Anchors, own: Tensor, peers: Tensor, device: torch.device | str = "cpu") -> Contrast:
        """Negatives of some replay samples.

        Args:
            anchors: of all frames.
            own, peers: (R, 2) and (S, 2), the (view, row) of this and of the other processes' replay samples.
            device: the student's.
        """
        negatives = self._chosen if len(self._chosen) else peers
        exclude = near_duplicates(
            self._trajectory[own[:, 1]],
            self._frame[own[:, 1]],
            window=self._window,
            bank_trajectory=self._trajectory[negatives[:, 1]],
            bank_frame=self._frame[negatives[:, 1]],
        )
        if not len(self._chosen):
            return Contrast(anchors, own, negatives, exclude, _gather(anchors, negatives, device))
        exclude[:, : len(own)] = True
        if self._bank is None or self._bank[0] is not anchors or self._bank[1].action.device != torch.device(device):
            self._bank = (anchors, _gather(anchors, negatives, device))
        return Contrast(anchors, own, negatives, exclude, self._bank[1])


def _gather(anchors: Anchors, rows: Tensor, device: torch.device | str) -> Bank:
    place = tuple(rows.T)
    return Bank(*(table[place].to(device, non_blocking=True) for table in (anchors.action, anchors.fused)))


class Term(Protocol):
    """A term of the loss.

    Attributes:
        name: under which its curve is logged.
        weight: λ.
        counterfactual: True = applied to counterfactual frames too, and of the memory to frames whose task the teacher
            has learned; False = to all memory frames and nothing else.
        network: trained along with the adapter and thrown away after the stage; None for most.
    """

    name: str
    weight: float
    counterfactual: bool
    network: nn.Module | None

    def __call__(self, student: Features, contrast: Contrast) -> Tensor | None:
        """Mean over this process's samples; None where they carry no information.

        Args:
            student: hidden states of memory samples, `output` of all replay samples.
            contrast: `own` are those that the term sees.
        """
        ...


class ReplayAnchorContrast:
    """RAC, Eq. 1: the pooled action feature of a replay sample stays closest to its own anchor."""

    name = "rac"
    counterfactual = False
    network: nn.Module | None = None

    def __init__(self, config: InfoVLAConfig) -> None:
        self.weight = config.lambda_rac
        self._temperature, self._targets, self._center = config.temperature, config.rac_targets, config.rac_center

    def __call__(self, student: Features, contrast: Contrast) -> Tensor | None:
        if not rac_is_informative(len(contrast.own), len(contrast.negatives), contrast.exclude):
            return None
        features, anchors, bank = student.action.float(), contrast.anchors_of_own("action"), contrast.bank.action
        if self._center:
            center, bank = contrast.bank.center, contrast.bank.centered
            features, anchors = features - center, anchors - center
        return replay_anchor_contrastive_loss(
            features,
            anchors,
            temperature=self._temperature,
            bank=bank,
            exclude=contrast.excluded,
            targets=self._targets,
        )


class CrossModalInformation:
    """CMI, Eq. 2-5, by the estimator that `config.cmi_mode` names."""

    name = "cmi"
    counterfactual = False

    def __init__(self, config: InfoVLAConfig) -> None:
        self.weight = config.lambda_cmi
        self._mode, self._temperature = config.cmi_mode, config.temperature
        self.network: nn.Module | None = None
        if self._mode == "paper":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.network = JointDistributionMLP()

    def __call__(self, student: Features, contrast: Contrast) -> Tensor | None:
        teacher = contrast.anchors.summary(contrast.own, student.language.shape[1])
        if not cmi_is_informative(teacher, mode=self._mode, bank=len(contrast.negatives), exclude=contrast.exclude):
            return None
        summary = summarize_cross_modal(
            student.vision, student.language, None, student.language_mask, temperature=self._temperature
        )
        across = self._mode != "paper"
        return cross_modal_mi_from_summaries(
            summary,
            teacher.to(contrast.device),
            mode=self._mode,
            temperature=self._temperature,
            bank=contrast.bank.fused if across else None,
            exclude=contrast.excluded if across else None,
            joint_network=self.network,
        )


class OutputDistillation:
    """The policy's answer on a replay sample stays the teacher's."""

    name = "output"
    counterfactual = True
    network: nn.Module | None = None

    def __init__(self, config: InfoVLAConfig, kind: Literal["actions", "logits"]) -> None:
        self.weight, self._kind = config.lambda_output, kind

    def __call__(self, student: Features, contrast: Contrast) -> Tensor | None:
        if not len(contrast.own) or student.output is None:
            return None
        return output_distillation_loss(student.output, contrast.anchors_of_own("output"), kind=self._kind)


def make_terms(config: InfoVLAConfig, output: Literal["actions", "logits"] = "actions") -> Sequence[Term]:
    """The terms of `config.method` whose weight is not 0.

    Args:
        output: what the model answers, see `losses.output_distillation_loss`.
    """
    every: dict[str, Term] = {
        "rac": ReplayAnchorContrast(config),
        "cmi": CrossModalInformation(config),
        "output": OutputDistillation(config, output),
    }
    return [every[name] for name in METHODS[config.method].terms if every[name].weight > 0]
