"""The reference of `infovla bench`: Info-VLA as the paper words it, written down without a thought for cost."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapters import base_model
from ..features import Features, extract_features
from ..losses import JointDistributionMLP, cross_modal_mi_loss, replay_anchor_contrastive_loss
from ..memory import Anchors
from ..trainer import InfoVLATrainer


class NaiveInfoVLATrainer(InfoVLATrainer):
    """A second, frozen copy of the policy, its forward pass on every replay batch, all hidden states kept.

    The paper's losses (`method="infovla_paper"`): RAC against the mini-batch (Eq. 1), CMI with the MLP joint (Eq. 2
    to 5), both on the hidden states of one layer. The frozen copy is the policy "at the end of the previous stage",
    adapter included, and stays in memory beside the student.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.args.method == "infovla_paper"
        self.frozen = copy.deepcopy(cast(nn.Module, self.model)).eval().requires_grad_(False)

    def prepare_anchors(self) -> Anchors | None:
        """None: the frozen copy is asked in every step."""
        return None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Policy loss + λ1·RAC + λ2·CMI."""
        inputs = dict(inputs)
        replayed = len(inputs.pop("replay").own)
        outputs = model(**inputs, output_hidden_states=True)
        student = self._features(outputs, slice(len(inputs["input_ids"]) - replayed, None))
        remembered = {name: tensor[-replayed:] for name, tensor in inputs.items()}
        with torch.no_grad():
            teacher = self._features(self.frozen(**remembered, output_hidden_states=True), slice(None))
        rac = replay_anchor_contrastive_loss(student.action, teacher.action, temperature=self.args.temperature)
        network = next(term.network for term in self.terms if term.name == "cmi")
        words = teacher.language.shape[1]
        cmi = cross_modal_mi_loss(
            student.vision,
            student.language[:, :words],
            teacher.vision,
            teacher.language,
            language_mask=teacher.language_mask,
            mode="paper",
            temperature=self.args.temperature,
            joint_network=cast(JointDistributionMLP, network),
        )
        for name, value in (("policy_loss", outputs.loss), ("rac", rac), ("cmi", cmi)):
            self._note(name, value)
        loss = outputs.loss + self.args.lambda_rac * rac + self.args.lambda_cmi * cmi
        self._loss = loss.detach()  # which the trainer checks before the optimiser's step
        return (loss, outputs) if return_outputs else loss

    def _features(self, outputs: Any, rows: slice) -> Features:
        layers = base_model(cast(nn.Module, self.model)).config.text_config.num_hidden_layers
        layer = self.args.tap_layer
        return extract_features(
            outputs.hidden_states[layer if layer >= 0 else layer + layers + 1], outputs.token_roles, rows
        )
