"""What a vision-language-action model must offer here. OpenVLA is the first to offer it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TokenRoles:
    """Which position of the multimodal sequence plays which role.

    Every mask is a bool tensor of shape (batch, sequence); a position has at most one role, padding and special
    tokens have none.

    Attributes:
        vision: patch embeddings of all images.
        language: tokens of the instruction's prompt, without BOS and without padding.
        action: positions whose hidden state predicts an action token (parallel decoding: chunk x dim positions;
            autoregressive: the position before each action token).
        proprio: the proprioception token, all False where the model has none.
        vision_span: (start, stop) of the patch positions if they are the same in every row, else None. With it,
            features are a slice: no copy, and no waiting for the device.
    """

    vision: Tensor
    language: Tensor
    action: Tensor
    proprio: Tensor
    vision_span: tuple[int, int] | None = None

    def to(self, device: torch.device | str) -> TokenRoles:
        vision, language, action, proprio = (
            mask.to(device) for mask in (self.vision, self.language, self.action, self.proprio)
        )
        return TokenRoles(vision, language, action, proprio, self.vision_span)


@runtime_checkable
class VLAModel(Protocol):
    """Structural type of a model whose layers can be tapped, as `features.FeatureTap` needs it.

    Beyond it the package uses `forward(**batch)`, whose output has `loss`, `token_roles` and `predicted_actions` or
    `action_logits`; `predict_action`, for rollouts and for answers on counterfactual frames; and of the configuration
    `action_head`, `action_dim`, `num_actions_chunk`, `decoding`, `proprio_dim` and `norm_stats`. A whole second
    architecture is recipes/another_vla.py.
    """

    def tap_module(self, layer: int) -> nn.Module:
        """The module whose output is the hidden state (batch, sequence, dim) of `layer`.

        `layer` counts like `hidden_states` of transformers: 0 = embeddings (not tappable), 1 … L = decoder layers,
        L (or -1) being taken after the final norm; negative values count from the end.
        """
        ...


def chunk_length(config: Any) -> int:
    """Actions per sample and forward pass: the chunk of a parallel decoder, else 1."""
    return int(config.num_actions_chunk) if config.decoding == "parallel" else 1
