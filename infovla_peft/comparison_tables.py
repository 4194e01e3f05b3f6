"""The tables of a comparison as Markdown, LaTeX and CSV: means with intervals, paired differences, rankings.

Every number comes from the aggregate or follows from it; what it does not hold is "not measured".
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .comparison import (
    METRICS,
    ComparedRun,
    Comparison,
    MetricColumn,
    bases_text,
    by_method,
    comparable,
    differences,
    estimates,
    have_same_weights,
    method_names,
    pairs,
    rankings,
    same_ranking,
    seeds_text,
)
from .files import write_text
from .intervals import Estimate
from .text_tables import NOT_MEASURED, count_span, markdown_table


def write_tables(
    comparison: Comparison, folder: str | os.PathLike[str], against: Sequence[str] = ("er",)
) -> list[Path]:
    """Write tables.md, tables.tex, metrics.csv and differences.csv into a folder; gives their paths.

    Args:
        against: methods to which the others are compared pair by pair, where they were run.

    Raises:
        ValueError: no run of one of `against`.
    """
    unknown = set(against) - set(method_names(comparison.runs))
    if unknown:
        raise ValueError(
            f"no run of {', '.join(sorted(unknown))}; there are {', '.join(method_names(comparison.runs))}"
        )
    contents = {
        "tables.md": markdown(comparison, against),
        "tables.tex": latex(comparison, against),
        "metrics.csv": metrics_csv(comparison),
        "differences.csv": differences_csv(comparison, against),
    }
    for name, text in contents.items():
        write_text(Path(folder) / name, text)
    return [Path(folder) / name for name in contents]


def markdown(comparison: Comparison, against: Sequence[str]) -> str:
    """All tables as Markdown."""
    parts = ["# Comparison of methods", _INTRODUCTION]
    parts.append("\n".join(f"- **{column.label}**: {column.meaning}{_better(column)}" for column in METRICS.values()))
    for (suite, memory), runs in comparison.groups().items():
        parts += [f"## {suite}, {_trajectories(memory)} per past task", _provenance(runs)]
        for order, some in comparable(runs).items():
            parts += [f"### Order {order}"] * (order is not None)
            parts.append(markdown_table(*_metric_rows(some)))
        for reference in against:
            table = _difference_rows(runs, reference)
            if table is not None:
                title = f"Difference to `{reference}`, paired by seed and order, in percentage points"
                parts += [f"### {title}", markdown_table(*table)]
                alone = _difference_rows(runs, reference, same_weights=True)
                if alone is not None and alone != table:
                    parts += ["Of these, the pairs that are known to start from the same weights:"]
                    parts += [markdown_table(*alone)]
        parts += ["### Ranking by FAA", _ranking_text(runs)]
    return "\n\n".join(parts) + "\n"


def latex(comparison: Comparison, against: Sequence[str]) -> str:
    """The tables as LaTeX, one `table` each, with the metrics that a page is wide enough for."""
    parts = ["% \\usepackage{booktabs,graphicx}"]
    for (suite, memory), runs in comparison.groups().items():
        where = f"{suite}, {_trajectories(memory)} per past task"
        caption = f"{where}. Mean over runs in per cent, bootstrap 95 % interval over seeds in brackets."
        for order, some in comparable(runs).items():
            which = "" if order is None else f", order {order}"
            parts.append(_latex_table(caption.replace(". Mean", f"{which}. Mean"), *_metric_rows(some, _IN_LATEX)))
        for reference in against:
            table = _difference_rows(runs, reference, _IN_LATEX)
            if table is not None:
                caption = f"{where}. Difference to {reference} in percentage points, paired by seed and order."
                parts.append(_latex_table(caption, *table))
    return "\n\n".join(parts) + "\n"


def metrics_csv(comparison: Comparison) -> str:
    """One line per suite, memory size, order, method and metric: mean, bounds in [0, 1], numbers of runs and of seeds.

    Last are the bases that the runs start from, by the beginning of their digests ("?": not recorded). The order is
    empty where the mean is one over all of them, see `comparison.comparable`.
    """
    columns = ("suite", "memory", "order", "method", "metric", "mean", "low", "high", "runs", "seeds")
    rows: list[Sequence[Any]] = [(*columns, "bases")]
    for (suite, memory), runs in comparison.groups().items():
        for order, some in comparable(runs).items():
            own = by_method(some)
            for method, found in estimates(some).items():
                place, bases = (suite, memory, order or "", method), bases_text(own[method])
                rows += [
                    (*place, name, *_numbers(value), value.n, value.groups, bases) for name, value in found.items()
                ]
    return _csv(rows)


def differences_csv(comparison: Comparison, against: Sequence[str]) -> str:
    """One line per suite, memory size, method, reference and metric: mean difference, bounds, pairs, seeds.

    A seed with two orders has two pairs. `low` and `high` are the bootstrap's, `t_low` and `t_high` Student's;
    `same_weights` is how many of the pairs are known to start from the same weights.
    """
    columns = ("suite", "memory", "method", "against", "metric", "mean", "low", "high", "t_low", "t_high")
    rows: list[Sequence[Any]] = [(*columns, "pairs", "seeds", "same_weights")]
    for (suite, memory), runs in comparison.groups().items():
        for reference in against:
            paired = pairs(runs, reference)
            for method, found in differences(runs, reference).items():
                place, same = (
                    (suite, memory, method, reference),
                    sum(have_same_weights(*pair) for pair in paired[method]),
                )
                rows += [
                    (*place, name, *_numbers(value), *_numbers(value.student()), value.n, value.groups, same)
                    for name, value in found.items()
                ]
    return _csv(rows)


_INTRODUCTION = (
    "Success in per cent: mean over runs (seeds and task orders), bootstrap 95 % interval in brackets, over seeds: a "
    "seed is drawn with all its orders, which share its stored trajectories. An interval over few seeds is narrower "
    "than it ought to be; with one there is none. Beside the difference of FAA stands Student's interval, over seeds "
    "too, which is not. Both are about other seeds with the same demonstrations and start states. Runs start from one "
    "base, or from several that were trained alike and do the same in the same rollouts: what such bases make of a "
    "difference is in no interval, but the pairs that start from the same weights are counted. Where not all "
    "methods were run under all orders, each order has a table. Means over different seeds do not compare methods: "
    "the paired differences do, over the seeds and orders that both have."
)


def _metric_rows(
    runs: Sequence[ComparedRun], names: Sequence[str] = tuple(METRICS)
) -> tuple[list[str], list[list[str]]]:
    own = by_method(runs)
    header = ["method", "runs", "orders", "seeds", "bases", *(METRICS[name].label for name in names)]
    rows = []
    for method, found in estimates(runs).items():
        orders = ", ".join(sorted({run.order for run in own[method]}))
        cells = [percent_text(found[name]) for name in names]
        where = [orders, seeds_text(own[method]), bases_text(own[method])]
        rows.append([method, str(len(own[method])), *where, *cells])
    return header, rows


def _difference_rows(
    runs: Sequence[ComparedRun], against: str, names: Sequence[str] = tuple(METRICS), *, same_weights: bool = False
) -> tuple[list[str], list[list[str]]] | None:
    found, paired = differences(runs, against, same_weights=same_weights), pairs(runs, against)
    if not found:
        return None
    first, *others = names
    header = [
        "method",
        "pairs",
        "same weights",
        METRICS[first].label,
        "Student's",
        *(METRICS[name].label for name in others),
    ]
    rows = []
    for method, values in found.items():
        cells = [percent_text(values[name], signed=True) for name in names]
        student = interval_text(*values[first].student(), signed=True)
        same = sum(have_same_weights(*pair) for pair in paired[method])
        rows.append([method, str(values[first].n), str(same), cells[0], student or NOT_MEASURED, *cells[1:]])
    return header, rows


def _ranking_text(runs: Sequence[ComparedRun]) -> str:
    by_order = rankings(runs, "final_average")
    lines = [
        f"- order {order}, {_seeds_text(ranking.seeds)}: "
        + (" > ".join(" = ".join(level) for level in ranking.levels) or NOT_MEASURED)
        for order, ranking in by_order.items()
    ]
    verdict = {
        True: "The ranking is the same under all orders.",
        False: "The ranking is **not** the same under all orders.",
        None: "Whether the ranking is the same under all orders: " + NOT_MEASURED + ".",
    }[same_ranking(by_order)]
    verdict += (
        " Ranked are the methods that were run under every order, over the seeds and bases that all of them share."
    )
    return "\n".join([*lines, "", verdict])


def _seeds_text(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else "no seed that all share"


def _provenance(runs: Sequence[ComparedRun]) -> str:
    cells = sorted({count for run in runs for row in run.episodes for count in row if count is not None})
    last = sorted({row[-1] for run in runs for row in run.episodes if row[-1] is not None})
    first = runs[0]
    seeds = ", ".join(map(str, sorted({run.seed for run in runs})))
    commits = sorted({run.commit or "installed package" for run in runs})
    orders = {run.order: run.tasks for run in runs}
    lines = [
        f"{len(runs)} runs, seeds {seeds}; {first.assets} assets, {first.renderer} renderer, step cap "
        f"{first.step_cap}; rollouts per cell {count_span(cells)}, in the last column {count_span(last)}; commit "
        f"{', '.join(commits)}.",
        *(f"Order {order}: {', '.join(tasks)}." for order, tasks in sorted(orders.items())),
    ]
    return "\n".join(lines)


def _trajectories(memory: int) -> str:
    return f"{memory} {'trajectory' if memory == 1 else 'trajectories'}"


def _better(column: MetricColumn) -> str:
    return "" if column.higher_is_better else "; lower is better"


def percent_text(value: Estimate, *, signed: bool = False) -> str:
    """A mean and its bootstrap interval in per cent."""
    if math.isnan(value.mean):
        return NOT_MEASURED
    return f"{_number(value.mean, signed)} {interval_text(value.low, value.high, signed=signed)}".rstrip()


def interval_text(low: float, high: float, *, signed: bool = False) -> str:
    """An interval in per cent; nothing if there is none."""
    return "" if math.isnan(low) else f"[{_number(low, signed)}, {_number(high, signed)}]"


def _number(rate: float, signed: bool) -> str:
    # Adding 0.0 turns the -0.0 of a small negative number into 0.0.
    return f"{round(round(100 * rate, 9), 1) + 0.0:{'+.1f' if signed else '.1f'}}".replace("-", "−")


def _numbers(values: Sequence[float]) -> list[str]:
    return ["" if math.isnan(number) else f"{number:.4f}" for number in values[:3]]


_IN_LATEX = ("final_average", "auc", "forward_transfer", "negative_backward_transfer", "adaptation")
_LATEX = {"–": "--", "\\": r"\textbackslash{}", "−": "$-$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    character: "\\" + character for character in "&%$#_{}"
}


def _latex_table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def text(value: str) -> str:
        return "".join(_LATEX.get(character, character) for character in value)

    def line(cells: Sequence[str]) -> str:
        return " & ".join(text(cell) for cell in cells) + r" \\"

    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{text(caption)}}}",
            r"\centering",
            r"\resizebox{\ifdim\width>\linewidth \linewidth\else\width\fi}{!}{%",  # smaller only if it has to be
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            line(header),
            r"\midrule",
            *map(line, rows),
            r"\bottomrule",
            r"\end{tabular}}",
            r"\end{table}",
        ]
    )


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
