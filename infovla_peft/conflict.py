"""How strongly each part of the loss pulls at what is trained, and whether it pulls against the new task."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

CURRENT, REPLAY = "current", "replay"
"""The policy loss in two parts: of the new task's samples, and of the replayed ones."""


def conflicts(parts: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> dict[str, Tensor]:
    """The gradient of each part of a loss: its size, and its direction beside that of the new task.

    Gradients conflict where their cosine is negative (Yu et al., 2001.06782): to first order, a step for one part
    undoes what is learned of the other. The parts are as they enter the loss, weights included, so that norms compare
    (but of a head that writes tokens the policy loss is taken over the action bins, see `sample_losses`).

    Args:
        parts: name -> scalar; one of them is `CURRENT`, the policy loss of the new task's samples.
        parameters: what is trained; nothing is added to their gradients, and the graph is kept.

    Returns:
        `grad_norm_<part>`, the gradient's L2 norm ≥ 0, of each part, and `grad_cosine_<part>` in [-1, 1], with the
        gradient of `CURRENT`, of the others; 0 where a gradient is 0. Scalars in float32, detached.

    Example:
        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> found = conflicts({"current": weight.sum(), "replay": -2 * weight[0]}, [weight])
        >>> {name: round(float(value), 3) for name, value in found.items()}
        {'grad_norm_current': 1.414, 'grad_norm_replay': 2.0, 'grad_cosine_replay': -0.707}
    """
    trained = list(parameters)
    gradients = {name: _gradient(part, trained) for name, part in parts.items()}
    current = gradients[CURRENT]
    found = {f"grad_norm_{name}": gradient.norm() for name, gradient in gradients.items()}
    for name, gradient in gradients.items():
        if name != CURRENT:
            found[f"grad_cosine_{name}"] = torch.cosine_similarity(gradient, current, dim=0, eps=1e-12)
    return found


def _gradient(part: Tensor, parameters: list[nn.Parameter]) -> Tensor:
    if not part.requires_grad:
        return torch.zeros(sum(parameter.numel() for parameter in parameters), device=part.device)
    found = torch.autograd.grad(part, parameters, retain_graph=True, allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(parameter) if gradient is None else gradient).detach().flatten().float()
            for parameter, gradient in zip(parameters, found, strict=True)
        ]
    )
