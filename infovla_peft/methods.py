"""What each method adds to plain fine-tuning: what it replays, and which terms it adds to the policy loss.

| method        | replays                       | terms                                       | teacher            |
|---------------|-------------------------------|---------------------------------------------|--------------------|
| sequential    | -                             | -                                           | -                  |
| er            | memory                        | -                                           | -                  |
| infovla       | memory, counterfactual frames | RAC (λ1), CMI (λ2), output (λ3)             | auto, or as chosen |
| infovla_paper | memory                        | RAC and CMI with the paper's own estimators | previous           |
| der++         | memory                        | output                                      | auto               |
| mir           | memory, the most interfered   | -                                           | -                  |
| ewc           | -                             | penalty on the adapter's parameters         | -                  |
| lwf           | counterfactual frames         | -                                           | previous           |
| multitask     | all demonstrations            | -                                           | -                  |
| single_task   | - (a fresh adapter per task)  | -                                           | -                  |
| merge         | - (fresh adapters, merged)    | -                                           | -                  |

L = L_policy(current + replay) + λ1 · L_RAC + λ2 · L_CMI (paper, Eq. 7) + λ3 · L_output; the terms are in `terms.py`.
Replay samples are spread evenly over past tasks (`replay_balance`), and their share of a batch (`replay_fraction`) is
one for all methods. Neither it nor λ3 was tuned for a method other than `infovla`.

- **er**: Experience Replay (Chaudhry et al., 1902.10486). Deviation, of all that replay here: whole trajectories
  are stored, equally many of each task, and batches are stratified, in place of uniform draws from single samples.
- **der++**: Dark Experience Replay++ (Buzzega et al., 2004.07211): replayed labels, and the outputs that the network
  gave. Deviations: one draw from the memory has both its labels and its outputs, where the paper draws twice,
  independently; the outputs are those at the end of the stage that learned the task (`teacher`), not those along its
  training; their distance is in the policy's own loss instead of the logits' MSE. α is `lambda_output`, with
  `infovla`'s default of 0.3, and β follows from the share of replay: a replayed label counts as a new one does.
- **lwf**: Learning without Forgetting (Li & Hoiem, 1606.09282): on the new task's inputs, the old tasks' outputs stay
  those of the network before the stage. A language-conditioned policy has instructions in place of old heads, so these
  are frames of the current task under the instructions of old ones, with the teacher's answers as labels. Deviations:
  these labels enter the policy loss as demonstrations do, in place of a distillation of softened outputs; there is no
  λ, as such samples are `replay_fraction` of each batch and weigh as the others do; they are `counterfactual_frames`
  pairs of frame and instruction per stage, not every input under every old task; no warm-up, as there is no new head.
- **mir**: Maximally Interfered Retrieval (Aljundi et al., 1908.04742), see `interference.py`. Costs three more forward
  passes and a backward pass per step; gradient steps are as many as everybody's. Deviations: it chooses among
  `mir_candidates` (3) times as many samples as it replays, spread evenly over past tasks, where the paper draws 50
  from the whole memory; each process chooses among its own; the virtual step has the peak learning rate, not the
  schedule's, whose last steps would change a loss by less than rounding does, and Adam's direction, moments included,
  in place of the gradient's; losses before and after it are compared without dropout.
- **ewc**: online Elastic Weight Consolidation (1612.00796, 1805.06370), see `consolidation.py`. No memory.
- **multitask**: replay of every demonstration of every task seen so far, with the same batches and steps: an upper
  bound of replay, not of every method. It is not joint training on all tasks at once: it learns stage by stage, and in
  each the new task has what `replay_fraction` leaves of a batch (half), all tasks before share the rest.
- **single_task**: the reference without interference: a fresh adapter per task on the frozen base, without replay, and
  at evaluation the task's own adapter (the base for its tasks), so the task's identity must be known.
- **merge**: those adapters merged into one after each stage, ΔW = w Σ_k B_k A_k exactly (`cat`: rank Σ r_k), as in
  task arithmetic (Ilharco et al., 2212.04089), or to the nearest of rank `merge_rank` (`svd`). PEFT's `linear` is not
  this sum: it mixes A and B separately.
"""

from __future__ import annotations

from typing import Literal, NamedTuple


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


def without_memory(method: str) -> str:
    """The method that this one is, step by step and bit for bit, where nothing is stored.

    >>> without_memory("er"), without_memory("infovla")
    ('sequential', 'infovla')
    """
    row = METHODS[method]
    only_replays = row.replay and not (row.counterfactual or row.keeps_all or row.consolidates)
    return "sequential" if only_replays else method


_READ_BY = {
    "rac": {"lambda_rac", "rac_targets", "rac_center", "rac_pooling"},
    "cmi": {"lambda_cmi", "cmi_mode"},
    "output": {"lambda_output"},
}
"""Options that one term alone reads."""
_WINDOW = "near_duplicate_window"


def unread_options(method: str) -> frozenset[str]:
    """Options of `InfoVLAConfig` that change nothing in runs of a method, because it lacks what reads them.

    >>> sorted(unread_options("infovla"))
    ['ewc_decay', 'ewc_samples', 'lambda_ewc', 'merge_rank', 'merge_weight', 'mir_candidates']
    """
    row = METHODS[method]
    unread = [options for term, options in _READ_BY.items() if term not in row.terms]
    unread += [] if {"rac", "cmi"} & {*row.terms} else [{"temperature", "tap_layer", "anchor_bank", _WINDOW}]
    unread += [] if row.has_teacher else [{"teacher", "anchor_views"}]
    unread += [] if row.counterfactual else [{"counterfactual_share", "counterfactual_frames"}]
    unread += [] if row.counterfactual or row.replay else [{"replay_fraction", "replay_balance"}]
    unread += [] if row.consolidates else [{"lambda_ewc", "ewc_samples", "ewc_decay"}]
    unread += [] if row.retrieves else [{"mir_candidates"}]
    unread += [] if row.policy == "merged" else [{"merge_weight", "merge_rank"}]
    return frozenset().union(*unread)
