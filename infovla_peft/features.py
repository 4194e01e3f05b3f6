"""Vision, language and action features out of the one forward pass that training needs anyway."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .policy import TokenRoles, VLAModel

Pooling = Literal["prompt", "vision"] | None


class Features(NamedTuple):
    """Hidden states of one layer, by role.

    Attributes:
        action: (B, D), what RAC contrasts, the counterpart of the paper's fused embedding: the mean over the positions
            that predict actions, where vision, language and proprioception have been attended to, unless
            `extract_features` is told to pool others.
        vision: (B, Nv, D), all patches.
        language: (B, Nl, D), the instruction's tokens, 0 where a row has fewer than Nl.
        language_mask: (B, Nl) bool.
        output: (B, K, O), see `policy_output`; None where nobody asked.
    """

    action: Tensor
    vision: Tensor
    language: Tensor
    language_mask: Tensor
    output: Tensor | None = None


class FeatureTap:
    """Catches the hidden state of one layer while a model runs; nothing is computed or kept elsewhere.

        with FeatureTap(model, -1) as tap:
            output = model(**batch)
        features = extract_features(tap.hidden, output.token_roles)

    Args:
        model: offers `tap_module` (see `policy.VLAModel`); not wrapped by DistributedDataParallel.
        layer: counted as in `hidden_states`, -1 = the last one, after the final norm.
    """

    def __init__(self, model: VLAModel, layer: int) -> None:
        self._module = model.tap_module(layer)
        self._hidden: Tensor | None = None
        self._handle: Any = None

    @property
    def hidden(self) -> Tensor:
        """(batch, sequence, dim), of the forward pass inside the `with`.

        Raises:
            RuntimeError: there was none.
        """
        if self._hidden is None:
            raise RuntimeError("the tapped layer did not run: call the model inside `with FeatureTap(...)`")
        return self._hidden

    def __enter__(self) -> FeatureTap:
        self._handle = self._module.register_forward_hook(self._keep)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Removed before the backward pass, in which gradient checkpointing runs the layer once more.
        self._handle.remove()

    def _keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self._hidden = output[0] if isinstance(output, tuple) else output


def policy_output(output: Any, rows: slice = slice(None)) -> Tensor:
    """What the policy answers, of some samples: (B, K, O).

    With the L1 head the normalised chunk (K = its length, O = action dim), with tokens the logits of the action
    vocabulary at each action position (K = positions, O = bins).
    """
    answer = output.action_logits if output.action_logits is not None else output.predicted_actions
    return answer[rows]  # type: ignore[no-any-return]


def extract_features(
    hidden: Tensor,
    roles: TokenRoles,
    rows: slice = slice(None),
    *,
    longest: int | None = None,
    pooling: Pooling = None,
) -> Features:
    """Sort the hidden states of some samples by role.

    Args:
        hidden: (B, S, D).
        roles: of the same forward pass.
        rows: which samples; the others cost nothing.
        longest: Nl, the largest number of language tokens of one of them; to compute it (None) waits for the device.
        pooling: what becomes `Features.action`: the mean over the positions that predict actions (None), the last
            token of the `prompt` before them (`TokenRoles.language`), or the mean over all patches (`vision`).
    """
    hidden = hidden[rows]
    batch, _, width = hidden.shape
    if roles.vision_span is not None:
        vision = hidden[:, slice(*roles.vision_span)]
    else:
        vision = hidden[roles.vision[rows]].view(batch, -1, width) if batch else hidden[:, :0]  # all have as many
    mask = roles.language[rows]
    if longest is None:
        longest = int(mask.sum(1).max()) if batch else 0
    order = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :longest]  # (B, Nl), tokens first
    language_mask = mask.gather(1, order)
    language = hidden.gather(1, order[..., None].expand(-1, -1, width)) * language_mask[..., None]
    if pooling == "vision":
        return Features(vision.mean(1), vision, language, language_mask)
    chosen = roles.action[rows]  # (B, S)
    if pooling == "prompt":
        chosen = mask & (mask.int().cumsum(1) == mask.sum(1, keepdim=True))
    positions = chosen.to(hidden.dtype)
    pooled = torch.einsum("bs,bsd->bd", positions, hidden) / positions.sum(1, keepdim=True).clamp(min=1)
    return Features(pooled, vision, language, language_mask)
