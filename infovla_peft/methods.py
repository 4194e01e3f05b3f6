"""What each method adds to plain fine-tuning: what it replays, and which terms it adds to the policy loss.

| method        | replays                       | terms                                       | teacher            |
|---------------|-------------------------------|---------------------------------------------|--------------------|
| sequential    | -                             | -                                           | -                  |
| er            | memory                        | -                                           | -                  |
| infovla       | memory, counterfactual frames | RAC (λ1), CMI (λ2), output (λ3)             | base, or as chosen |
| infovla_paper | memory                        | RAC and CMI with the paper's own estimators | previous           |
| der++         | memory                        | output                                      | auto               |
| mir           | memory, the most interfered   | -                                           | -                  |
| ewc           | -                             | penalty on the adapter's parameters         | -                  |
| lwf           | counterfactual frames         | -                                           | previous           |
| multitask     | all demonstrations            | -                                           | -                  |
| single_task   | - (a fresh adapter per task)  | -                                           | -                  |
| merge         | - (fresh adapters, merged)    | -                                           | -                  |

L = L_policy(current + replay) + λ1 · L_RAC + λ2 · L_CMI (paper, Eq. 7) + λ3 · L_output; the terms see replay samples
only.

- **er**: Experience Replay (Chaudhry et al., 1902.10486).
- **der++**: Dark Experience Replay++ (Buzzega et al., 2004.07211): replayed labels, and the outputs the network gave
  when the task had just been learned. Deviations: distance in the policy's own loss instead of the logits' MSE;
  stratified batches instead of reservoir sampling, as all methods here.
- **lwf**: Learning without Forgetting (Li & Hoiem, 1606.09282): on the new task's inputs, the old tasks' outputs stay
  those of the network before the stage. A language-conditioned policy has instructions in place of old heads, so these
  are frames of the current task under the instructions of old ones, with the teacher's answers as labels.
- **mir**: Maximally Interfered Retrieval (Aljundi et al., 1908.04742), see `interference.py`. Costs three more forward
  passes per step; gradient steps are as many as everybody's. Each process chooses among its own candidates.
- **ewc**: online Elastic Weight Consolidation (1612.00796, 1805.06370), see `consolidation.py`. No memory.
- **multitask**: the upper bound: replay of every demonstration of every task seen so far, with the same batches and
  steps. Deviation from joint training from the start: a task's own stage gives it more samples than the others.
- **single_task**: the reference without interference: a fresh adapter per task on the frozen base, without replay, and
  at evaluation the task's own adapter (the base for its tasks), so the task's identity must be known.
- **merge**: those adapters merged into one after each stage, ΔW = w Σ_k B_k A_k exactly (`cat`: rank Σ r_k), as in
  task arithmetic (Ilharco et al., 2212.04089). PEFT's `linear` is not this sum: it mixes A and B separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

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


class Method(NamedTuple):
    """A row of the table above.

    Attributes:
        replay: memory samples are part of each batch.
        counterfactual: frames of the current task under old instructions are.
        terms: names of the terms it may add.
        retrieves: replay samples are chosen by interference.
        consolidates: moving parameters that past tasks depend on is penalised.
        keeps_all: the memory holds every trajectory.
        policy: what is evaluated after a stage: the `latest` adapter, each task's `own`, or all of them `merged`.
    """

    replay: bool
    counterfactual: bool = False
    terms: tuple[str, ...] = ()
    retrieves: bool = False
    consolidates: bool = False
    keeps_all: bool = False
    policy: Literal["latest", "own", "merged"] = "latest"

    @property
    def has_teacher(self) -> bool:
        return bool(self.terms) or self.counterfactual


METHODS: dict[str, Method] = {
    "sequential": Method(replay=False),
    "er": Method(replay=True),
    "infovla": Method(replay=True, counterfactual=True, terms=("rac", "cmi", "output")),
    "infovla_paper": Method(replay=True, terms=("rac", "cmi")),
    "der++": Method(replay=True, terms=("output",)),
    "mir": Method(replay=True, retrieves=True),
    "ewc": Method(replay=False, consolidates=True),
    "lwf": Method(replay=False, counterfactual=True),
    "multitask": Method(replay=True, keeps_all=True),
    "single_task": Method(replay=False, policy="own"),
    "merge": Method(replay=False, policy="merged"),
}


@dataclass(frozen=True)
class Contrast:
    """The replay samples of one batch, and what they are contrasted with. Everything on the CPU, as the anchors are.

    Attributes:
        anchors: of the whole memory.
        own: (R, 2), (view, row) of this process's replay samples.
        negatives: (M, 2), (view, row) of further frames whose anchors are negatives.
        exclude: (R, R + M) bool, pairs that are no negatives.
    """

    anchors: Anchors
    own: Tensor
    negatives: Tensor
    exclude: Tensor


class Negatives:
    """Chooses what replay samples are contrasted with: a fixed bank of stored anchors, or the rest of the mini-batch.

    With a bank, the other samples of the mini-batch are left out, so that the term of a sample depends neither on
    the batch nor on the number of processes.

    Args:
        trajectory, frame: (N,) of all memory frames; trajectories are numbered over all tasks.
        bank_size: at most so many; 0 = the mini-batch, of all processes.
        window: see `losses.near_duplicates`.
        seed: of the choice.
    """

    def __init__(self, trajectory: Tensor, frame: Tensor, *, bank_size: int, window: int, seed: int) -> None:
        self._trajectory, self._frame, self._window = trajectory, frame, window
        chosen = torch.randperm(len(frame), generator=torch.Generator().manual_seed(seed))[:bank_size].sort().values
        self._bank = torch.stack((torch.zeros_like(chosen), chosen), dim=1)  # (M, 2), view 0

    def __call__(self, anchors: Anchors, own: Tensor, peers: Tensor) -> Contrast:
        """Args: own (R, 2) and peers (S, 2), the (view, row) of this and of the other processes' replay samples."""
        negatives = self._bank if len(self._bank) else peers
        exclude = near_duplicates(
            self._trajectory[own[:, 1]],
            self._frame[own[:, 1]],
            window=self._window,
            bank_trajectory=self._trajectory[negatives[:, 1]],
            bank_frame=self._frame[negatives[:, 1]],
        )
        if len(self._bank):
            exclude[:, : len(own)] = True
        return Contrast(anchors, own, negatives, exclude)


class Term(Protocol):
    """A term of the loss.

    Attributes:
        name: under which its curve is logged.
        weight: λ.
        network: trained along with the adapter and thrown away after the stage; None for most.
    """

    name: str
    weight: float
    network: nn.Module | None

    def __call__(self, student: Features, contrast: Contrast) -> Tensor | None:
        """Mean over this process's replay samples; None where they carry no information."""
        ...


class ReplayAnchorContrast:
    """RAC, Eq. 1: the pooled action feature of a replay sample stays closest to its own anchor."""

    name = "rac"
    network: nn.Module | None = None

    def __init__(self, config: InfoVLAConfig) -> None:
        self.weight = config.lambda_rac
        self._temperature, self._targets, self._center = config.temperature, config.rac_targets, config.rac_center

    def __call__(self, student: Features, contrast: Contrast) -> Tensor | None:
        if not rac_is_informative(len(contrast.own), len(contrast.negatives), contrast.exclude):
            return None
        device, table = student.action.device, contrast.anchors.action
        features = student.action.float()
        anchors, bank = (table[tuple(rows.T)].to(device) for rows in (contrast.own, contrast.negatives))
        if self._center:
            center = bank.mean(dim=0)
            features, anchors, bank = features - center, anchors - center, bank - center
        return replay_anchor_contrastive_loss(
            features,
            anchors,
            temperature=self._temperature,
            bank=bank,
            exclude=contrast.exclude.to(device),
            targets=self._targets,
        )


class CrossModalInformation:
    """CMI, Eq. 2-5, by the estimator that `config.cmi_mode` names."""

    name = "cmi"

    def __init__(self, config: InfoVLAConfig) -> None:
        self.weight = config.lambda_cmi
        self._mode, self._temperature = config.cmi_mode, config.temperature
        self.network: nn.Module | None = None
        if self._mode == "paper":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                self.network = JointDistributionMLP()

    def __call__(self, student: Features, contrast: Contrast) -> Tensor | None:
        own, device = contrast.own, student.action.device
        teacher = contrast.anchors.summary(own, student.language.shape[1])
        if not cmi_is_informative(teacher, mode=self._mode, bank=len(contrast.negatives), exclude=contrast.exclude):
            return None
        summary = summarize_cross_modal(
            student.vision, student.language, None, student.language_mask, temperature=self._temperature
        )
        across = self._mode != "paper"
        return cross_modal_mi_from_summaries(
            summary,
            type(teacher)(*(tensor.to(device) for tensor in teacher)),
            mode=self._mode,
            temperature=self._temperature,
            bank=contrast.anchors.fused[tuple(contrast.negatives.T)].to(device) if across else None,
            exclude=contrast.exclude.to(device) if across else None,
            joint_network=self.network,
        )


class OutputDistillation:
    """The policy's answer on a replay sample stays the teacher's."""

    name = "output"
    network: nn.Module | None = None

    def __init__(self, config: InfoVLAConfig, kind: Literal["actions", "logits"]) -> None:
        self.weight, self._kind = config.lambda_output, kind

    def __call__(self, student: Features, contrast: Contrast) -> Tensor | None:
        if not len(contrast.own) or student.output is None:
            return None
        teacher = contrast.anchors.output[tuple(contrast.own.T)].to(student.output.device)
        return output_distillation_loss(student.output, teacher, kind=self._kind)


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
