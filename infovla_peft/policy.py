"""What a vision-language-action model must offer here. OpenVLA is the first to offer it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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
        vision_span: (first, end) of the patches where they are the same positions in every row; None elsewhere.
            Saves a copy of them, and asking the device where they are.
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
    """The part of a VLA that `features.py`, `trainer.py` and `evaluation.py` use."""

    def tap_module(self, layer: int) -> nn.Module:
        """The module whose output is the hidden state (batch, sequence, dim) of `layer`.

        `layer` counts like `hidden_states` of transformers: 0 = embeddings (not tappable), 1 … L = decoder layers,
        L (or -1) being taken after the final norm; negative values count from the end.
        """
        ...
