"""MIR: replay the samples that learning the current task is about to hurt most."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .models.openvla.sequence import IGNORE_INDEX


def most_interfered(
    model: nn.Module,
    current: Mapping[str, Tensor],
    candidates: Mapping[str, Tensor],
    count: int,
    learning_rate: float,
    optimizer: Any = None,
) -> Tensor:
    """The candidates whose loss grows most under one step on the current samples alone.

    Maximally Interfered Retrieval (Aljundi et al., 1908.04742), MI-1: score_i = ℓ(x_i; θ − η ∇L_current) − ℓ(x_i; θ).
    There the optimiser is gradient descent, so that the virtual step is the one that it would take; for Adam it is so
    here with Adam's step, its moments included, in place of ∇L.

    Args:
        model: not wrapped; its trainable parameters take the virtual step and are then as before, bit for bit.
        current: batch of current samples.
        candidates: batch of N ≥ count memory samples.
        count: how many to choose.
        learning_rate: η > 0, large enough that a difference of losses is more than rounding.
        optimizer: of the parameters. With Adam's moments in its state the step is Adam's, else gradient descent's.

    Returns:
        (count,) rows of `candidates`, in their order. Without gradient.
    """
    scores = interference(model, current, candidates, learning_rate, optimizer)
    return scores.topk(count).indices.sort().values


def interference(
    model: nn.Module,
    current: Mapping[str, Tensor],
    candidates: Mapping[str, Tensor],
    learning_rate: float,
    optimizer: Any = None,
) -> Tensor:
    """(N,) how much the loss of each candidate grows under that step. Dropout is off, which would hide it."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(**current, return_logits=False).loss
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    training = [module for module in model.modules() if module.training]
    groups = {id(each): group for group in getattr(optimizer, "param_groups", ()) for each in group["params"]}
    with torch.no_grad():
        kept = [parameter.clone() for parameter in parameters]
        model.eval()
        try:
            before = sample_losses(model, candidates, model(**candidates, return_logits=False))
            for parameter, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    state = optimizer.state.get(parameter) if optimizer is not None else None
                    parameter.sub_(learning_rate * _direction(gradient, state or {}, groups.get(id(parameter), {})))
            return sample_losses(model, candidates, model(**candidates, return_logits=False)) - before
        finally:
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
            for module in training:
                module.training = True


def _direction(gradient: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    """By what the optimiser would move a parameter next, per unit of its learning rate.

    Weight decay and clipping are left out. A state that is not Adam's by the parameter (8 bits, sharded) is not used.
    """
    moments = {"exp_avg", "exp_avg_sq", "step"} <= state.keys()
    if not moments or state["exp_avg"].shape != gradient.shape or state["exp_avg"].dtype != gradient.dtype:
        return gradient
    (first, second), step = group["betas"], float(state["step"]) + 1
    mean = state["exp_avg"].lerp(gradient, 1 - first) / (1 - first**step)
    square = state["exp_avg_sq"].lerp(gradient**2, 1 - second) / (1 - second**step)
    update: Tensor = mean / (square.sqrt() + group["eps"])
    return update


def sample_losses(model: nn.Module, batch: Mapping[str, Tensor], output: Any) -> Tensor:
    """(B,) the policy loss of each sample, in the units of the batch's, from the model's output for the batch.

    Deviation: of a head that writes tokens it is the cross-entropy over the bins of the action tokens alone. The loss
    that is trained is over the whole vocabulary, and has the stop token, which all samples share.
    """
    if "actions" in batch and output.action_logits is None:
        error: Tensor = output.predicted_actions.float() - batch["actions"].float()
        return error.abs().mean(dim=(1, 2))
    logits = output.action_logits  # (B, K, bins)
    if "actions" in batch:
        inner: Any = model
        targets = inner.bins.encode_tensor(batch["actions"].flatten(1))
        first = inner.config.action_token_begin_id + 1
    else:
        inner, labels = model, batch["labels"]
        first = inner.config.action_token_begin_id + 1
        targets = labels[(labels != IGNORE_INDEX) & (labels >= first)].view(len(labels), -1)
    return F.cross_entropy(logits.float().transpose(1, 2), targets - first, reduction="none").mean(1)
