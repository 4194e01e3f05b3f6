"""Metrics against hand-computed matrices, the paper's own numbers, and their laws on random matrices."""

from __future__ import annotations

import doctest
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from infovla_peft import metrics as m

EXAMPLE = np.array([[1.0, 0.5, 0.3], [0.0, 0.8, 0.6], [0.0, 0.2, 0.9]])
METRICS: list[Callable[..., float]] = [
    m.auc,
    m.forward_transfer,
    m.negative_backward_transfer,
    m.final_average,
    m.average_accuracy,
    m.forgetting,
    m.backward_transfer,
]


@st.composite
def streams(draw: st.DrawFn, holes: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A success matrix with its learned_at: groups of tasks, cells of a finite grid, and NaN where `holes`."""
    stages = draw(st.integers(1, 5))
    learned_at = np.array(draw(st.lists(st.integers(0, stages - 1), min_size=1, max_size=8)))
    cells = st.integers(0, 20).map(lambda count: count / 20)
    if holes:
        cells = st.one_of(cells, st.just(float("nan")))
    return draw(hnp.arrays(np.float64, (len(learned_at), stages), elements=cells)), learned_at


def naive(name: str, success: np.ndarray, learned_at: np.ndarray) -> float:
    """The formulae as loops over the cells."""
    tasks, stages = success.shape
    last = stages - 1

    def mean(values: list[float]) -> float:
        values = [value for value in values if not np.isnan(value)]
        return sum(values) / len(values) if values else float("nan")

    per_task: list[float] = []
    for i in range(tasks):
        own, row = learned_at[i], success[i]
        if name == "auc":
            per_task.append(mean([row[j] for j in range(own, stages)]))
        elif name == "forward_transfer":
            per_task.append(row[own])
        elif name == "negative_backward_transfer":
            per_task.append(mean([row[own] - row[j] for j in range(own + 1, stages)]))
        elif name == "final_average":
            per_task.append(row[last])
        elif name == "forgetting" and own < last:
            earlier = [row[j] for j in range(own, last) if not np.isnan(row[j])]
            per_task.append(max(earlier) - row[last] if earlier else float("nan"))
        elif name == "backward_transfer" and own < last:
            per_task.append(row[last] - row[own])
    if name == "average_accuracy":
        return mean([mean([success[i, j] for i in range(tasks) if learned_at[i] <= j]) for j in range(stages)])
    return mean(per_task)


def test_docstrings_and_their_worked_examples() -> None:
    result = doctest.testmod(m)
    assert result.attempted > 15
    assert result.failed == 0
    for metric in METRICS:
        assert "Example" in (metric.__doc__ or "")


@given(streams(holes=True))
def test_equal_the_naive_loops(stream: tuple[np.ndarray, np.ndarray]) -> None:
    success, learned_at = stream
    for metric in METRICS:
        expected = naive(metric.__name__, success, learned_at)
        assert metric(success, learned_at) == pytest.approx(expected, nan_ok=True), metric.__name__


@given(streams(holes=True))
def test_change_no_argument_and_ignore_what_was_not_learned(stream: tuple[np.ndarray, np.ndarray]) -> None:
    success, learned_at = stream
    copies = success.copy(), learned_at.copy()
    before = m.all_metrics(success, learned_at)
    m.average_groups(success, learned_at)
    np.testing.assert_array_equal(success, copies[0])
    np.testing.assert_array_equal(learned_at, copies[1])
    success[np.arange(success.shape[1]) < learned_at[:, None]] = 0.123
    assert m.all_metrics(success, learned_at) == pytest.approx(before, nan_ok=True)


@given(streams(), st.randoms())
def test_task_order_is_irrelevant(stream: tuple[np.ndarray, np.ndarray], random: object) -> None:
    success, learned_at = stream
    order = list(range(len(learned_at)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = m.all_metrics(success[order], learned_at[order])
    assert shuffled == pytest.approx(m.all_metrics(success, learned_at), nan_ok=True)


@given(streams())
def test_forward_transfer_minus_auc_is_weighted_forgetting(stream: tuple[np.ndarray, np.ndarray]) -> None:
    """The identity behind the remark on the paper's table: FWT − AUC = mean_i n_i / (n_i + 1) · NBT_i."""
    success, learned_at = stream
    total = 0.0
    for row, own in zip(success, learned_at, strict=True):
        later = success.shape[1] - 1 - own
        if later:
            total += later / (later + 1) * m.negative_backward_transfer(row[None], np.array([own]))
    difference = m.forward_transfer(success, learned_at) - m.auc(success, learned_at)
    assert difference == pytest.approx(total / len(learned_at), abs=1e-12)


@pytest.mark.parametrize(
    ("all_seen", "reported_aa", "reported_faa"),
    [((80.8, 75.0, 82.3, 74.5, 86.0, 73.6), 78.7, 73.6), ((80.8, 64.3, 78.0, 72.3, 69.8, 66.6), 72.0, 66.6)],
)
def test_paper_average_accuracy_is_the_mean_over_stages(
    all_seen: tuple[float, ...], reported_aa: float, reported_faa: float
) -> None:
    """LIBERO-Long B5-5N1 (Info-VLA, ER): the column means are published, the matrix is not; any with these will do."""
    learned_at = np.array([0] * 5 + [1, 2, 3, 4, 5])
    success = np.tile(all_seen, (10, 1))
    np.testing.assert_allclose(m.average_by_stage(success, learned_at), all_seen)
    assert m.average_accuracy(success, learned_at) == pytest.approx(reported_aa, abs=0.05)
    assert m.final_average(success, learned_at) == pytest.approx(reported_faa, abs=0.05)


def test_base_group_weighs_its_tasks_and_can_be_averaged() -> None:
    success = np.array([[0.9, 0.5, 0.4], [0.7, 0.7, 0.6], [0.0, 1.0, 0.8], [0.0, 0.0, 0.6]])
    learned_at = np.array([0, 0, 1, 2])
    assert m.forward_transfer(success, learned_at) == pytest.approx((0.9 + 0.7 + 1.0 + 0.6) / 4)
    assert m.final_average(success, learned_at) == pytest.approx((0.4 + 0.6 + 0.8 + 0.6) / 4)
    grouped, stages = m.average_groups(success, learned_at)
    np.testing.assert_allclose(grouped, [[0.8, 0.6, 0.5], [0.0, 1.0, 0.8], [0.0, 0.0, 0.6]])
    np.testing.assert_array_equal(stages, [0, 1, 2])
    assert m.forward_transfer(grouped, stages) == pytest.approx((0.8 + 1.0 + 0.6) / 3)


def test_unfinished_run_counts_only_what_was_learned() -> None:
    complete = EXAMPLE[:2, :2]
    assert m.all_metrics(EXAMPLE[:, :2]) == pytest.approx(m.all_metrics(complete))


def test_one_stage_has_no_forgetting_to_speak_of() -> None:
    values = m.all_metrics([[0.5], [0.7]], [0, 0])
    assert values["auc"] == values["forward_transfer"] == values["final_average"] == pytest.approx(0.6)
    assert all(np.isnan(values[name]) for name in ("negative_backward_transfer", "forgetting", "backward_transfer"))


@pytest.mark.parametrize(
    ("success", "learned_at", "message"),
    [
        ([0.5, 0.7], None, "shape"),
        (np.zeros((2, 0)), None, "at least one stage"),
        ([[np.inf]], None, "NaN"),
        (EXAMPLE, [0, 1], "learned_at"),
        (EXAMPLE, [0, -1, 2], "learned_at"),
        (EXAMPLE, [0.0, 1.0, 2.0], "learned_at"),
    ],
)
def test_bad_input_is_refused(success: object, learned_at: object, message: str) -> None:
    for metric in METRICS:
        with pytest.raises(ValueError, match=message):
            metric(success, learned_at)


def test_wilson_interval() -> None:
    low, high = m.wilson_interval([0, 20, 10, 0], [20, 20, 20, 0])
    np.testing.assert_allclose(low[:3], [0.0, 0.8389, 0.2993], atol=1e-4)
    np.testing.assert_allclose(high[:3], [0.1611, 1.0, 0.7007], atol=1e-4)
    assert np.isnan([low[3], high[3]]).all()
    wider = m.wilson_interval(10, 20, confidence=0.99)
    assert wider[0] < low[2]
    assert wider[1] > high[2]


@given(st.integers(1, 1000), st.data())
def test_wilson_interval_holds_the_rate(episodes: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, episodes))
    low, high = m.wilson_interval(successes, episodes)
    assert 0 <= low <= successes / episodes <= high <= 1


@pytest.mark.parametrize(("successes", "episodes"), [(-1, 5), (6, 5), (np.nan, 5)])
def test_wilson_interval_refuses_impossible_counts(successes: float, episodes: int) -> None:
    with pytest.raises(ValueError, match="successes"):
        m.wilson_interval(successes, episodes)
    with pytest.raises(ValueError, match="confidence"):
        m.wilson_interval(1, 2, confidence=95)


def test_import_takes_numpy_only() -> None:
    code = "import sys, infovla_peft.metrics; assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
