"""Tables of a comparison inside a text: a README whose numbers cannot drift from the aggregate they are of.

A block of Markdown says what stands in it; the lines up to its end are written anew::

    <!-- table show=means suite=libero_goal memory=1 order=A -->
    <!-- end -->

`show` is `means` (bootstrap interval over seeds; bases by the beginning of their digests, "?" where it is not known),
`differences` (paired, to the method `against`, and how many pairs are known to start from the same weights; of the
final average Student's interval too; `same_weights=yes` leaves the other pairs out), `last` (successes per task after
the last stage, each seed by itself), `each` (the same with the base's tasks summed, and with the errors of the actions
then, a mean over tasks, where runs were analysed), `gradients` (of each part of the loss, the mean over a stage and
over the runs that logged them) or `agreement` (how far a seed's two orders keep the same of the base's tasks, see
`agreement_of_orders`). `order`, `methods` and `seeds` (separated by commas) leave the others out. A text may hold
tables of several benchmarks: a block with `of=NAME` is that benchmark's alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from .comparison import (
    ComparedRun,
    Comparison,
    ComparisonError,
    agreement_of_orders,
    bases_text,
    by_method,
    comparable,
    differences,
    estimates,
    have_same_weights,
    pairs,
)
from .comparison_tables import interval_text, percent_text
from .intervals import Estimate
from .text_tables import markdown_table

COLUMNS: Mapping[str, str] = {
    "final_average": "final average",
    "auc": "AUC",
    "forward_transfer": "FWT",
    "negative_backward_transfer": "NBT",
    "adaptation": "new tasks, right after learning",
}
_PARTS: Mapping[str, str] = {
    "current": "new task", "replay": "replay", "rac": "RAC", "cmi": "CMI", "output": "output", "ewc": "EWC"
}  # fmt: skip
_BLOCK = re.compile(r"(<!-- table (?P<words>[^\n]*?) -->\n)(?P<body>.*?)(<!-- end -->)", re.DOTALL)
_WORDS = frozenset({"of", "show", "suite", "memory", "order", "methods", "seeds", "against", "same_weights"})


def refresh_tables(text: str, comparison: Comparison) -> str:
    """The text with every block's table made from the comparison.

    Raises:
        ComparisonError: a block names what there is not, or has no end.

    >>> refresh_tables("no block here", Comparison({}, []))
    'no block here'
    """
    if text.count("<!-- table ") != len(_BLOCK.findall(text)):
        raise ComparisonError("a block `<!-- table ... -->` is no line of its own, or has no `<!-- end -->` after it")
    return _BLOCK.sub(lambda block: _fill(block, comparison), text)


def count_tables(text: str, comparison: Comparison) -> int:
    """How many of a text's blocks are the comparison's: those that name it, and those that name none.

    >>> text = "<!-- table of=one show=means -->\\n<!-- end -->\\n<!-- table of=two show=means -->\\n<!-- end -->"
    >>> count_tables(text, Comparison({"name": "one"}, []))
    1
    """
    return sum(_is_of(block, comparison) for block in _BLOCK.finditer(text))


def _is_of(block: re.Match[str], comparison: Comparison) -> bool:
    of = re.search(r"\bof=(\S+)", block["words"])
    return of is None or of[1] == comparison.protocol.get("name")


def _fill(block: re.Match[str], comparison: Comparison) -> str:
    if not _is_of(block, comparison):
        return block[0]
    return f"{block[1]}{_table(block['words'], comparison)}\n{block[4]}"


def _table(words: str, comparison: Comparison) -> str:
    parts = [word.partition("=") for word in words.split()]
    options = {key: value for key, _, value in parts}
    make = _SHOWN.get(options.get("show", ""))
    if make is None or not set(options) <= _WORDS or len(options) < len(parts):
        raise ComparisonError(
            f"<!-- table {words} -->: write show={'|'.join(_SHOWN)} and, of {', '.join(sorted(_WORDS - {'show'}))}, "
            "what is wanted, each as name=value"
        )
    methods = options["methods"].split(",") if "methods" in options else None
    seeds = options["seeds"].split(",") if "seeds" in options else None
    runs = [
        run
        for run in comparison.runs
        if run.suite == options.get("suite", run.suite)
        and str(run.memory) == options.get("memory", str(run.memory))
        and run.order == options.get("order", run.order)
        and (seeds is None or str(run.seed) in seeds)
        and (methods is None or run.method in {*methods, options.get("against")})
    ]
    missing = sorted(set(methods or []) - {run.method for run in runs})
    if missing or not runs:
        raise ComparisonError(f"<!-- table {words} -->: there is no run of {', '.join(missing) or 'all that'}")
    if len({(run.suite, run.memory) for run in runs}) > 1:
        raise ComparisonError(f"<!-- table {words} -->: say which suite=, and which memory=")
    if make in (_each, _gradients) and len({run.order for run in runs}) > 1:
        raise ComparisonError(f"<!-- table {words} -->: the orders have other tasks; say which order=")
    if make is _means and len(comparable(runs)) > 1:
        raise ComparisonError(f"<!-- table {words} -->: not all of these methods had all orders; say which order=")
    against = options.get("against", "er")
    if make is _differences and not any(pairs(runs, against).values()):
        raise ComparisonError(f"<!-- table {words} -->: no run makes a pair with one of {against}; say against=")
    if options.get("same_weights", "yes") != "yes" or ("same_weights" in options and make is not _differences):
        raise ComparisonError(f"<!-- table {words} -->: write same_weights=yes, with show=differences, or nothing")
    header, rows = (_same_weights if "same_weights" in options else make)(runs, against)
    if not rows:
        raise ComparisonError(f"<!-- table {words} -->: no pair is known to start from the same weights")
    return markdown_table(header, rows)


def _means(runs: Sequence[ComparedRun], _against: str) -> tuple[list[str], list[list[str]]]:
    own = by_method(runs)
    rows = []
    for method, found in estimates(runs).items():
        seeds = sorted({run.seed for run in own[method]})
        where = [", ".join(map(str, seeds)), bases_text(own[method])]
        rows.append([f"`{method}`", str(found["auc"].n), *where, *map(percent_text, _shown(found))])
    return ["method", "runs", "seeds", "bases", *COLUMNS.values()], rows


def _differences(runs: Sequence[ComparedRun], against: str) -> tuple[list[str], list[list[str]]]:
    return _difference_rows(runs, against, same_weights=False)


def _same_weights(runs: Sequence[ComparedRun], against: str) -> tuple[list[str], list[list[str]]]:
    return _difference_rows(runs, against, same_weights=True)


def _difference_rows(
    runs: Sequence[ComparedRun], against: str, *, same_weights: bool
) -> tuple[list[str], list[list[str]]]:
    rows = []
    paired = pairs(runs, against)
    for method, found in differences(runs, against, same_weights=same_weights).items():
        same = sum(have_same_weights(*pair) for pair in paired[method])
        first, *others = (percent_text(value, signed=True) for value in _shown(found))
        student = interval_text(*found["final_average"].student(), signed=True)
        rows.append([f"`{method}`", str(found["final_average"].n), str(same), first, student, *others])
    first_label, *labels = COLUMNS.values()
    return [f"minus `{against}`", "pairs", "same weights", first_label, "Student's", *labels], rows


def _agreement(runs: Sequence[ComparedRun], _against: str) -> tuple[list[str], list[list[str]]]:
    found = agreement_of_orders(runs)
    rows = [[f"`{method}`", str(n), f"{value:.2f}".replace("-", "−")] for method, (value, n) in found.items()]
    return ["method", "pairs of task and seed", "correlation between the orders"], rows


def _last(runs: Sequence[ComparedRun], _against: str) -> tuple[list[str], list[list[str]]]:
    places = sorted({(run.order, run.seed) for run in runs})
    orders = {order for order, _ in places}
    rows = []
    for method, own in by_method(runs).items():
        found = {(run.order, run.seed): run for run in own}
        rows.append([f"`{method}`", *(_last_column(found.get(place)) for place in places)])
    return ["method", *(f"order {o}, seed {s}" if len(orders) > 1 else f"seed {s}" for o, s in places)], rows


def _last_column(run: ComparedRun | None) -> str:
    if run is None:
        return ""
    cells = [(rates[-1], counts[-1]) for rates, counts in zip(run.success, run.episodes, strict=True)]
    return " ".join("-" if rate is None or count is None else str(round(rate * count)) for rate, count in cells)


def _each(runs: Sequence[ComparedRun], _against: str) -> tuple[list[str], list[list[str]]]:
    first = runs[0]
    new = [index for index, stage in enumerate(first.learned_at) if stage]
    groups = {"base tasks": range(new[0]), **{first.tasks[index].replace("_", " "): [index] for index in new}}
    places = [
        *(f"{name}, of {sum(first.episodes[index][-1] or 0 for index in rows)}" for name, rows in groups.items()),
        "final average, %",
        *(f"error, {name}" for name in groups),
    ]
    rows = []
    for method, unsorted in by_method(runs).items():
        own = sorted(unsorted, key=lambda run: run.seed)
        cells = [[_successes(run, tasks) for run in own] for tasks in groups.values()]
        cells += [[f"{100 * run.metrics()['final_average']:.1f}" for run in own]]
        cells += [[_error(run, tasks) for run in own] for tasks in groups.values()]
        seeds = ", ".join(str(run.seed) for run in own)
        rows.append([f"`{method}`", seeds, *(", ".join(cell) for cell in cells)])
    return ["row", "seed", *places], rows


def _successes(run: ComparedRun, tasks: Iterable[int]) -> str:
    cells = [(run.success[task][-1], run.episodes[task][-1]) for task in tasks]
    return str(sum(round(rate * count) for rate, count in cells if rate is not None and count is not None))


def _error(run: ComparedRun, tasks: Iterable[int]) -> str:
    column = [run.analysis["action_error"][task][-1] for task in tasks] if run.analysis else []
    known = [error for error in column if error is not None]
    return f"{sum(known) / len(known):.4f}" if known else "–"


def _gradients(runs: Sequence[ComparedRun], _against: str) -> tuple[list[str], list[list[str]]]:
    logged = [run for run in runs if run.gradients]
    if not logged:
        raise ComparisonError("show=gradients: no run has logged them (log_gradients)")
    names = [f"grad_norm_{part}" for part in _PARTS] + [f"grad_cosine_{part}" for part in _PARTS][1:]
    rows = []
    for method, own in by_method(logged).items():
        for index, stage in enumerate(own[0].learned_at):
            if stage:
                cells = [[(run.gradients or {}).get(name) for run in own] for name in names]
                columns = [_mean(cell[stage] for cell in column if cell is not None) for column in cells]
                seeds = ", ".join(map(str, sorted(run.seed for run in own)))
                rows.append([f"`{method}`", seeds, own[0].tasks[index].replace("_", " "), *columns])
    labels = [f"norm, {label}" for label in _PARTS.values()] + [f"cosine, {label}" for label in _PARTS.values()][1:]
    shown = [place for place in range(len(names)) if any(row[3 + place] != "–" for row in rows)]
    rows = [[*row[:3], *(row[3 + place] for place in shown)] for row in rows]
    return ["row", "seed", "stage", *(labels[place] for place in shown)], rows


def _mean(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.3f}".replace("-", "−") if known else "–"


def _shown(found: Mapping[str, Estimate]) -> list[Estimate]:
    return [found[name] for name in COLUMNS]


_SHOWN = {
    "means": _means,
    "differences": _differences,
    "last": _last,
    "each": _each,
    "gradients": _gradients,
    "agreement": _agreement,
}
