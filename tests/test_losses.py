"""Each loss against a naive loop and closed forms, its gradient, its symmetries, and two processes against one."""

from __future__ import annotations

import doctest
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from infovla_peft import losses
from infovla_peft.distributed import gather_anchors, mean_weight
from infovla_peft.losses import (
    SMOOTH_L1_BETA,
    CrossModalSummary,
    JointDistributionMLP,
    cmi_is_informative,
    cross_modal_mi_from_summaries,
    cross_modal_mi_loss,
    mutual_information_lower_bound,
    near_duplicates,
    output_distillation_loss,
    rac_is_informative,
    replay_anchor_contrastive_loss,
    summarize_cross_modal,
)

TEMPERATURE = 0.3
TERMS = ["rac", "rac_soft", "infonce", "relational", "paper"]
MODES = TERMS[2:]
EMBEDDING_TERMS = TERMS[:2]


def targets(term: str) -> Literal["hard", "soft"]:
    return "soft" if term == "rac_soft" else "hard"


def number(value: Tensor) -> float:
    return float(value.detach())


class Features(NamedTuple):
    """What the losses take of a mini-batch: one embedding, and the tokens with their masks."""

    embedding: Tensor  # (B, D)
    vision: Tensor  # (B, Nv, D)
    language: Tensor  # (B, Nl, D)
    vision_mask: Tensor
    language_mask: Tensor

    def take(self, rows: Tensor | slice) -> Features:
        return Features(*(tensor[rows] for tensor in self))

    def floats(self) -> tuple[Tensor, Tensor, Tensor]:
        return self[:3]


def features(seed: int, samples: int = 5, patches: int = 4, words: int = 3, dim: int = 6) -> Features:
    """Random features; the masks (the same for every seed) leave each sample at least one patch and one word."""
    draw = torch.Generator().manual_seed(seed)
    shapes = ((samples, dim), (samples, patches, dim), (samples, words, dim))
    embedding, vision, language = (torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes)
    rows = torch.arange(samples)[:, None]
    return Features(
        embedding,
        vision,
        language,
        torch.arange(patches) <= rows % patches + 1,
        torch.arange(words) <= (rows + 1) % words,
    )


def joint_network() -> JointDistributionMLP:
    torch.manual_seed(7)
    return JointDistributionMLP(hidden_size=4).double()


def summary(of: Features) -> CrossModalSummary:
    return summarize_cross_modal(of.vision, of.language, of.vision_mask, of.language_mask, temperature=TEMPERATURE)


def compute(
    term: str, student: Features, teacher: Features, bank: Features | None = None, exclude: Tensor | None = None
) -> Tensor:
    if term in EMBEDDING_TERMS:
        return replay_anchor_contrastive_loss(
            student.embedding,
            teacher.embedding,
            temperature=TEMPERATURE,
            bank=None if bank is None else bank.embedding,
            exclude=exclude,
            targets=targets(term),
        )
    return cross_modal_mi_from_summaries(
        summary(student),
        summary(teacher),
        mode=term,  # type: ignore[arg-type]
        temperature=TEMPERATURE,
        bank=None if bank is None else summary(bank).fused,
        exclude=exclude,
        joint_network=joint_network(),
    )


# --- the naive double loops, on lists of floats ----------------------------------------------------------------------

Vector = list[float]


def cosine(x: Vector, y: Vector) -> float:
    norms = math.sqrt(sum(a * a for a in x)) * math.sqrt(sum(b * b for b in y))
    return sum(a * b for a, b in zip(x, y, strict=True)) / norms


def softmax(values: Vector) -> Vector:
    weights = [math.exp(value / TEMPERATURE) for value in values]
    return [weight / sum(weights) for weight in weights]


def divergence(p: Vector, q: Vector) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def unit(x: Vector) -> Vector:
    norm = math.sqrt(sum(a * a for a in x))
    return [a / norm for a in x]


def naive_tokens(of: Features, i: int) -> tuple[list[Vector], list[Vector]]:
    return of.vision[i][of.vision_mask[i]].tolist(), of.language[i][of.language_mask[i]].tolist()


def naive_affinity(of: Features, i: int) -> list[Vector]:
    patches, words = naive_tokens(of, i)
    return [[cosine(patch, word) for word in words] for patch in patches]


def naive_fused(of: Features, i: int) -> Vector:
    patches, words = naive_tokens(of, i)
    seen, said = [0.0] * len(patches[0]), [0.0] * len(patches[0])
    for word in words:
        attention = softmax([cosine(patch, word) for patch in patches])
        for d in range(len(seen)):
            seen[d] += sum(w * unit(patch)[d] for w, patch in zip(attention, patches, strict=True))
            said[d] += unit(word)[d]
    return unit(seen) + unit(said)


def naive(term: str, student: Features, teacher: Features, bank: Features, exclude: Tensor) -> float:
    total, samples = 0.0, len(student.embedding)
    for i in range(samples):
        if term in EMBEDDING_TERMS:
            own = student.embedding[i].tolist()
            keys = [*teacher.embedding.tolist(), *bank.embedding.tolist()]
            anchor = teacher.embedding[i].tolist()
        else:
            own, anchor = naive_fused(student, i), naive_fused(teacher, i)
            keys = [naive_fused(teacher, j) for j in range(samples)]
            keys += [naive_fused(bank, j) for j in range(len(bank.embedding))]
        kept = [j for j in range(len(keys)) if j == i or not exclude[i, j]]
        new, old = naive_affinity(student, i), naive_affinity(teacher, i)
        if term in ("rac", "infonce"):
            total -= math.log(softmax([cosine(own, keys[j]) for j in kept])[kept.index(i)])
        elif term in ("rac_soft", "relational"):
            across = [softmax([cosine(query, keys[j]) for j in kept]) for query in (anchor, own)]
            total += divergence(*across)
            if term == "rac_soft":
                continue
            for turn in (lambda table: table, lambda table: [list(column) for column in zip(*table, strict=True)]):
                rows = list(zip(turn(old), turn(new), strict=True))
                total += sum(divergence(softmax(a), softmax(b)) for a, b in rows) / len(rows) / 2
        else:
            network = joint_network()
            for old_row, new_row in zip(old, new, strict=True):
                p_new, p_old = softmax(new_row), softmax(old_row)
                joint = {}
                for a, x in enumerate(p_new):
                    for b, y in enumerate(p_old):
                        pair = torch.tensor([x, y], dtype=torch.float64)
                        joint[a, b] = math.exp(number(network.layers(pair)))
                normaliser = sum(joint.values())
                information = 0.0
                for (a, b), weight in joint.items():
                    p = weight / normaliser
                    information += p * math.log(p / (p_new[a] * p_old[b]))
                total += (divergence(p_new, p_old) - information) / len(old)
    return total / samples


# --- the five tests of every term ------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", TERMS)
def test_equals_the_naive_loop(term: str) -> None:
    student, teacher, bank = features(0), features(1), features(2, samples=4)
    exclude = torch.rand(5, 9, generator=torch.Generator().manual_seed(3)) < 0.3
    exclude[0] = True  # also a positive that the caller excluded by mistake, and a row left without negatives
    expected = naive(term, student, teacher, bank, exclude)
    assert number(compute(term, student, teacher, bank, exclude)) == pytest.approx(expected, rel=1e-10)


def test_rac_closed_forms() -> None:
    """Orthonormal anchors: −log(e^(1/τ) / (e^(1/τ) + K − 1)); no information in the student: log K."""
    eye = torch.eye(4, dtype=torch.float64)
    expected = math.log(1 + 6 * math.exp(-1 / 0.5))
    bank = torch.cat((torch.zeros(3, 4), torch.eye(3)), dim=1).double()
    wide = torch.cat((eye, torch.zeros(4, 3)), dim=1).double()
    assert number(replay_anchor_contrastive_loss(wide, wide, temperature=0.5, bank=bank)) == pytest.approx(expected)
    assert number(replay_anchor_contrastive_loss(wide, wide[:1].expand(4, 7))) == pytest.approx(math.log(4))
    scaled = replay_anchor_contrastive_loss(3 * wide, 5 * wide, temperature=15.0, normalize=False)
    assert number(scaled) == pytest.approx(math.log(1 + 3 / math.e))
    equal = features(0).embedding
    assert number(replay_anchor_contrastive_loss(equal, equal, targets="soft")) == pytest.approx(0.0, abs=1e-12)
    halves = replay_anchor_contrastive_loss(eye[[1, 0]], eye[:2], temperature=0.5, targets="soft")
    assert number(halves) == pytest.approx(2 * math.tanh(1))  # KL((p, 1 − p) ‖ (1 − p, p)), p = sigmoid(1 / τ)


def test_cross_modal_closed_forms() -> None:
    one = torch.eye(2, dtype=torch.float64)
    words = one.expand(1, 2, 2)
    teacher, student = torch.eye(2).double()[None, :1], torch.eye(2).double()[None, 1:]  # patch = word 0, and word 1
    logit = 1 / TEMPERATURE
    p = 1 / (1 + math.exp(-logit))
    between = (2 * p - 1) * logit  # KL((p, 1 − p) ‖ (1 − p, p))
    for mode, expected in (("relational", between / 2), ("infonce", 0.0)):
        loss = cross_modal_mi_loss(student, words, teacher, words, mode=mode, temperature=TEMPERATURE)  # type: ignore[arg-type]
        assert number(loss) == pytest.approx(expected, abs=1e-12)
    # A constant network gives the uniform joint, whose divergence from p_new p_old is −log 4 − mean log p_new p_old.
    uniform = cross_modal_mi_loss(
        student,
        words,
        teacher,
        words,
        mode="paper",
        temperature=TEMPERATURE,
        joint_network=lambda new, old: torch.zeros(*new.shape, 2).double(),
    )
    assert number(uniform) == pytest.approx(between + 2 * math.log(2) + math.log(p) + math.log(1 - p))
    equal = features(0)
    assert number(compute("relational", equal, equal)) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("term", TERMS)
def test_gradient_reaches_the_student_only(term: str) -> None:
    student, teacher, bank = features(0), features(1), features(2, samples=2)
    for tensor in (*student.floats(), *teacher.floats(), *bank.floats()):
        tensor.requires_grad_()
    compute(term, student, teacher, bank).backward()
    assert all(tensor.grad is None for tensor in (*teacher.floats(), *bank.floats()))
    used = [student.embedding] if term in EMBEDDING_TERMS else [student.vision, student.language]
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in used)
    if term not in EMBEDDING_TERMS:
        assert student.vision.grad is not None
        assert student.vision.grad[~student.vision_mask].abs().max() == 0


@pytest.mark.parametrize("term", TERMS)
def test_gradient_equals_finite_differences(term: str) -> None:
    teacher, bank = features(1), features(2, samples=2)
    student = features(0)
    inputs = tuple(tensor.requires_grad_() for tensor in student.floats())

    def value(embedding: Tensor, vision: Tensor, language: Tensor) -> Tensor:
        return compute(term, Features(embedding, vision, language, *student[3:]), teacher, bank) + 0 * embedding.sum()

    assert torch.autograd.gradcheck(value, inputs)


@pytest.mark.parametrize("term", TERMS)
def test_order_of_samples_and_tokens_is_irrelevant(term: str) -> None:
    student, teacher, bank = features(0), features(1), features(2, samples=4)
    expected = compute(term, student, teacher, bank)
    order, bank_order = torch.tensor([3, 0, 4, 2, 1]), torch.tensor([2, 3, 1, 0])
    shuffled = compute(term, student.take(order), teacher.take(order), bank.take(bank_order))
    torch.testing.assert_close(shuffled, expected)

    def shuffle_tokens(of: Features) -> Features:
        patches, words = torch.tensor([2, 0, 3, 1]), torch.tensor([1, 2, 0])
        return Features(
            of.embedding,
            of.vision[:, patches],
            of.language[:, words],
            of.vision_mask[:, patches],
            of.language_mask[:, words],
        )

    torch.testing.assert_close(compute(term, shuffle_tokens(student), shuffle_tokens(teacher), bank), expected)


def two_processes(rank: int, folder: str, shares: list[tuple[int, int]]) -> None:
    store = dist.FileStore(os.path.join(folder, "rendezvous"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = {}
    for share, (start, end) in enumerate((shares[rank], (0, 8) if rank == 0 else (8, 8))):
        for term in TERMS:
            student, weight = student_through_layer(features(0, samples=8).take(slice(start, end)))
            teacher = features(1, samples=8).take(slice(start, end))
            others = Features(*(gather_anchors(tensor, others_only=True) for tensor in teacher))
            loss = compute(term, student, teacher, others) * mean_weight(end - start)
            loss.backward()
            gradient = weight.grad
            assert gradient is not None
            for tensor in (gradient, value := loss.detach().clone()):
                dist.all_reduce(tensor)
            found[f"{term}/{share}"] = (value / 2, gradient / 2)
    rows = torch.full((rank + 1, 2), rank, dtype=torch.bfloat16)
    found["gathered"] = (gather_anchors(rows), gather_anchors(rows > 0, others_only=True))
    if rank == 0:
        torch.save(found, os.path.join(folder, "found.pt"))
    dist.barrier()
    dist.destroy_process_group()


def student_through_layer(of: Features) -> tuple[Features, Tensor]:
    """Features that depend on one parameter, as a student's do."""
    weight = torch.linspace(-1, 1, 36, dtype=torch.float64).view(6, 6).requires_grad_()
    return Features(of.embedding @ weight, of.vision @ weight, of.language @ weight, *of[3:]), weight


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Equal loss and gradient for unequal shares of the batch, and where one process holds no replay sample at all."""
    mp.spawn(two_processes, args=(str(tmp_path), [(0, 3), (3, 8)]), nprocs=2)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for term in TERMS:
        student, weight = student_through_layer(features(0, samples=8))
        expected = compute(term, student, features(1, samples=8))
        expected.backward()
        for share in (0, 1):
            value, gradient = found[f"{term}/{share}"]
            torch.testing.assert_close(value, expected.detach())
            torch.testing.assert_close(gradient, weight.grad)
    gathered, others = found["gathered"]
    torch.testing.assert_close(gathered, torch.tensor([[0, 0], [1, 1], [1, 1]], dtype=torch.bfloat16))
    assert others.tolist() == [[True, True], [True, True]]


def test_one_process_gathers_itself() -> None:
    rows = torch.ones(2, 3, requires_grad=True)
    assert not gather_anchors(rows).requires_grad
    assert gather_anchors(rows).shape == (2, 3)
    assert gather_anchors(rows, others_only=True).shape == (0, 3)
    assert (mean_weight(2), mean_weight(0)) == (1.0, 0.0)


# --- mutual information ----------------------------------------------------------------------------------------------


def gaussian_pairs(correlation: float, samples: int, dim: int) -> tuple[Tensor, Tensor, float]:
    """Correlated Gaussians with their true mutual information −dim/2 · log(1 − ρ²)."""
    draw = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(samples, dim, generator=draw, dtype=torch.float64) for _ in range(2))
    y = correlation * x + math.sqrt(1 - correlation**2) * noise
    return x, y, -dim / 2 * math.log(1 - correlation**2)


@pytest.mark.parametrize("estimator", ["infonce", "donsker_varadhan"])
@pytest.mark.parametrize(("correlation", "dim"), [(0.0, 1), (0.5, 1), (0.8, 1), (0.7, 2)])
def test_bound_is_tight_for_the_best_critic(estimator: str, correlation: float, dim: int) -> None:
    """log p(y|x)/p(y) of Gaussians, up to a function of x, is an inner product of (x, 1) and (a y, −b |y|²)."""
    x, y, truth = gaussian_pairs(correlation, 2048, dim)
    scale = correlation / (1 - correlation**2)
    left = torch.cat((x, torch.ones(len(x), 1).double(), (x**2).sum(1, keepdim=True)), dim=1)
    square = (y**2).sum(1, keepdim=True)
    right = torch.cat(
        (scale * y, -scale * correlation / 2 * square, torch.full_like(square, -scale * correlation / 2)), 1
    )
    bound = mutual_information_lower_bound(left, right, temperature=1.0, estimator=estimator, normalize=False)  # type: ignore[arg-type]
    assert number(bound) == pytest.approx(truth, abs=0.05)


@pytest.mark.parametrize("estimator", ["infonce", "donsker_varadhan"])
@pytest.mark.parametrize("normalize", [True, False])
def test_bound_stays_below_the_truth_for_other_critics(estimator: str, normalize: bool) -> None:
    x, y, truth = gaussian_pairs(0.8, 2048, 8)
    for temperature in (0.1, 0.5, 5.0) if normalize else (2.0, 10.0):
        bound = mutual_information_lower_bound(x, y, temperature=temperature, estimator=estimator, normalize=normalize)  # type: ignore[arg-type]
        assert number(bound) < truth
    assert truth > 4


def test_bound_equals_the_naive_loop() -> None:
    x, y = features(0).embedding, features(1).embedding
    scores = [[cosine(a, b) / TEMPERATURE for b in y.tolist()] for a in x.tolist()]
    infonce = math.log(5) + sum(scores[i][i] - math.log(sum(map(math.exp, scores[i]))) for i in range(5)) / 5
    apart = [math.exp(scores[i][j]) for i in range(5) for j in range(5) if i != j]
    donsker_varadhan = sum(scores[i][i] for i in range(5)) / 5 - math.log(sum(apart) / 20)
    assert number(mutual_information_lower_bound(x, y, temperature=TEMPERATURE)) == pytest.approx(infonce)
    bound = mutual_information_lower_bound(x, y, temperature=TEMPERATURE, estimator="donsker_varadhan")
    assert number(bound) == pytest.approx(donsker_varadhan)


def test_bound_moves_both_and_is_capped() -> None:
    x, y = features(0).embedding.requires_grad_(), features(1).embedding.requires_grad_()
    mutual_information_lower_bound(x, y).backward()
    assert x.grad is not None
    assert y.grad is not None
    same = torch.eye(16)
    assert number(mutual_information_lower_bound(same, same, temperature=1e-3)) == pytest.approx(math.log(16))
    assert number(mutual_information_lower_bound(same[:1], same[:1])) == 0


def test_infonce_term_is_the_bound_turned_round() -> None:
    """cross_modal_mi_loss(mode="infonce") = log K − lower bound, on the fused latents."""
    student, teacher = summary(features(0)), summary(features(1))
    bound = mutual_information_lower_bound(student.fused, teacher.fused, temperature=TEMPERATURE)
    loss = cross_modal_mi_from_summaries(student, teacher, mode="infonce", temperature=TEMPERATURE)
    assert number(loss) == pytest.approx(math.log(5) - number(bound))


# --- numerics --------------------------------------------------------------------------------------------------------


def assert_finite_with_gradient(loss: Tensor, *inputs: Tensor) -> None:
    assert torch.isfinite(loss)
    for tensor, gradient in zip(inputs, torch.autograd.grad(loss, inputs, allow_unused=True), strict=True):
        assert gradient is None or torch.isfinite(gradient).all(), tensor.shape
        assert gradient is None or gradient.abs().max() < 1e3


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_features_without_a_direction(term: str, dtype: torch.dtype) -> None:
    student, teacher = (Features(*(t.to(dtype) for t in f.floats()), *f[3:]) for f in (features(0), features(1)))
    student.embedding[0], student.vision[1], student.language[2], student.vision[3, 0] = 0, 0, 0, 0
    teacher.embedding[4], teacher.vision[0], student.embedding[3] = 0, 0, 1e-30
    student = Features(*(tensor.requires_grad_() for tensor in student.floats()), *student[3:])
    network = joint_network().float()
    inputs = [student.embedding] if term in EMBEDDING_TERMS else [student.vision, student.language]
    if term in EMBEDDING_TERMS:
        loss = replay_anchor_contrastive_loss(student.embedding, teacher.embedding, targets=targets(term))
    else:
        loss = cross_modal_mi_loss(
            student.vision,
            student.language,
            teacher.vision,
            teacher.language,
            mode=term,  # type: ignore[arg-type]
            joint_network=network,
        )
    assert loss.dtype == torch.float32
    assert_finite_with_gradient(loss, *inputs)


@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("which", ["vision", "language", "both"])
def test_samples_without_tokens_count_as_zero(term: str, which: str) -> None:
    student, teacher = features(0), features(1)
    for side in ("vision", "language") if which == "both" else (which,):
        getattr(student, f"{side}_mask")[0] = False
        getattr(teacher, f"{side}_mask")[0] = False
    student = Features(*(tensor.requires_grad_() for tensor in student.floats()), *student[3:])
    assert_finite_with_gradient(compute(term, student, teacher), *student.floats())
    if term == "paper":
        rest = compute(term, student.take(slice(1, 5)), teacher.take(slice(1, 5)))
        torch.testing.assert_close(compute(term, student, teacher), rest * 4 / 5)
    student.vision_mask[:], teacher.vision_mask[:] = False, False
    student.language_mask[:], teacher.language_mask[:] = False, False
    if term in ("relational", "paper"):
        assert number(compute(term, student, teacher)) == 0
    assert_finite_with_gradient(compute(term, student, teacher), *student.floats())


@pytest.mark.parametrize("term", ["rac", "rac_soft", "infonce"])
def test_one_sample_without_a_bank_is_exactly_zero(term: str) -> None:
    student = features(0, samples=1)
    inputs = tuple(tensor.requires_grad_() for tensor in student.floats())
    loss = compute(term, student, features(1, samples=1))
    assert number(loss) == 0
    loss.backward()
    assert all(tensor.grad is None or tensor.grad.abs().max() == 0 for tensor in inputs)
    assert not rac_is_informative(1)
    assert rac_is_informative(1, bank=1)
    assert number(compute(term, features(0, samples=1), features(1, samples=1), features(2))) > 0


@pytest.mark.parametrize("term", TERMS)
def test_no_sample_is_exactly_zero_with_a_graph(term: str) -> None:
    student = Features(
        *(tensor[:0].requires_grad_() for tensor in features(0).floats()), *features(0).take(slice(0))[3:]
    )
    loss = compute(term, student, features(1).take(slice(0)), features(2))
    assert number(loss) == 0
    loss.backward()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e200], ids=["nan", "inf", "overflow"])
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize("term", TERMS)
def test_features_that_are_no_numbers_give_no_loss(term: str, whose: str, wrong: float) -> None:
    """They have no direction either, but must not pass for features that are 0: the training would go on."""
    of = {"student": features(0), "teacher": features(1)}
    for tensor in of[whose].floats():
        tensor[1, ..., 0] = wrong
    assert math.isnan(number(compute(term, of["student"], of["teacher"], features(2))))


@pytest.mark.parametrize("term", MODES)
def test_what_is_no_token_may_be_no_number(term: str) -> None:
    student, teacher = features(0), features(1)
    expected = number(compute(term, student, teacher))
    for of in (student, teacher):
        of.vision[~of.vision_mask] = math.nan
        of.language[~of.language_mask] = math.inf
    assert number(compute(term, student, teacher)) == expected


def test_ten_thousand_negatives() -> None:
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(8, 32, generator=draw).requires_grad_()
    bank = torch.randn(10_000, 32, generator=draw)
    loss = replay_anchor_contrastive_loss(student, student.detach(), temperature=0.01, bank=bank)
    assert_finite_with_gradient(loss, student)
    uniform = replay_anchor_contrastive_loss(student, torch.ones(8, 32), bank=torch.ones(10_000, 32))
    assert number(uniform) == pytest.approx(math.log(10_008), rel=1e-5)


@pytest.mark.parametrize("term", TERMS)
def test_bfloat16_costs_only_the_rounding_of_the_features(term: str) -> None:
    """Equal to float32 on the rounded features, also under autocast; within 2 % of float32 on the exact ones."""
    teacher, network = features(1), joint_network().float()

    def value(of: Features, anchors: Features) -> Tensor:
        if term in EMBEDDING_TERMS:
            return replay_anchor_contrastive_loss(
                of.embedding, anchors.embedding, temperature=TEMPERATURE, targets=targets(term)
            )
        tokens = (of.vision, of.language, anchors.vision, anchors.language)
        return cross_modal_mi_loss(*tokens, mode=term, temperature=TEMPERATURE, joint_network=network)  # type: ignore[arg-type]

    def cast(of: Features, dtype: torch.dtype) -> Features:
        return Features(*(tensor.to(dtype) for tensor in of.floats()), *of[3:])

    half = [cast(of, torch.bfloat16) for of in (features(0), teacher)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = value(*half)
    exact = value(cast(features(0), torch.float32), cast(teacher, torch.float32))
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, value(*(cast(of, torch.float32) for of in half)))
    torch.testing.assert_close(mixed, exact, rtol=0.02, atol=0.02)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(0, 6), st.floats(0.01, 10), st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_rac_is_between_zero_and_its_cap(samples: int, bank: int, temperature: float, seed: int, scale: float) -> None:
    """Cosines lie in [−1, 1]: 0 ≤ loss ≤ log K + 2/τ. The scale of the features is irrelevant."""
    student, anchors = features(seed, samples).embedding, features(seed + 1, samples).embedding
    rows = features(seed + 2, bank).embedding if bank else None
    loss = replay_anchor_contrastive_loss(student, anchors, temperature=temperature, bank=rows)
    assert -1e-12 <= number(loss) <= math.log(samples + bank) + 2 / temperature + 1e-9
    scaled = replay_anchor_contrastive_loss(scale * student, anchors, temperature=temperature, bank=rows)
    torch.testing.assert_close(scaled, loss)


# --- what surrounds the losses ---------------------------------------------------------------------------------------


def test_tokens_and_stored_summaries_agree() -> None:
    """The teacher's part may be computed in another batch, and stored, without changing the loss."""
    student, teacher = features(0), features(1)
    stored = [summary(teacher.take(slice(i, i + 1))) for i in range(5)]
    together = CrossModalSummary(*(torch.cat(parts) for parts in zip(*stored, strict=True)))
    for mode in MODES:
        loss = cross_modal_mi_from_summaries(
            summary(student),
            together,
            mode=mode,  # type: ignore[arg-type]
            temperature=TEMPERATURE,
            joint_network=joint_network(),
        )
        torch.testing.assert_close(loss, compute(mode, student, teacher))
        tokens = cross_modal_mi_loss(
            *student[1:3],
            *teacher[1:3],
            vision_mask=student.vision_mask,
            language_mask=student.language_mask,
            mode=mode,  # type: ignore[arg-type]
            temperature=TEMPERATURE,
            joint_network=joint_network(),
        )
        torch.testing.assert_close(tokens, loss)


def test_near_duplicates_exclude_a_sample_from_its_own_bank() -> None:
    trajectory, frame = torch.tensor([0, 0, 1]), torch.tensor([3, 9, 3])
    exclude = near_duplicates(
        trajectory, frame, window=1, bank_trajectory=torch.tensor([0, 0, 1]), bank_frame=torch.tensor([3, 4, 9])
    )
    assert exclude.int().tolist() == [[1, 0, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    anchors = features(0, samples=3).embedding
    loss = replay_anchor_contrastive_loss(anchors, anchors, bank=anchors, exclude=exclude)
    assert torch.isfinite(loss)


# --- distance to the teacher's answers -------------------------------------------------------------------------------


def answers(seed: int, samples: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(samples, 3, 5, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher.requires_grad_()


def naive_distance(student: Tensor, teacher: Tensor, kind: str) -> float:
    total = 0.0
    for mine, other in zip(student.detach().double(), teacher.detach().double(), strict=True):
        for row, target in zip(mine, other, strict=True):
            if kind == "actions":
                total += sum(abs(float(a - b)) - SMOOTH_L1_BETA / 2 for a, b in zip(row, target, strict=True)) / 5
            else:
                p, q = target.exp() / target.exp().sum(), row.exp() / row.exp().sum()
                total += sum(float(a * (a / b).log()) for a, b in zip(p, q, strict=True))
    return total / (3 * len(student))


@pytest.mark.parametrize("kind", ["actions", "logits"])
def test_output_distillation(kind: Literal["actions", "logits"]) -> None:
    student, teacher = answers(0)
    loss = output_distillation_loss(student, teacher, kind=kind)
    assert number(loss) == pytest.approx(naive_distance(student, teacher, kind), rel=1e-5)
    loss.backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert bool((student.grad != 0).any(dim=(1, 2)).all())
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(output_distillation_loss(student[order], teacher[order], kind=kind), loss)
    # Two halves, weighted as the processes that hold them are, make the whole.
    halves = [output_distillation_loss(student[part], teacher[part], kind=kind) for part in (slice(1), slice(1, None))]
    torch.testing.assert_close((halves[0] + 3 * halves[1]) / 4, loss)
    assert number(output_distillation_loss(teacher, teacher, kind=kind)) == pytest.approx(0.0, abs=1e-6)
    nothing = output_distillation_loss(student[:0], teacher[:0], kind=kind)
    assert nothing.requires_grad
    assert number(nothing) == 0.0


def test_output_distillation_closed_form_and_bad_input() -> None:
    even, sure = torch.zeros(1, 1, 2), torch.tensor([[[0.0, 50.0]]])
    assert number(output_distillation_loss(even, sure, kind="logits")) == pytest.approx(math.log(2), rel=1e-5)
    assert number(output_distillation_loss(even, even + 0.5, kind="actions")) == pytest.approx(
        0.5 - SMOOTH_L1_BETA / 2
    )
    near = torch.full_like(even, SMOOTH_L1_BETA / 4)
    assert number(output_distillation_loss(even, near, kind="actions")) == pytest.approx(SMOOTH_L1_BETA / 32)
    half = output_distillation_loss(even.bfloat16(), (even + 0.5).bfloat16(), kind="actions")
    assert half.dtype == torch.float32
    with pytest.raises(ValueError, match="equal shapes"):
        output_distillation_loss(even, torch.zeros(1, 2, 2), kind="actions")
    with pytest.raises(ValueError, match="kind must be"):
        output_distillation_loss(even, even, kind="tokens")  # type: ignore[arg-type]


def test_the_gradient_of_output_distillation_is_no_sign_of_rounding() -> None:
    """A student that begins as its teacher, up to rounding, has next to no gradient; one further off has all of it."""
    _, teacher = answers(0)
    largest = []
    for distance in (1e-7, 2 * SMOOTH_L1_BETA):
        student = (teacher.detach() + distance).requires_grad_()
        output_distillation_loss(student, teacher, kind="actions").backward()
        assert student.grad is not None
        largest.append(number(student.grad.abs().max()) * student.numel())
    assert largest[0] < 1e-3
    assert largest[1] == pytest.approx(1.0)


def test_what_carries_information() -> None:
    assert not rac_is_informative(0, bank=5)
    assert not rac_is_informative(2, exclude=torch.ones(2, 2, dtype=torch.bool))
    assert rac_is_informative(2, exclude=torch.eye(2, dtype=torch.bool))
    one = summary(features(0, samples=1))
    assert (one.vision_mask.sum(), one.language_mask.sum()) == (2, 2)
    assert [cmi_is_informative(one, mode=mode) for mode in ("infonce", "relational", "paper")] == [False, True, True]
    assert cmi_is_informative(one, mode="infonce", bank=1)
    word = one._replace(language_mask=torch.tensor([[True, False, False]]))
    assert [cmi_is_informative(word, mode=mode) for mode in ("relational", "paper")] == [True, False]
    patch = word._replace(vision_mask=torch.tensor([[True, False, False, False]]))
    assert not cmi_is_informative(patch, mode="relational")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: replay_anchor_contrastive_loss(x, x[:2]), "student and anchors"),
        (lambda x: replay_anchor_contrastive_loss(x, x, temperature=0.0), "temperature"),
        (lambda x: replay_anchor_contrastive_loss(x, x, temperature=math.nan), "temperature"),
        (lambda x: replay_anchor_contrastive_loss(x, x, temperature=1e-39), "temperature must be at least 1e-06"),
        (lambda x: replay_anchor_contrastive_loss(x, x, exclude=torch.zeros(3, 4, dtype=torch.bool)), "exclude"),
        (lambda x: replay_anchor_contrastive_loss(x, x, bank=torch.zeros(2, 9)), "bank must"),
        (lambda x: mutual_information_lower_bound(x, x, estimator="mine"), "estimator"),
        (lambda x: summarize_cross_modal(x, x), "expected vision"),
        (lambda x: summarize_cross_modal(x[None], x[None], torch.ones(1, 9)), "vision_mask"),
        (lambda x: cross_modal_mi_loss(x[None], x[None], x[None], x[None, :2]), "differ in affinity"),
        (lambda x: cross_modal_mi_loss(*[x[None]] * 4, mode="paper"), "joint_network"),
        (lambda x: cross_modal_mi_loss(*[x[None]] * 4, mode="both"), "mode"),
    ],
)
def test_bad_input_is_refused(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, 4))


def test_docstring_examples() -> None:
    result = doctest.testmod(losses, optionflags=doctest.ELLIPSIS)
    assert result.attempted >= 6
    assert result.failed == 0
