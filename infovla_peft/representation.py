"""Measures of what a representation keeps: affinity maps and their diffusion, CKA, similarities, swapped words.

Pure functions on tensors; `analysis.analyse_run` applies them to every stage of a run.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .features import Features
from .losses import summarize_cross_modal


def affinity_maps(features: Features, words: Tensor | None = None, *, temperature: float = 0.1) -> Tensor:
    """What the instruction looks at: softmax over the patches of cos(patch, word) / τ, averaged over the words.

    Deviation from the paper, whose figures show the attention of its model: these are the affinities that the
    cross-modal loss works on (`losses.summarize_cross_modal`), of the tapped layer.

    Args:
        features: of B frames, see `features.extract_features`.
        words: (B, Nl) bool, the tokens that are averaged; None: all of the prompt.
        temperature: τ > 0.

    Returns:
        (B, Nv), each row a distribution over the patches of all images. 0 in a row without words.
    """
    summary = summarize_cross_modal(
        features.vision, features.language, None, features.language_mask, temperature=temperature
    )
    mask = features.language_mask if words is None else features.language_mask & words  # (B, Nl)
    looks = (summary.affinity / temperature).softmax(dim=1)  # (B, Nv, Nl)
    weight = mask.to(looks.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
    return (looks @ weight[..., None]).squeeze(-1)


def diffusion(maps: Tensor) -> Tensor:
    """Normalised entropy −Σ p log p / log P of distributions (…, P) over P patches: (…), in [0, 1].

    1 = spread evenly over all patches, 0 = all on one.

    Raises:
        ValueError: fewer than two patches.

    >>> diffusion(torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    if maps.shape[-1] < 2:
        raise ValueError(f"a map needs at least two patches to spread over, got {maps.shape[-1]}")
    spread: Tensor = torch.special.entr(maps).sum(-1) / math.log(maps.shape[-1])
    return spread.clamp(0.0, 1.0)


def linear_cka(x: Tensor, y: Tensor, *, unbiased: bool = False) -> Tensor:
    """Linear centred kernel alignment of two representations of the same N samples. Kornblith et al., 1905.00414.

        CKA = ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖), Frobenius norms, X and Y centred

    Invariant to rotation and to isotropic scaling of either; 1 for representations that are equal up to these. With
    few samples in many dimensions it is far above 0 even for independent ones. `unbiased` mends that: the same ratio
    with the unbiased estimator of HSIC (Song et al. 2012; Nguyen et al., 2010.15327), whose expectation for
    independent representations is about 0, and which may be slightly negative.

    Args:
        x: (N, D1), y: (N, D2), any floating dtype; computed in float64.
        unbiased: needs N ≥ 4.

    Returns:
        Scalar, ≤ 1. 0 where one of them does not vary at all.

    Raises:
        ValueError: not two matrices of equally many rows, or too few rows.

    >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
    >>> round(float(linear_cka(x, 3 * x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))), 6)
    1.0
    """
    fewest = 4 if unbiased else 2
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < fewest:
        raise ValueError(f"expected (N, D1) and (N, D2), N ≥ {fewest}, got {tuple(x.shape)} and {tuple(y.shape)}")
    gram = [features @ features.T for features in (_centred(x), _centred(y))]  # (N, N)
    if unbiased:
        gram = [matrix - matrix.diagonal().diag() for matrix in gram]
    product = _hsic_unbiased if unbiased else _frobenius
    scale = product(gram[0], gram[0]) * product(gram[1], gram[1])
    if not float(scale) > 0:
        return x.new_zeros((), dtype=torch.float64)
    return (product(gram[0], gram[1]) / scale.sqrt()).clamp(max=1.0)


def _centred(x: Tensor) -> Tensor:
    x = x.double()
    return x - x.mean(0)


def _frobenius(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum()


def _hsic_unbiased(one: Tensor, other: Tensor) -> Tensor:
    """Of two Gram matrices (N, N) with zero diagonals, Song et al. 2012, Eq. 5, times N (N − 3)."""
    n = len(one)
    rows = one.sum(0) @ other.sum(0)
    return (one * other).sum() + one.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)


def similarity_matrix(x: Tensor, y: Tensor, *, centre: Tensor | None = None) -> Tensor:
    """Cosines between the rows of two representations of the same frames: (N, D), (M, D) → (N, M), in [-1, 1].

    Args:
        centre: (D,), taken off both before. All features of a model share a large part that says nothing about the
            frame, and hides what does.
    """
    if centre is not None:
        x, y = x - centre, y - centre
    return F.normalize(x.float(), dim=-1) @ F.normalize(y.float(), dim=-1).T


def swap_change(own: Tensor, swapped: Tensor) -> Tensor:
    """Mean absolute change of actions under other instructions.

    Args:
        own: (N, T, A), normalised chunks under the frames' own instruction.
        swapped: (I, N, T, A), under I others.

    Returns:
        (I,), one number per instruction; 0 where the policy does not hear it.
    """
    return (swapped - own).abs().flatten(1).mean(1)
