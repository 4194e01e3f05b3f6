"""The terms of Info-VLA as pure functions: replay-anchor contrastive (RAC) and cross-modal mutual information (CMI).

Paper: "Information-Theoretic Constraints for Continual Vision-Language-Action Alignment", arXiv 2603.13335. Every
function here is stateless. *Teacher* tensors (anchors, banks) never receive gradient. Everything is computed in
float32 (float64 stays), also under autocast, so bfloat16 features only cost the rounding of the features themselves. A
feature without a direction (norm below 1e-6) counts as orthogonal to everything and receives no gradient, and a sample
without valid tokens counts as 0. A term that carries no information returns an exact 0 that can still be
differentiated; `rac_is_informative` and `cmi_is_informative` tell beforehand.

With several processes, `distributed.gather_anchors(anchors, others_only=True)` is passed as `bank`, and the loss times
`distributed.mean_weight(len(student))` is then, averaged over the processes, the loss of one process with all samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CrossModalMode = Literal["infonce", "relational", "paper"]
ContrastTargets = Literal["hard", "soft"]
Estimator = Literal["infonce", "donsker_varadhan"]
JointNetwork = Callable[[Tensor, Tensor], Tensor]

SMOOTH_L1_BETA = 1e-3
"""Below this distance, in normalised actions, the loss is quadratic instead of linear. Unverified."""
LOWEST_TEMPERATURE = 1e-6
"""Of a softmax over cosines, which is an argmax long before; divided by much less, they overflow."""
_NO_DIRECTION = 1e-6
_MASKED = -1e9  # finite: a row in which everything is masked must give neither NaN nor a NaN gradient


class CrossModalSummary(NamedTuple):
    """What CMI needs to know of a sample's tokens: small enough to be stored with the replay memory.

    Attributes:
        affinity: (B, Nv, Nl), cosine similarity of every vision token with every language token, 0 where masked.
        fused: (B, 2 D), the vision-language latent: [vision as the words look at it, language], each of norm 1.
        vision_mask: (B, Nv) bool, True = a token.
        language_mask: (B, Nl) bool, True = a token.
    """

    affinity: Tensor
    fused: Tensor
    vision_mask: Tensor
    language_mask: Tensor

    def detach(self) -> CrossModalSummary:
        return CrossModalSummary(*(tensor.detach() for tensor in self))

    def to(self, device: torch.device | str) -> CrossModalSummary:
        return CrossModalSummary(*(tensor.to(device, non_blocking=True) for tensor in self))


class JointDistributionMLP(nn.Module):
    """The two-layer MLP of Eq. 5, as logits of p(Z_new = a, Z_old = b) from the pair (p(Z_new = a), p(Z_old = b)).

    Deviation: the paper's MLP acts on whole maps of a fixed size; instructions differ in length, so ours is shared by
    all pairs (a, b). Its parameters must be trained along with the adapter, and be kept out of weight decay.

    Inputs: probabilities (..., Nl) of student and of teacher. Output: (..., Nl, Nl), not normalised.

    Args:
        hidden_size: width of the hidden layer. Default: unverified (the paper does not state one).
    """

    def __init__(self, hidden_size: int = 16) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, hidden_size), nn.GELU(), nn.Linear(hidden_size, 1))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        square = (*student.shape, student.shape[-1])
        pairs = torch.stack((student[..., :, None].expand(square), teacher[..., None, :].expand(square)), dim=-1)
        logits: Tensor = self.layers(pairs).squeeze(-1)  # (..., Nl, Nl)
        return logits


def replay_anchor_contrastive_loss(
    student: Tensor,
    anchors: Tensor,
    *,
    temperature: float = 0.1,
    bank: Tensor | None = None,
    exclude: Tensor | None = None,
    normalize: bool = True,
    targets: ContrastTargets = "hard",
) -> Tensor:
    """Replay Anchor Contrastive loss, Eq. 1: each replay sample stays closest to its own anchor.

        L_RAC = mean_i −log ( exp(⟨V_i, A_i⟩ / τ) / Σ_j exp(⟨V_i, A_j⟩ / τ) )

    V_i is the student's embedding of replay sample i, A_j the frozen teacher's embedding of sample j.

    Deviations: with `bank`, j runs over stored anchors as well, not only over the mini-batch; with `exclude`,
    near-duplicates are no negatives; embeddings are normalised by default (the paper does not say).

    Eq. 1 is not smallest where the student equals the teacher: it pushes V_i away from whatever A_i resembles. With
    ``targets="soft"`` (relation distillation: Co²L, 2106.14413; SEED, 2101.04731) the target is not j = i but the
    teacher's own softmax_j(⟨A_i, A_j⟩ / τ), as KL(teacher ‖ student): 0 where the student's similarities to all
    anchors are the teacher's.

    Args:
        student: (B, D), any floating dtype.
        anchors: (B, D), the teacher's embeddings of the same samples, in the same order.
        temperature: τ ≥ 1e-6. Default: unverified (the paper does not state one).
        bank: (N, D), further anchors, used as negatives.
        exclude: (B, B + N) bool, True = this pair is no negative (columns: anchors, then bank). The pair (i, i) is the
            positive and always stays. See `near_duplicates`.
        normalize: compare by cosine instead of by inner product.
        targets: ``hard`` = Eq. 1; ``soft`` = the teacher's similarities.

    Returns:
        Scalar ≥ 0, the mean over B. An exact 0 where nothing can be contrasted: B = 0, or B = 1 without a bank.

    Raises:
        ValueError: shapes that do not fit, a temperature below 1e-6, or unknown targets.

    Example:
        >>> import torch
        >>> student = torch.eye(2)
        >>> float(replay_anchor_contrastive_loss(student, torch.eye(2), temperature=1.0))  # log(1 + 1/e)
        0.3132616...
    """
    if targets not in get_args(ContrastTargets):
        raise ValueError(f"targets must be 'hard' or 'soft', got {targets!r}")
    if targets == "soft":
        each = _relation_across(student, anchors, temperature, bank, exclude, normalize)  # (B,)
    else:
        each = -_log_softmax_diagonal(_contrast(student, anchors, temperature, bank, normalize), exclude)
    return each.mean() if len(each) else _zero(student)


def mutual_information_lower_bound(
    x: Tensor, y: Tensor, *, temperature: float = 0.1, estimator: Estimator = "infonce", normalize: bool = True
) -> Tensor:
    """Lower bound on I(X; Y) in nats from B paired samples, with the critic f(x, y) = ⟨x, y⟩ / τ.

    - ``infonce`` (1807.03748; Poole et al. 1905.06922): log B + mean_i log softmax_j f(x_i, y_j) at j = i. Low
      variance, never above log B.
    - ``donsker_varadhan``: mean_i f(x_i, y_i) − log mean_{i ≠ j} exp f(x_i, y_j). Not capped, but noisy, and from few
      samples it may exceed the truth.

    The bound is tight only for the right critic (f = log p(y | x) − log p(y), up to a constant). Other critics stay
    below it.

    Args:
        x: (B, D).
        y: (B, D), y[i] drawn together with x[i]. Both receive gradient.
        temperature: τ ≥ 1e-6.
        normalize: compare by cosine instead of by inner product.

    Returns:
        Scalar, in nats; 0 for fewer than two samples.

    Raises:
        ValueError: shapes that do not fit, a temperature below 1e-6, or an unknown estimator.

    Example, two independent directions that are always told apart:
        >>> import torch
        >>> float(mutual_information_lower_bound(torch.eye(2), torch.eye(2), temperature=0.01))  # log 2
        0.693147...
    """
    logits = _similarities(x, y, temperature, normalize)
    samples = len(logits)
    if samples < 2:
        return _zero(x) + _zero(y)
    if estimator == "infonce":
        return _log_softmax_diagonal(logits).mean() + math.log(samples)
    if estimator == "donsker_varadhan":
        independent = logits[~torch.eye(samples, dtype=torch.bool, device=logits.device)]  # (B · (B − 1),)
        return logits.diagonal().mean() - (independent.logsumexp(0) - math.log(len(independent)))
    raise ValueError(f"estimator must be 'infonce' or 'donsker_varadhan', got {estimator!r}")


def summarize_cross_modal(
    vision: Tensor,
    language: Tensor,
    vision_mask: Tensor | None = None,
    language_mask: Tensor | None = None,
    *,
    temperature: float = 0.1,
) -> CrossModalSummary:
    """Vision and language tokens → their affinities and one fused latent per sample.

    The fused latent is what the words see, beside the words: Σ_v softmax_v(cos(v, l) / τ) v, averaged over the words l
    and normalised, then the normalised mean of the words.

    Deviation: the paper's F(z) = softmax(V·Lᵀ) has learned projections V and L. Ours are the identity, on normalised
    tokens: inner products of a language model's raw hidden states run into the thousands.

    Args:
        vision: (B, Nv, D).
        language: (B, Nl, D).
        vision_mask, language_mask: (B, Nv) and (B, Nl) bool, True = a token. None: all are.
        temperature: τ ≥ 1e-6 of the attention that fuses. Default: unverified.

    Returns:
        float32; `fused` (B, 2 D) is differentiable in both inputs.

    Raises:
        ValueError: shapes or masks that do not fit, or a temperature below 1e-6.
    """
    _check_temperature(temperature)
    if vision.ndim != 3 or language.ndim != 3 or vision.shape[::2] != language.shape[::2]:
        shapes = f"{tuple(vision.shape)} and {tuple(language.shape)}"
        raise ValueError(f"expected vision (B, Nv, D) and language (B, Nl, D), got {shapes}")
    with torch.autocast(vision.device.type, enabled=False):
        vision_tokens = _unit(_tokens(vision, vision_mask, "vision_mask"))
        language_tokens = _unit(_tokens(language, language_mask, "language_mask"))
        vision_mask = _token_mask(vision_mask, vision_tokens, "vision_mask")
        language_mask = _token_mask(language_mask, language_tokens, "language_mask")
        pairs = vision_mask[:, :, None] & language_mask[:, None, :]  # (B, Nv, Nl)
        affinity = (vision_tokens @ language_tokens.transpose(1, 2)).masked_fill(~pairs, 0.0)
        attention = (affinity / temperature).masked_fill(~pairs, _MASKED).softmax(dim=1).masked_fill(~pairs, 0.0)
        words = language_mask.to(language_tokens.dtype)  # (B, Nl)
        seen = torch.einsum("bvl,bvd->bd", attention, vision_tokens)
        said = torch.einsum("bl,bld->bd", words, language_tokens)
        count = words.sum(dim=1, keepdim=True).clamp(min=1)
        fused = torch.cat((_unit(seen / count), _unit(said / count)), dim=1)  # (B, 2 D)
    return CrossModalSummary(affinity, fused, vision_mask, language_mask)


def cross_modal_mi_from_summaries(
    student: CrossModalSummary,
    teacher: CrossModalSummary,
    *,
    mode: CrossModalMode = "infonce",
    temperature: float = 0.1,
    bank: Tensor | None = None,
    exclude: Tensor | None = None,
    joint_network: JointNetwork | None = None,
) -> Tensor:
    """Cross-Modal Mutual information loss between student and teacher (Eq. 2–5), from stored summaries.

    The information is that of the student's vision-language latent Z_new about the teacher's, Z_old; not I(vision;
    language). Frames with one and the same instruction therefore still carry information.

    - ``infonce`` (default): mean_i −log softmax_j(⟨z_i, t_j⟩ / τ) at j = i, with z and t the fused latents. This is
      log K − (InfoNCE lower bound of I(Z_new; Z_old)) for K candidates: a true bound in place of Eq. 2.
    - ``relational``: the teacher's similarity structure is kept, as two divergences KL(teacher ‖ student):
      within a sample, of the token affinities (over the words for each patch and over the patches for each word,
      averaged); across samples, of softmax_j(⟨·_i, t_j⟩ / τ), which is InfoNCE with the teacher's similarities as soft
      targets, so that near-duplicates are no false negatives.
    - ``paper``: L_MI + L_MC with p(Z) = softmax of a patch's affinities over the words,
      L_MI = −KL( p(Z_new, Z_old) ‖ p(Z_new) p(Z_old) ), the joint coming from `joint_network`, and
      L_MC = KL( p(Z_new) ‖ p(Z_old) ), averaged over the patches.
      **Warning**: this is no bound. The joint is not tied to its marginals, so the network can make the KL large
      whatever the latents are; the value may fall far below 0 and says nothing about mutual information. Deviations:
      the joint is normalised, the teacher gets no gradient, and affinities are cosines over τ (the paper has learned
      projections and states neither).

    Args:
        student, teacher: summaries of the same samples, with equal masks.
        temperature: τ ≥ 1e-6. Default: unverified.
        bank: (N, 2 D), fused teacher latents of further samples; modes ``infonce`` and ``relational``.
        exclude: (B, B + N) bool, True = this pair does not take part (columns: batch, then bank). The pair (i, i)
            always does.
        joint_network: (p_new (B, Nv, Nl), p_old (B, Nv, Nl)) → logits (B, Nv, Nl, Nl); needed by, and only used in,
            mode ``paper``. It receives gradient too. `JointDistributionMLP` is ready-made.

    Returns:
        Scalar, the mean over B; ≥ 0 except in mode ``paper``.

    Raises:
        ValueError: shapes that do not fit, a temperature below 1e-6, an unknown mode, or no `joint_network`.
    """
    _check_temperature(temperature)
    for name, mine, theirs in zip(CrossModalSummary._fields, student, teacher, strict=True):
        if mine.shape != theirs.shape:
            raise ValueError(f"student and teacher differ in {name}: {tuple(mine.shape)} and {tuple(theirs.shape)}")
    teacher = teacher.detach()
    if mode == "infonce":
        return replay_anchor_contrastive_loss(
            student.fused, teacher.fused, temperature=temperature, bank=bank, exclude=exclude
        )
    if len(student.fused) == 0:
        return _zero(student.affinity) + _zero(student.fused)
    with torch.autocast(student.affinity.device.type, enabled=False):
        if mode == "relational":
            across = _relation_across(student.fused, teacher.fused, temperature, bank, exclude)
            return (_relation_within(student, teacher, temperature) + across).mean()
        if mode == "paper":
            if joint_network is None:
                raise ValueError("mode 'paper' needs joint_network=, for example JointDistributionMLP()")
            return _paper_information(student, teacher, temperature, joint_network).mean()
    raise ValueError(f"mode must be 'infonce', 'relational' or 'paper', got {mode!r}")


def cross_modal_mi_loss(
    student_vision: Tensor,
    student_language: Tensor,
    teacher_vision: Tensor,
    teacher_language: Tensor,
    *,
    vision_mask: Tensor | None = None,
    language_mask: Tensor | None = None,
    mode: CrossModalMode = "infonce",
    temperature: float = 0.1,
    bank: Tensor | None = None,
    exclude: Tensor | None = None,
    joint_network: JointNetwork | None = None,
) -> Tensor:
    """`cross_modal_mi_from_summaries` of `summarize_cross_modal`, straight from tokens.

    Args:
        student_vision, teacher_vision: (B, Nv, D), tokens of the same samples.
        student_language, teacher_language: (B, Nl, D).
        vision_mask, language_mask: (B, Nv) and (B, Nl) bool, True = a token; the same for student and teacher.
        mode, temperature, bank, exclude, joint_network: see `cross_modal_mi_from_summaries`.

    Returns:
        Scalar, the mean over B; only the student receives gradient.

    Raises:
        ValueError: as the two functions.

    Example:
        >>> import torch
        >>> vision, language = torch.eye(4)[:, None], torch.eye(4)[:, None]
        >>> loss = cross_modal_mi_loss(vision, language, vision, language, temperature=0.05)
        >>> bool(loss < 1e-4)
        True
    """
    with torch.no_grad():
        teacher = summarize_cross_modal(
            teacher_vision, teacher_language, vision_mask, language_mask, temperature=temperature
        )
    return cross_modal_mi_from_summaries(
        summarize_cross_modal(student_vision, student_language, vision_mask, language_mask, temperature=temperature),
        teacher,
        mode=mode,
        temperature=temperature,
        bank=bank,
        exclude=exclude,
        joint_network=joint_network,
    )


def output_distillation_loss(student: Tensor, teacher: Tensor, *, kind: Literal["actions", "logits"]) -> Tensor:
    """How far the policy's answers on replayed samples have moved from the frozen teacher's.

    Not in the paper. The distillation of DER++ (Buzzega et al., 2004.07211) and LwF (Li & Hoiem, 1606.09282), in the
    units of the policy's own loss: ``actions``: mean |student − teacher| over all numbers of the chunks; ``logits``:
    mean KL(teacher ‖ student) over the action positions, in nats.

    Deviation: below β = `SMOOTH_L1_BETA`, |d| is d² / 2β, and beyond it |d| − β / 2 (smooth L1). A student that starts
    as its teacher differs from it by rounding alone; the gradient of |d|, the sign of that rounding, would depend on
    the machine, the batch size and the number of processes, and Adam would make full steps of it. β is less than a
    thousandth of the range of an action.

    Args:
        student, teacher: (B, K, O), any floating dtype; normalised actions, or logits over O bins.

    Returns:
        Scalar ≥ 0, the mean over B; an exact 0 for B = 0.

    Raises:
        ValueError: shapes that differ, or an unknown kind.

    Example:
        >>> import torch
        >>> float(output_distillation_loss(torch.zeros(1, 2, 2), torch.ones(1, 2, 2), kind="actions"))  # 1 − β / 2
        0.9994999...
    """
    if student.shape != teacher.shape or student.ndim != 3:
        raise ValueError(f"expected equal shapes (B, K, O), got {tuple(student.shape)} and {tuple(teacher.shape)}")
    if len(student) == 0:
        return _zero(student)
    with torch.autocast(student.device.type, enabled=False):
        mine, target = _full(student), _full(teacher.detach())
        if kind == "actions":
            return F.smooth_l1_loss(mine, target, beta=SMOOTH_L1_BETA)
        if kind == "logits":
            return _divergence(target.log_softmax(-1), mine.log_softmax(-1), dim=-1).mean()
    raise ValueError(f"kind must be 'actions' or 'logits', got {kind!r}")


def near_duplicates(
    trajectory: Tensor,
    frame: Tensor,
    *,
    window: int,
    bank_trajectory: Tensor | None = None,
    bank_frame: Tensor | None = None,
) -> Tensor:
    """Which pairs are the same moment, or neighbours of it: same trajectory and |Δ frame| ≤ window.

    Args:
        trajectory, frame: (B,) integers; `trajectory` is unique over all tasks.
        window: in frames; 0 excludes only a second copy of the very same frame, such as a sample's own bank entry.
        bank_trajectory, bank_frame: (N,), of the bank's entries.

    Returns:
        (B, B + N) bool, ready to be passed as `exclude`.

    >>> import torch
    >>> near_duplicates(torch.tensor([0, 0, 1]), torch.tensor([4, 5, 5]), window=1).int().tolist()
    [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """
    others = [trajectory, bank_trajectory] if bank_trajectory is not None else [trajectory]
    frames = [frame, bank_frame] if bank_frame is not None else [frame]
    distance = (frame[:, None] - torch.cat(frames)[None, :]).abs()  # (B, B + N)
    return (trajectory[:, None] == torch.cat(others)[None, :]) & (distance <= window)


def rac_is_informative(samples: int, bank: int = 0, exclude: Tensor | None = None) -> bool:
    """Whether RAC, or CMI in mode ``infonce``, has at least one negative for one sample; else it is exactly 0."""
    if exclude is None:
        return samples > 0 and samples + bank > 1
    positive = torch.eye(*exclude.shape, dtype=torch.bool, device=exclude.device)
    return bool((~exclude & ~positive).any())


def cmi_is_informative(
    summary: CrossModalSummary, *, mode: CrossModalMode = "infonce", bank: int = 0, exclude: Tensor | None = None
) -> bool:
    """Whether CMI can be other than 0: a softmax over one candidate says nothing."""
    across = rac_is_informative(len(summary.fused), bank, exclude)
    if mode == "infonce":
        return across
    patches, words = summary.vision_mask.sum(dim=1), summary.language_mask.sum(dim=1)  # (B,)
    several_words = bool(((patches > 0) & (words > 1)).any())
    if mode == "paper":
        return several_words
    return across or several_words or bool(((patches > 1) & (words > 0)).any())


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _zero(tensor: Tensor) -> Tensor:
    """0 with the tensor in its graph, also if the tensor holds no or infinite values."""
    return _full(tensor)[:0].sum()


def _unit(tensor: Tensor) -> Tensor:
    """Rows of norm 1; a row without a direction becomes 0, without a gradient (F.normalize would scale it by 1e12).

    A row with NaN, or whose norm is beyond its type, becomes NaN: it must not pass for one without a direction.
    """
    norm = torch.linalg.vector_norm(tensor, dim=-1, keepdim=True)
    nowhere = norm <= _NO_DIRECTION
    divisor = norm.masked_fill(nowhere, 1.0).masked_fill(norm.isinf(), math.nan)
    return torch.where(nowhere, 0.0, tensor / divisor)


def _check_temperature(temperature: float) -> None:
    if not temperature >= LOWEST_TEMPERATURE:
        raise ValueError(f"temperature must be at least {LOWEST_TEMPERATURE}, got {temperature}")


def _tokens(tokens: Tensor, mask: Tensor | None, name: str) -> Tensor:
    """With 0 for what is no token, which may be anything, NaN too."""
    if mask is None:
        return _full(tokens)
    return _full(tokens).masked_fill(~_token_mask(mask, tokens, name)[..., None], 0.0)


def _token_mask(mask: Tensor | None, tokens: Tensor, name: str) -> Tensor:
    if mask is None:
        return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask.shape != tokens.shape[:2]:
        raise ValueError(f"{name} must have the shape {tuple(tokens.shape[:2])}, got {tuple(mask.shape)}")
    return mask.bool()


def _similarities(x: Tensor, y: Tensor, temperature: float, normalize: bool) -> Tensor:
    """⟨x_i, y_j⟩ / τ: (B, D), (M, D) → (B, M)."""
    _check_temperature(temperature)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"expected two matrices of one width, got {tuple(x.shape)} and {tuple(y.shape)}")
    with torch.autocast(x.device.type, enabled=False):
        x = _full(x)
        y = _full(y).to(x.dtype)
        if normalize:
            x, y = _unit(x), _unit(y)
        return x @ y.T / temperature


def _contrast(student: Tensor, anchors: Tensor, temperature: float, bank: Tensor | None, normalize: bool) -> Tensor:
    """Student against anchors and bank: (B, B + N), gradient to the student only."""
    if student.ndim != 2 or student.shape != anchors.shape:
        raise ValueError(f"expected student and anchors (B, D), got {tuple(student.shape)} and {tuple(anchors.shape)}")
    if bank is not None and (bank.ndim != 2 or bank.shape[1] != anchors.shape[1]):
        raise ValueError(f"bank must have the shape (N, {anchors.shape[1]}), got {tuple(bank.shape)}")
    keys = anchors.detach() if bank is None else torch.cat((_full(anchors.detach()), _full(bank.detach())))
    return _similarities(student, keys, temperature, normalize)


def _exclude(logits: Tensor, exclude: Tensor | None, value: float = -math.inf) -> Tensor:
    if exclude is None:
        return logits
    if exclude.shape != logits.shape:
        raise ValueError(f"exclude must have the shape {tuple(logits.shape)}, got {tuple(exclude.shape)}")
    positive = torch.eye(*logits.shape, dtype=torch.bool, device=logits.device)
    return logits.masked_fill(exclude.bool() & ~positive, value)


def _log_softmax_diagonal(logits: Tensor, exclude: Tensor | None = None) -> Tensor:
    logits = _exclude(logits, exclude)
    return logits.diagonal() - logits.logsumexp(dim=1)  # (B,)


def _divergence(target: Tensor, prediction: Tensor, dim: int) -> Tensor:
    """KL(target ‖ prediction) of two log-softmaxes along `dim`."""
    return F.kl_div(prediction, target, reduction="none", log_target=True).sum(dim)


def _relation_across(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    bank: Tensor | None,
    exclude: Tensor | None,
    normalize: bool = True,
) -> Tensor:
    teacher = teacher.detach()
    prediction, target = (
        _exclude(_contrast(queries, teacher, temperature, bank, normalize), exclude, _MASKED).log_softmax(dim=1)
        for queries in (student, teacher)
    )
    return _divergence(target, prediction, dim=1)  # (B,)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dimension where the mask holds, 0 where it holds nowhere."""
    return values.masked_fill(~mask, 0.0).sum(-1) / mask.sum(-1).clamp(min=1)


def _affinity_logits(summary: CrossModalSummary, temperature: float) -> tuple[Tensor, Tensor]:
    pairs = summary.vision_mask[:, :, None] & summary.language_mask[:, None, :]  # (B, Nv, Nl)
    return (_full(summary.affinity) / temperature).masked_fill(~pairs, _MASKED), pairs


def _relation_within(student: CrossModalSummary, teacher: CrossModalSummary, temperature: float) -> Tensor:
    prediction, pairs = _affinity_logits(student, temperature)
    target, _ = _affinity_logits(teacher, temperature)
    over_words = _divergence(target.log_softmax(2), prediction.log_softmax(2), dim=2)  # (B, Nv)
    over_patches = _divergence(target.log_softmax(1), prediction.log_softmax(1), dim=1)  # (B, Nl)
    return (_masked_mean(over_words, pairs.any(2)) + _masked_mean(over_patches, pairs.any(1))) / 2  # (B,)


def _paper_information(
    student: CrossModalSummary, teacher: CrossModalSummary, temperature: float, joint_network: JointNetwork
) -> Tensor:
    logits, pairs = _affinity_logits(student, temperature)
    new, old = logits.log_softmax(2), _affinity_logits(teacher, temperature)[0].log_softmax(2)  # (B, Nv, Nl)
    words = student.language_mask[:, None, :, None] & student.language_mask[:, None, None, :]  # (B, 1, Nl, Nl)
    joint = joint_network(new.exp(), old.exp()).masked_fill(~words, _MASKED)  # (B, Nv, Nl, Nl)
    joint = joint.flatten(2).log_softmax(2).view_as(joint)
    independent = (new[..., :, None] + old[..., None, :]).masked_fill(~words, _MASKED)
    information = _divergence(joint, independent, dim=-1).sum(-1)  # (B, Nv)
    consistency = _divergence(new, old, dim=2)  # (B, Nv)
    return _masked_mean(consistency - information, pairs.any(2))  # (B,)
