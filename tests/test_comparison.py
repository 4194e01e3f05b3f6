"""Comparing methods: statistics on hand-computed cases; tables and figures say what the aggregate says, no more."""

from __future__ import annotations

import copy
import csv
import dataclasses
import doctest
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from infovla_peft import comparison, comparison_blocks, comparison_figures, intervals
from infovla_peft.comparison import (
    Comparison,
    ComparisonError,
    Ranking,
    agreement_of_orders,
    comparable,
    differences,
    estimates,
    load_comparison,
    rank,
    rankings,
    read_comparison,
    same_ranking,
)
from infovla_peft.comparison_blocks import refresh_tables
from infovla_peft.comparison_figures import draw_comparison
from infovla_peft.comparison_tables import write_tables
from infovla_peft.figures import method_looks
from infovla_peft.intervals import bootstrap_mean, paired_difference

REPOSITORY = Path(__file__).parents[1]
LEARNED_AT = [0, 0, 1, 2]


def run(method: str, seed: int = 0, order: str = "A", *, last: list[float] | None = None, **changes: Any) -> dict:
    """A B2-2N1 run; `last` is its last column."""
    end = last or [0.5, 0.7, 0.8, 0.6]
    return {
        "suite": "libero_goal",
        "method": method,
        "seed": seed,
        "order": order,
        "memory": 1,
        "tasks": ["open_it", "push_it", "turn_it", "lift_it"]
        if order == "A"
        else ["open_it", "push_it", "b_1", "b_2"],
        "learned_at": LEARNED_AT,
        "success": [[0.9, 0.6, end[0]], [0.7, 0.7, end[1]], [None, 1.0, end[2]], [None, None, end[3]]],
        "episodes": [[10, 10, 20], [10, 10, 20], [None, 10, 20], [None, None, 20]],
        "assets": "official",
        "renderer": "fast",
        "step_cap": 300,
        "commit": "0123abc",
        "versions": {"python": "3.11.7"},
        "train_seconds": 100.5,
        "evaluate_seconds": 50,
        "config": {"method": method},
        **changes,
    }


def aggregate(*runs: dict[str, Any]) -> dict[str, Any]:
    return {"format_version": 1, "protocol": {"name": "test"}, "runs": list(runs)}


def compare(*runs: dict[str, Any]) -> Comparison:
    return read_comparison(aggregate(*runs))


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))


def test_doctests() -> None:
    for module in (comparison, comparison_blocks, intervals):
        assert doctest.testmod(module).failed == 0


def test_a_bootstrap_interval_by_hand() -> None:
    # Two runs, 0 and 1: the mean of a resample is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4.
    assert bootstrap_mean([0.0, 1.0]) == (0.5, 0.0, 1.0, 2, 0.5, 2)  # error: s = √½, by √2
    assert bootstrap_mean([0.0, 1.0], confidence=0.4) == (0.5, 0.5, 0.5, 2, 0.5, 2)
    assert bootstrap_mean([0.3] * 5)[1:3] == pytest.approx((0.3, 0.3))


def test_nan_and_single_values_have_no_interval() -> None:
    mean, low, high, n, error, groups = bootstrap_mean([math.nan, 0.25])
    assert (mean, n, groups) == (0.25, 1, 1)
    assert all(map(math.isnan, (low, high, error)))
    assert math.isnan(bootstrap_mean([math.nan]).mean)
    assert bootstrap_mean([]).n == 0


def test_the_bootstrap_is_seeded_and_covers() -> None:
    values = np.random.default_rng(1).normal(size=40)
    first = bootstrap_mean(values)
    assert first == bootstrap_mean(values)
    assert first != bootstrap_mean(values, seed=1)
    # Near the normal approximation, mean ± 1.96 standard errors.
    error = values.std() / 40**0.5
    assert first.low == pytest.approx(values.mean() - 1.96 * error, abs=0.03)
    assert first.high == pytest.approx(values.mean() + 1.96 * error, abs=0.03)


@pytest.mark.parametrize("options", [{"resamples": 0}, {"confidence": 1.0}])
def test_unusable_bootstrap_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        bootstrap_mean([0.5], **options)
    with pytest.raises(ValueError, match="expected"):
        bootstrap_mean([[0.5]])
    with pytest.raises(ValueError, match="as many groups"):
        bootstrap_mean([0.5, 0.5], groups=[1])


def test_runs_of_a_seed_are_drawn_together() -> None:
    # Two orders of each seed that are alike say no more than one.
    once, twice = (
        bootstrap_mean([0.1, 0.4, 0.7]),
        bootstrap_mean([0.1, 0.1, 0.4, 0.4, 0.7, 0.7], groups=[0, 0, 1, 1, 2, 2]),
    )
    assert twice[:3] == pytest.approx(once[:3])
    assert (twice.n, twice.groups) == (6, 3)
    assert twice.error == pytest.approx(once.error)
    assert twice.student() == pytest.approx(once.student())
    # Seeds with unequal numbers of orders: the sandwich estimator, by matrices.
    values, groups = np.array([0.2, 0.6, 0.3, 0.9, 0.1]), np.array([0, 0, 1, 2, 2])
    scores = (groups == np.arange(3)[:, None]) @ (values - values.mean())
    found = bootstrap_mean(values, groups=groups.tolist())
    assert found.error == pytest.approx(math.sqrt(3 / 2 * scores @ scores) / 5)
    assert found.mean == pytest.approx(values.mean())
    # A seed without a value is none.
    assert bootstrap_mean([0.2, 0.4, math.nan], groups=[0, 0, 1])[3:] == (2, pytest.approx(math.nan, nan_ok=True), 1)


def test_a_paired_difference_sees_only_common_pairs() -> None:
    theirs = {(0, "A"): 0.1, (1, "A"): 0.9, (2, "A"): math.nan, (3, "A"): 0.0}
    ours = {(0, "A"): 0.3, (1, "A"): 1.1, (2, "A"): 0.5, (0, "B"): 1.0}
    # The runs differ by 0.8 among themselves, the pairs by nothing.
    assert paired_difference(ours, theirs) == pytest.approx((0.2, 0.2, 0.2, 2, 0.0, 2))
    assert paired_difference({}, theirs).n == 0


def ranked(**by_order: list[list[str]]) -> dict[str, Ranking]:
    return {order: Ranking(levels, [0]) for order, levels in by_order.items()}


def test_ranks_and_ties() -> None:
    assert rank({"a": 0.1, "b": 0.3, "c": 0.2}, higher_is_better=False) == [["a"], ["c"], ["b"]]
    assert rank({"a": 0.1 + 0.2, "b": 0.3}) == [["a", "b"]]
    assert same_ranking(ranked(A=[["a"], ["b"]])) is None
    assert same_ranking(ranked(A=[["a"]], B=[["a"]])) is None
    assert same_ranking(ranked(A=[["a", "b"]], B=[["b", "a"]])) is True
    assert same_ranking(ranked(A=[["a"], ["b"]], B=[["b"], ["a"]])) is False


def test_rankings_compare_the_same_methods_and_seeds() -> None:
    good, bad = [0.9, 0.9, 0.9, 0.9], [0.1, 0.1, 0.1, 0.1]
    runs = compare(
        run("er", 0, "A", last=bad),
        run("infovla", 0, "A", last=good),
        run("er", 0, "B", last=good),
        run("infovla", 0, "B", last=bad),
        run("er", 1, "A", last=good),  # infovla has no seed 1 there
        run("mir", 0, "A", last=good),  # not run under B
    ).runs
    assert rankings(runs, "final_average") == ranked(A=[["infovla"], ["er"]], B=[["er"], ["infovla"]])
    runs[1].success[0][0] = 0.8  # another base
    assert rankings(runs, "final_average")["A"] == ([], [])


def test_metrics_of_a_run_by_hand() -> None:
    found = compare(run("er")).runs[0].metrics()
    assert found["final_average"] == pytest.approx((0.5 + 0.7 + 0.8 + 0.6) / 4)
    assert found["forward_transfer"] == pytest.approx((0.9 + 0.7 + 1.0 + 0.6) / 4)
    assert found["adaptation"] == pytest.approx((1.0 + 0.6) / 2)
    assert found["retention"] == pytest.approx((0.5 + 0.7 + 0.8) / 3)
    assert found["negative_backward_transfer"] == pytest.approx(((0.3 + 0.4) / 2 + 0.0 + 0.2) / 3)


def test_estimates_and_differences() -> None:
    better = [0.6, 0.8, 0.9, 0.7]
    runs = compare(
        run("er", 0), run("er", 1, last=[0.1, 0.3, 0.4, 0.2]), run("infovla", 0, last=better), run("infovla", 7)
    ).runs
    assert estimates(runs)["er"]["final_average"].mean == pytest.approx((0.65 + 0.25) / 2)
    mean, low, _, n, *_ = differences(runs, "er")["infovla"]["final_average"]
    assert (mean, n) == (pytest.approx(0.1), 1)
    assert math.isnan(low)
    assert differences(runs, "ewc") == {}


def test_a_comparison_of_some_methods() -> None:
    found = compare(run("er"), run("infovla"), run("mir"))
    assert [each.method for each in found.only(["mir", "er"]).runs] == ["er", "mir"]
    assert found.only(None) is found
    with pytest.raises(ValueError, match="no run of ewc; there are runs of er, infovla, mir"):
        found.only(["ewc", "er"])


def test_a_comparison_of_some_seeds(tmp_path: Path) -> None:
    """`er` has a seed more, in which it does worse: of the seeds that both have, neither is ahead."""
    runs = [run(method, seed) for method in ("er", "infovla") for seed in (0, 1, 2)]
    found = compare(run("er", 6, last=[0.0, 0.0, 0.0, 0.0]), *runs)
    means = {method: values["final_average"].mean for method, values in estimates(found.runs).items()}
    assert means["er"] < means["infovla"]
    shared = found.only(seeds=[0, 1, 2])
    means = {method: values["final_average"].mean for method, values in estimates(shared.runs).items()}
    assert means["er"] == means["infovla"]
    with pytest.raises(ValueError, match="no run of seed 9; there are runs of seed 0, 1, 2, 6"):
        found.only(["er"], [0, 9])
    write_tables(found, tmp_path, ["er"])
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "| er | 4 | A | 0–2, 6 |" in text
    assert "| infovla | 3 | A | 0–2 |" in text


def test_a_method_looks_the_same_in_every_figure() -> None:
    names = ["er", "infovla", "multitask", "one", "two"]
    looks = dict(zip(names, method_looks(names), strict=True))
    assert len(set(looks.values())) == len(names)
    many = [*names, *(f"method_{index}" for index in range(100))]
    assert len(set(method_looks(many))) == len(many)
    assert method_looks(["two", "multitask"], among=names) == [looks["two"], looks["multitask"]]
    assert compare(*map(run, names)).only(["two"]).methods == tuple(names)


def test_how_far_the_orders_of_a_seed_agree() -> None:
    def kept(seed: int, order: str, first: float, second: float) -> dict[str, Any]:
        rows = [[0.8, first, first], [0.9, second, second], [None, 0.7, 0.8], [None, None, 0.6]]
        return run("er", seed, order, success=rows)

    alike = [kept(0, "A", 0.2, 0.9), kept(1, "A", 0.6, 0.5), kept(0, "B", 0.1, 0.8), kept(1, "B", 0.5, 0.4)]
    assert agreement_of_orders(compare(*alike).runs) == {"er": (pytest.approx(1.0), 4)}
    against = [*alike[:2], kept(0, "B", 0.5, 0.4), kept(1, "B", 0.1, 0.8)]
    assert agreement_of_orders(compare(*against).runs) == {"er": (pytest.approx(-1.0), 4)}
    # Levels of tasks that all seeds share are no agreement; without a second seed or order there is nothing to say.
    assert agreement_of_orders(compare(*alike[:3]).runs) == {}
    assert agreement_of_orders(compare(*alike[:2]).runs) == {}
    same = [kept(seed, order, 0.2, 0.9) for seed in (0, 1) for order in "AB"]
    assert agreement_of_orders(compare(*same).runs) == {}
    # Nor of streams without a base, and of orders that have other base tasks only what both have.
    other = [dataclasses.replace(each, learned_at=[1, 1, 1, 2]) for each in compare(*alike).runs]
    assert agreement_of_orders(other) == {}
    other = [
        dataclasses.replace(each, tasks=["task_9", *each.tasks[1:]]) if each.order == "B" else each
        for each in compare(*alike).runs
    ]
    assert agreement_of_orders(other) == {"er": (pytest.approx(1.0), 2)}
    fresh = refresh_tables(block("show=agreement memory=1"), compare(*against))
    assert "| `er` | 4 | −1.00 |" in fresh


def test_runs_from_different_bases_are_no_pair() -> None:
    other_base = run("infovla", 1, success=[[0.8, 0.6, 0.5], *run("er")["success"][1:]])
    found = differences(compare(run("er", 0), run("er", 1), run("infovla", 0), other_base).runs, "er")
    assert found["infovla"]["final_average"].n == 1


def test_a_pair_starts_from_the_same_weights_or_from_bases_that_do_the_same() -> None:
    column = {"success": [[0.8, 0.6, 0.5], *run("er")["success"][1:]]}

    def pairs(*runs: dict[str, Any]) -> int:
        return differences(compare(*runs).runs, "er")["infovla"]["final_average"].n

    assert pairs(run("er", base="a"), run("infovla", base="b")) == 1  # another processor
    assert pairs(run("er", base="a"), run("infovla")) == 1  # an older aggregate
    assert pairs(run("er", base="a"), run("infovla", base="a", **column)) == 1
    assert pairs(run("er", base="a"), run("infovla", base="b", base_seed=1)) == 0  # the column is alike by chance
    assert pairs(run("er", base="a"), run("er", 1), run("infovla", base="b", **column), run("infovla", 1)) == 1


def test_students_interval_by_hand() -> None:
    """n = 3: mean 4, s = 2, half width 4.3027 · 2 / √3."""
    low, high = bootstrap_mean([2.0, 4.0, 6.0]).student()
    assert (low, high) == (pytest.approx(4 - 4.3027 * 2 / 3**0.5), pytest.approx(4 + 4.3027 * 2 / 3**0.5))
    assert math.isnan(bootstrap_mean([1.0]).student()[0])
    many = bootstrap_mean(np.arange(50.0))
    assert many.student()[1] == pytest.approx(24.5 + 2.0423 * many.error)


def test_means_over_other_orders_do_not_stand_in_one_table(tmp_path: Path) -> None:
    """`mir` was not run under B: its mean, of A alone, is about other tasks than a mean over both."""
    runs = [run(method, seed, order) for method in ("er", "infovla") for seed in (0, 1) for order in "AB"]
    mixed = compare(*runs, run("mir", 0, "A"))
    assert {order: len(own) for order, own in comparable(mixed.runs).items()} == {"A": 5, "B": 4}
    assert list(comparable(compare(*runs).runs)) == [None]
    write_tables(mixed, tmp_path, ["er"])
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert text.index("### Order A") < text.index("| mir | 1 | A |") < text.index("### Order B")
    assert "| infovla | 4 | 0 | +0.0 [+0.0, +0.0] | [+0.0, +0.0] |" in text
    assert "| mir | 1 | 0 | +0.0 | not measured |" in text
    rows = read_csv(tmp_path / "metrics.csv")
    assert {(row["order"], row["method"]) for row in rows} == {
        ("A", "er"), ("A", "infovla"), ("A", "mir"), ("B", "er"), ("B", "infovla"),
    }  # fmt: skip
    assert {path.name for path in draw_comparison(mixed, tmp_path) if path.name.startswith("success")} == {
        "success_over_stages_libero_goal_m1_A.png",
        "success_over_stages_libero_goal_m1_B.png",
    }


def test_an_unmeasured_cell_is_no_number(tmp_path: Path) -> None:
    content = run("er")
    content["success"] = [[None] * 3 for _ in range(4)]
    content["episodes"] = [[None] * 3 for _ in range(4)]
    write_tables(compare(content), tmp_path, [])
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert text.count("| not measured") == 9
    assert not any(word in text for word in ("nan", "0.0"))
    rows = read_csv(tmp_path / "metrics.csv")
    assert {row["mean"] for row in rows} == {""}


def test_tables_hold_what_the_file_holds(tmp_path: Path) -> None:
    runs = [run(method, seed, order) for method in ("er", "infovla_rac_only") for seed in (0, 1) for order in "AB"]
    runs += [run("er", memory=0), run("infovla_rac_only", memory=0)]
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(aggregate(*runs)), encoding="utf-8")
    paths = write_tables(load_comparison(file), tmp_path / "tables", ["er"])
    assert [path.name for path in paths] == ["tables.md", "tables.tex", "metrics.csv", "differences.csv"]
    text = paths[0].read_text(encoding="utf-8")
    assert "| er | 4 | A, B | 0, 1 | ? | 65.0 [65.0, 65.0] |" in text
    assert "| infovla_rac_only | 4 | 0 | +0.0 [+0.0, +0.0] | [+0.0, +0.0] |" in text
    assert "the same weights:" not in text
    assert "| er | 1 | A | 0 | ? | 65.0 |" in text  # the section of memory 0: one run, no interval
    assert "- order A, seeds 0, 1: er = infovla_rac_only" in text
    assert "The ranking is the same under all orders. Ranked are the methods" in text
    assert "libero_goal, 0 trajectories per past task" in text
    assert "8 runs, seeds 0, 1; official assets, fast renderer, step cap 300; rollouts per cell 10 to 20" in text
    assert "0123abc" in text
    tex = paths[1].read_text(encoding="utf-8")
    assert r"infovla\_rac\_only & 4 & A, B & 0, 1 & ? & 65.0 [65.0, 65.0]" in tex
    assert tex.count(r"\begin{tabular}{") == tex.count(r"\end{tabular}") == 4
    assert tex.count(r"\resizebox{") == 4  # a page may be narrower than they are
    rows = read_csv(paths[3])
    assert {row["method"] for row in rows} == {"infovla_rac_only"}
    assert {(row["pairs"], row["seeds"]) for row in rows if row["memory"] == "1"} == {("4", "2")}
    assert {(row["runs"], row["seeds"]) for row in read_csv(paths[2])} == {("4", "2"), ("1", "1")}
    with pytest.raises(ValueError, match="no run of ewc; there are er, infovla_rac_only"):
        write_tables(load_comparison(file), tmp_path / "tables", ["ewc"])


def block(words: str, body: str = "") -> str:
    return f"before\n<!-- table {words} -->\n{body}<!-- end -->\nbehind\n"


def test_tables_inside_a_text() -> None:
    runs = [run(method, seed, order) for method in ("er", "infovla") for seed in (0, 1) for order in "AB"]
    runs += [run("mir", 1, last=[0.5, 0.7, 0.8, 0.8]), run("er", memory=0)]
    found = compare(*runs)
    where = "suite=libero_goal memory=1"
    text = block(f"show=means {where} order=A", "| old |\n") + block(f"show=means {where} methods=er,infovla")
    fresh = refresh_tables(text, found)
    assert fresh == refresh_tables(fresh, found)
    assert fresh.count("before") == fresh.count("behind") == 2
    assert "old" not in fresh
    assert "| `er` | 2 | 0, 1 | ? | 65.0 [65.0, 65.0] |" in fresh
    assert "| `mir` | 1 | 1 | ? | 70.0 | " in fresh
    assert "| `infovla` | 4 | 0, 1 | ? | 65.0 [65.0, 65.0] |" in fresh
    fresh = refresh_tables(block(f"show=differences {where} against=er methods=mir"), found)
    assert "| minus `er` | pairs | same weights | final average | Student's | AUC |" in fresh
    assert "| `mir` | 1 | 0 | +5.0 |  | " in fresh
    assert "infovla" not in fresh
    seeds = [
        run("er", 0, base="abcdef"),
        run("er", 1, base="b"),
        run("mir", 0, base="abcdef"),
        run("mir", 1, base="c"),
    ]
    assert "| `mir` | 2 | 0, 1 | abcd, c | " in refresh_tables(block("show=means memory=1"), compare(*seeds))
    assert "| `mir` | 2 | 1 | +0.0" in refresh_tables(block("show=differences memory=1"), compare(*seeds))
    other = block(f"of=another show=means {where} order=A", "| kept |\n")
    assert refresh_tables(other, found) == other
    ours = block(f"of={found.protocol['name']} show=means {where} order=A", "| old |\n")
    assert "| `er` | 2 | 0, 1 | ? | 65.0" in refresh_tables(ours, found)
    fresh = refresh_tables(block(f"show=last {where} order=A"), found)
    assert "| `er` | 10 14 16 12 | 10 14 16 12 |" in fresh
    assert "| `mir` |  | 10 14 16 16 |" in fresh


def test_a_table_of_some_seeds() -> None:
    found = compare(*(run(method, seed) for method in ("er", "infovla") for seed in (0, 1)), run("er", 6))
    assert "| `er` | 3 | 0, 1, 6 |" in refresh_tables(block("show=means"), found)
    assert "| `er` | 2 | 0, 1 |" in refresh_tables(block("show=means seeds=0,1"), found)


def test_a_table_of_each_seed_with_the_errors_of_analysed_runs() -> None:
    errors = [[0.1, 0.2, 0.05], [0.1, 0.2, 0.07], [None, 0.3, None], [None, None, 0.08]]
    analysis = {"cka": errors, "action_error": errors}
    found = compare(run("er", 3, last=[0.5, 0.5, 0.25, 1.0]), run("er", 1, analysis=analysis), run("mir", 1))
    lines = refresh_tables(block("show=each memory=1"), found).splitlines()
    assert lines[2] == (
        "| row | seed | base tasks, of 40 | turn it, of 20 | lift it, of 20 | final average, % | error, base tasks | "
        "error, turn it | error, lift it |"
    )
    assert lines[4] == "| `er` | 1, 3 | 24, 20 | 16, 5 | 12, 20 | 65.0, 56.2 | 0.0600, – | –, – | 0.0800, – |"
    assert lines[5] == "| `mir` | 1 | 24 | 16 | 12 | 65.0 | – | – | – |"


def test_a_table_of_the_gradients_that_runs_have_logged() -> None:
    mine = {
        "grad_norm_current": [None, 2.0, 4.0],
        "grad_norm_rac": [None, 0.5, 0.25],
        "grad_cosine_rac": [None, -0.5, 0],
    }
    other = {"grad_norm_current": [None, 3.0, 4.0], "grad_norm_rac": [None, 0.5, None]}
    found = compare(run("infovla", 1, gradients=mine), run("infovla", 0, gradients=other), run("er", 2))
    lines = refresh_tables(block("show=gradients memory=1"), found).splitlines()
    assert lines[2] == "| row | seed | stage | norm, new task | norm, RAC | cosine, RAC |"
    assert lines[4] == "| `infovla` | 0, 1 | turn it | 2.500 | 0.500 | −0.500 |"
    assert lines[5] == "| `infovla` | 0, 1 | lift it | 4.000 | 0.250 | 0.000 |"
    assert "er" not in "".join(lines[4:6]).replace("`infovla`", "").replace("norm", "")
    with pytest.raises(ComparisonError, match="no run has logged them"):
        refresh_tables(block("show=gradients memory=1"), compare(run("er")))


@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ([], "gradients must be an object"),
        ({"grad_norm_rac": [None] * 2}, "grad_norm_rac must be an array of 3"),
        ({"grad_norm_rac": [None, "x", 1.0]}, r"grad_norm_rac\[1\] must be a"),
    ],
)
def test_damaged_gradients_in_an_aggregate_are_refused(gradients: Any, message: str) -> None:
    with pytest.raises(ComparisonError, match=message):
        compare(run("er", gradients=gradients))


@pytest.mark.parametrize(
    ("analysis", "message"),
    [
        ({"cka": []}, "analysis"),
        ({"cka": [[None] * 3] * 4, "action_error": [[None] * 3] * 3}, "action_error must be an array of 4"),
        ({"cka": [[None] * 2] * 4, "action_error": [[None] * 3] * 4}, r"cka\[0\] must be an array of 3"),
        ({"cka": [["x"] * 3] * 4, "action_error": [[None] * 3] * 4}, r"cka\[0\]\[0\] must be a"),
    ],
)
def test_a_damaged_analysis_in_an_aggregate_is_refused(analysis: Any, message: str) -> None:
    with pytest.raises(ComparisonError, match=message):
        compare(run("er", analysis=analysis))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (block("show=each suite=libero_goal memory=1"), "the orders have other tasks; say which order="),
        (block("show=means suite=libero_goal memory=1"), "not all of these methods had all orders; say which order="),
        (block("show=means suite=libero_goal"), "say which suite=, and which memory="),
        (block("show=means suite=libero_90"), "there is no run of all that"),
        (block("show=means order=A memory=1 methods=er,ewc"), "there is no run of ewc"),
        (block("show=differences order=A memory=1 against=nobody"), "no run makes a pair with one of nobody; say"),
        (block("show=differences order=A memory=1 methods=er"), "no run makes a pair with one of er; say against="),
        (
            block("show=matrix suite=libero_goal"),
            r"write show=means\|differences\|last\|each\|gradients\|agreement and, of against",
        ),
        (block("show=means suit=libero_goal"), "each as name=value"),
        ("<!-- table show=means -->\nno end\n", "has no `<!-- end -->`"),
        ("<!-- table show=means -->\nno end\n" + block("show=means order=A memory=1"), "has no `<!-- end -->`"),
    ],
)
def test_a_block_that_cannot_be_filled_says_why(text: str, message: str) -> None:
    found = compare(run("er"), run("infovla"), run("infovla", order="B"), run("er", memory=0))
    with pytest.raises(ComparisonError, match=message):
        refresh_tables(text, found)


def test_the_tables_of_the_results_are_those_of_the_aggregate() -> None:
    """After `aggregate`: `benchmark.py refresh recipes/results/bench_s.json recipes/README.md recipes/EXPLORED.md`."""
    pages = [(REPOSITORY / "recipes" / name).read_text(encoding="utf-8") for name in ("README.md", "EXPLORED.md")]
    for name, blocks in (
        ("bench_s", 6),
        ("bench_s_terms", 3),
        ("explore_options", 2),
        ("explore_baselines", 1),
        ("explore_drawers", 1),
        ("explore_stages", 2),
        ("explore_learning", 2),
        ("explore_object", 2),
        ("explore_object_stages", 2),
    ):
        assert "".join(pages).count(f"<!-- table of={name} ") >= blocks
        found = load_comparison(REPOSITORY / f"recipes/results/{name}.json")
        assert [refresh_tables(text, found) for text in pages] == pages
    assert all(text.count("<!-- table ") == text.count("<!-- table of=") for text in pages)


def test_the_first_page_says_what_the_aggregate_says() -> None:
    """Of each suite, of the pairs of runs that both methods have."""
    text = " ".join((REPOSITORY / "README.md").read_text(encoding="utf-8").split())
    found = load_comparison(REPOSITORY / "recipes/results/bench_s.json")
    count = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    for suite, place in (("libero_goal", "LIBERO-Goal"), ("libero_object", "LIBERO-Object")):
        runs = [each for each in found.groups()[suite, 1] if each.method in ("er", "infovla")]
        paired = {(each.seed, each.order) for each in runs if each.method == "infovla"}
        runs = [each for each in runs if (each.seed, each.order) in paired]
        ours, theirs = (estimates(runs)[name] for name in ("infovla", "er"))
        assert ours["auc"].n == theirs["auc"].n == len(paired)
        final = [f"{100 * each['final_average'].mean:.0f} %" for each in (ours, theirs)]
        assert f"{place} `infovla` ends at {final[0]}" in text
        assert f"{final[1]} ({count[len(paired)]} runs each" in text
        learned = [f"{100 * each['adaptation'].mean:.0f} %" for each in (ours, theirs)]
        said = {
            "libero_goal": "a new task succeeds {} of the time right after its stage, with replay alone {}",
            "libero_object": "on LIBERO-Object {} and {}",
        }[suite]
        assert said.format(*learned) in text


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """Figures by the kind that their name begins with, as they are saved."""
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(
        comparison_figures, "save_figure", lambda figure, path: figures.update({path.name.partition("_")[0]: figure})
    )
    return figures


def texts_of(figure: Figure) -> str:
    return " ".join(text.get_text().replace("\n", " ") for text in figure.texts)


def test_bands_are_of_as_many_methods_as_can_be_told_apart(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    def of(*methods: str, seeds: Sequence[int] = (0, 1)) -> Axes:
        ends = {"er": 0.1, "infovla": 0.2, "third": 0.3, "second": 0.6, "best": 0.7}
        many = [run(method, seed, last=[ends[method]] * 4) for method in methods for seed in seeds]
        draw_comparison(compare(*many, run("lonely", last=[0.9] * 4)), tmp_path)
        return drawn["success"].axes[0]

    axes = of("er", "infovla", "third")
    assert len(axes.collections) == 3
    assert texts_of(drawn["success"]).endswith("bands: 95 % bootstrap over seeds")
    axes = of("er", "infovla", "third", "best", "second")
    assert len(axes.collections) == 3
    assert "bands: 95 % bootstrap over seeds, of infovla, er and best alone" in texts_of(drawn["success"])
    assert "of infovla" not in texts_of(drawn["retention"])  # bars in five places hide nothing
    widths = {line.get_label(): line.get_linewidth() for line in axes.lines}
    names = ["lonely (seed 0)", *(f"{name} (seeds 0, 1)" for name in ("best", "second", "third", "infovla", "er"))]
    assert list(widths) == names
    assert {name for name, width in widths.items() if width > 1} == {names[1], names[4], names[5]}
    assert len(of("er", "infovla", "best", seeds=[0]).collections) == 0
    assert "bands" not in texts_of(drawn["success"])


def test_retention_shows_what_there_is(tmp_path: Path, drawn: dict[str, Figure]) -> None:
    many = [run(f"a_method_with_a_long_name_{index}", seed) for index in range(12) for seed in (0, 1)]
    draw_comparison(compare(*many), tmp_path)
    figure = drawn["retention"]
    (axes,) = figure.axes
    x, y, box = axes.get_xlim(), axes.get_ylim(), axes.get_window_extent()
    assert box.width / (x[1] - x[0]) == pytest.approx(box.height / (y[1] - y[0]))
    assert max(x[1] - x[0], y[1] - y[0]) < 0.5
    for line in axes.lines:
        assert np.logical_and(x[0] < line.get_xdata(), line.get_xdata() < x[1]).all()
        assert np.logical_and(y[0] < line.get_ydata(), line.get_ydata() < y[1]).all()
    title, note = figure.texts
    legend = axes.get_legend()
    assert legend is not None
    assert legend.get_window_extent().y1 < title.get_window_extent().y0
    assert note.get_window_extent().y1 < legend.get_window_extent().y0
    assert title.get_window_extent().x1 < figure.bbox.x1
    assert note.get_window_extent().x1 < figure.bbox.x1
    inside = axes.get_tightbbox()
    assert inside is not None
    assert figure.bbox.x0 < inside.x0 < inside.x1 < figure.bbox.x1
    assert note.get_window_extent().y1 < inside.y0


def test_figures_are_drawn(tmp_path: Path) -> None:
    methods = ["er", "infovla", *(f"method_{index}" for index in range(11))]
    paths = draw_comparison(compare(*(run(method, seed) for method in methods for seed in (0, 1))), tmp_path)
    old, others = tmp_path / "matrices_libero_goal_m9_B.png", tmp_path / "matrices_mine.png"
    for path in (old, others):
        path.touch()
    draw_comparison(compare(run("er")), tmp_path)
    assert not old.exists()  # of runs that are not in the tables beside it
    assert others.exists()
    paths += draw_comparison(compare(run("er")), tmp_path / "one")
    assert {path.name for path in paths} == {
        "success_over_stages_libero_goal_m1.png",
        "retention_libero_goal_m1.png",
        "matrices_libero_goal_m1_A.png",
    }
    for path in paths:
        with Image.open(path) as picture:
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format_version=2), "has format 2"),
        (lambda c: c.update(extra=1), r"the content has an unknown key extra; aggregate"),
        (lambda c: c.update(extra=1, more=2), r"the content has the unknown keys extra, more; aggregate"),
        (lambda c: c.pop("protocol"), r"the content lacks protocol; aggregate the benchmark again"),
        (lambda c: c.update(runs=[]), "a list of at least one run"),
        (lambda c: c["runs"].append(c["runs"][0]), r"another run than runs\[0\]"),
        (lambda c: c["runs"][0].pop("order"), r"bench.json: runs\[0\] lacks order; aggregate the"),
        (lambda c: c["runs"][1].update(foo=1), r"bench.json: runs\[1\] has an unknown key foo; aggregate the"),
        (lambda c: c["runs"][1].update(sed=c["runs"][1].pop("seed")), r"lacks seed and has an unknown key sed;"),
        (lambda c: c["runs"][0].update(seed="0"), r"runs\[0\].seed must be an integer"),
        (lambda c: c["runs"][0].update(seed=True), r"runs\[0\].seed must be an integer"),
        (lambda c: c["runs"][0].update(learned_at=[0, 0, 2, 1]), r"runs\[0\].learned_at must be 4 stages"),
        (lambda c: c["runs"][0]["success"].pop(), "tables of 4 rows"),
        (lambda c: c["runs"][0]["success"][0].pop(), "row 0 must be lists of 3 stages"),
        (lambda c: c["runs"][0]["success"][0].__setitem__(0, 1.5), "task 0, stage 0 must be a rate"),
        (lambda c: c["runs"][0]["success"][0].__setitem__(0, 0.55), "task 0, stage 0 must be a rate"),
        (lambda c: c["runs"][0]["success"][0].__setitem__(0, None), "task 0, stage 0 must be a rate"),
        (lambda c: c["runs"][1].update(assets="primitive"), r"runs\[1\]: assets, renderer and step_cap must be those"),
        (lambda c: c["runs"][1].update(tasks=list("abcd")), r"runs\[1\].tasks must be the tasks of order A"),
    ],
)
def test_a_damaged_aggregate_is_refused(change: Any, message: str) -> None:
    content = copy.deepcopy(aggregate(run("er"), run("infovla")))
    change(content)
    with pytest.raises(ComparisonError, match=message):
        read_comparison(content, source="bench.json")


def test_the_results_of_a_run_are_told_from_an_aggregate() -> None:
    message = r"quickstart.json holds the results of one run, and is no aggregate: `.*benchmark.py aggregate .*` makes"
    with pytest.raises(ComparisonError, match=message):
        load_comparison(REPOSITORY / "recipes/results/quickstart.json")


def test_an_unreadable_aggregate(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="aggregate` writes it"):
        load_comparison(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"format_version": NaN}', encoding="utf-8")
    with pytest.raises(ComparisonError, match="no valid JSON"):
        load_comparison(tmp_path / "torn.json")
    (tmp_path / "list.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ComparisonError, match="the content must be an object"):
        load_comparison(tmp_path / "list.json")


def test_pairs_from_the_same_weights_are_told_from_the_others(tmp_path: Path) -> None:
    low, high = [0.5, 0.7, 0.8, 0.8], [0.7, 0.9, 0.8, 0.8]
    found = compare(
        run("er", 0, base="abcdef", last=low), run("er", 1, base="b", last=low), run("er", 2, last=low),
        run("mir", 0, base="abcdef", last=high), run("mir", 1, base="c", last=low), run("mir", 2, last=low),
        run("ewc", 0, base="other", last=high),
    )  # fmt: skip
    assert differences(found.runs, "er")["mir"]["final_average"].n == 3
    alone = differences(found.runs, "er", same_weights=True)
    assert list(alone) == ["mir"]
    assert (alone["mir"]["final_average"].n, alone["mir"]["final_average"].mean) == (1, pytest.approx(0.1))
    fresh = refresh_tables(block("show=differences memory=1 same_weights=yes"), found)
    assert "| `mir` | 1 | 1 | +10.0 |" in fresh
    assert "ewc" not in fresh
    for words in ("show=differences memory=1 same_weights=no", "show=means memory=1 same_weights=yes"):
        with pytest.raises(ComparisonError, match="write same_weights=yes, with show=differences, or nothing"):
            refresh_tables(block(words), found)
    with pytest.raises(ComparisonError, match="no pair is known to start from the same weights"):
        refresh_tables(block("show=differences memory=1 methods=ewc against=er same_weights=yes"), found)
    write_tables(found, tmp_path, ["er"])
    text = (tmp_path / "tables.md").read_text(encoding="utf-8")
    assert "| mir | 3 | A | 0–2 | abcd, c, ? |" in text
    before, _, after = text.partition("the pairs that are known to start from the same weights:")
    assert "| mir | 3 | 1 | +3.3 " in before
    assert "| mir | 1 | 1 | +10.0 |" in after
    assert {row["same_weights"] for row in read_csv(tmp_path / "differences.csv") if row["method"] == "mir"} == {"1"}
    assert {row["bases"] for row in read_csv(tmp_path / "metrics.csv") if row["method"] == "ewc"} == {"othe"}
