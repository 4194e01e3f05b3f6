"""Numerics and properties: bfloat16 against float32 within derived bounds, and the corners of losses and metrics."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from infovla_peft.config import parse_stream
from infovla_peft.data.normalisation import Normaliser, compute_statistics
from infovla_peft.losses import (
    cross_modal_mi_loss,
    output_distillation_loss,
    replay_anchor_contrastive_loss,
    summarize_cross_modal,
)
from infovla_peft.metrics import all_metrics

BFLOAT16 = 2.0**-8
"""Unit roundoff of bfloat16: the relative error of rounding a number to it."""
quick = settings(max_examples=25, derandomize=True, deadline=None)


@quick
@given(seed=st.integers(0, 2**31), batch=st.integers(2, 8), temperature=st.floats(0.05, 2.0))
def test_rac_in_bfloat16_is_within_its_bound(seed: int, batch: int, temperature: float) -> None:
    """Only the features are rounded: each by at most u = 2^-8 of its norm, so their directions differ by at most 2 u,
    each cosine by 4 u + 4 u² (both sides), each logit by that over τ, and log-softmax by twice as much."""
    generator = torch.Generator().manual_seed(seed)
    student, anchors = torch.randn(2, batch, 16, generator=generator)
    exact = replay_anchor_contrastive_loss(student, anchors, temperature=temperature)
    rounded = replay_anchor_contrastive_loss(student.bfloat16(), anchors.bfloat16(), temperature=temperature)
    bound = 2 * (4 * BFLOAT16 + 4 * BFLOAT16**2) / temperature + 1e-4
    assert abs(float(exact - rounded)) <= bound
    assert rounded.dtype == torch.float32


@pytest.mark.parametrize("mode", ["infonce", "relational"])
def test_corners_give_numbers_and_gradients(mode: str) -> None:
    vision, language = torch.randn(3, 4, 8), torch.randn(3, 2, 8)
    vision[0], language[1] = 0.0, 0.0  # features of norm 0
    vision.requires_grad_()
    masked = torch.ones(3, 2, dtype=torch.bool)
    masked[2] = False  # a sample without words
    loss = cross_modal_mi_loss(vision, language, vision.detach(), language, language_mask=masked, mode=mode)  # type: ignore[arg-type]
    loss.backward()  # type: ignore[no-untyped-call]
    assert math.isfinite(float(loss.detach()))
    assert vision.grad is not None
    assert torch.isfinite(vision.grad).all()
    one = cross_modal_mi_loss(vision[:1], language[:1], vision[:1], language[:1], mode="infonce")
    assert float(one.detach()) == 0.0  # one sample has nothing to be told from
    assert torch.isfinite(summarize_cross_modal(vision.detach() * 0, language * 0).fused).all()


def test_ten_thousand_negatives() -> None:
    student = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    bank = torch.randn(10_000, 32, generator=torch.Generator().manual_seed(1))
    loss = replay_anchor_contrastive_loss(student, student.detach(), bank=bank)
    double = replay_anchor_contrastive_loss(student.detach().double(), student.detach().double(), bank=bank.double())
    assert float(loss.detach()) == pytest.approx(float(double), rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@quick
@given(seed=st.integers(0, 2**31), kind=st.sampled_from(["actions", "logits"]))
def test_the_distance_to_oneself_is_nothing(seed: int, kind: str) -> None:
    answers = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed))
    assert float(output_distillation_loss(answers, answers, kind=kind)) == pytest.approx(0.0, abs=1e-6)  # type: ignore[arg-type]


@quick
@given(
    st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.floats(0, 1), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_metrics_stay_in_their_range_and_change_nothing(success: list[list[float]]) -> None:
    matrix = np.array(success)
    before = matrix.copy()
    for name, value in all_metrics(matrix).items():
        low = 0.0 if name in ("final_average", "auc", "forward_transfer", "average_accuracy") else -1.0
        assert math.isnan(value) or low - 1e-12 <= value <= 1 + 1e-12
    np.testing.assert_array_equal(matrix, before)


@quick
@given(seed=st.integers(0, 2**31), rows=st.integers(2, 30))
def test_normalising_and_back(seed: int, rows: int) -> None:
    random = np.random.default_rng(seed)
    actions, states = random.uniform(-1, 1, (rows, 7)), random.normal(size=(rows, 8))
    normaliser = Normaliser({"x": compute_statistics(actions, states, 1)}, bounds="bounds")
    inside = random.uniform(actions.min(0), actions.max(0), (4, 7))
    again = normaliser.unnormalise_actions(normaliser.normalise_actions(inside))
    np.testing.assert_allclose(again, inside, atol=1e-12)


@quick
@given(st.integers(0, 9999), st.integers(1, 9999), st.integers(1, 9999))
def test_stream_notation_reads_what_it_writes(base: int, steps: int, each: int) -> None:
    assert parse_stream(f"B{base}-{steps}N{each}") == (base, steps, each)


@quick
@given(st.text(max_size=40))
def test_any_other_text_is_refused(text: str) -> None:
    assume(re.fullmatch(r"\s*[Bb]\d+-\d+[Nn]\d+\s*", text) is None)
    with pytest.raises(ValueError, match="write Bi-kNm"):
        parse_stream(text)
