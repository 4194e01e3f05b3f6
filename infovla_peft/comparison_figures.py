"""The pictures of a comparison: success over the stages, matrices side by side, retention against adaptation."""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MultipleLocator
from numpy.typing import NDArray

from .comparison import ComparedRun, Comparison, by_method, comparable, estimates, seeds_text
from .figures import GRID, MUTED, STYLE, cell_colours, method_looks, save_figure, stage_name
from .intervals import Estimate, bootstrap_mean
from .metrics import average_by_stage, masked_mean

LABEL_WIDTH, CELL_WIDTH, CELL_HEIGHT, GAP, TOP = 2.3, 0.44, 0.34, 0.35, 0.62  # inches
MOST_BANDS, MOST_BARS = 3, 8  # that can be told apart
KINDS = ("success_over_stages", "retention", "matrices")


def draw_comparison(comparison: Comparison, folder: str | os.PathLike[str]) -> list[Path]:
    """Draw every figure of an aggregate into a folder as PNG; gives their paths.

    Per suite and memory size: `success_over_stages_…`, `retention_…` (one per order of tasks where not every method
    was run under all of them); and per order `matrices_…`. Those that are there already go, as they may be of others.
    """
    for kind in KINDS:
        for path in Path(folder).glob(f"{kind}_*_m*.png"):
            path.unlink()
    paths = []
    for (suite, memory), runs in comparison.groups().items():
        name = f"{_file_name(suite)}_m{memory}"
        title = f"{suite}, {memory} {'trajectory' if memory == 1 else 'trajectories'} per past task"
        for order, some in comparable(runs).items():
            which, where = (
                (name, title) if order is None else (f"{name}_{_file_name(order)}", f"{title}, order {order}")
            )
            paths += [Path(folder) / f"{kind}_{which}.png" for kind in KINDS[:2]]
            draw_success_over_stages(some, where, paths[-2], among=comparison.methods)
            draw_retention(some, where, paths[-1], among=comparison.methods)
        for order in sorted({run.order for run in runs}):
            paths.append(Path(folder) / f"matrices_{name}_{_file_name(order)}.png")
            own = [run for run in runs if run.order == order]
            draw_matrices(own, f"{title}, order {order}: mean over seeds", paths[-1])
    return paths


def draw_success_over_stages(
    runs: Sequence[ComparedRun], title: str, path: str | os.PathLike[str], *, among: Sequence[str] = ()
) -> None:
    """Mean success on the tasks seen so far after each stage, one line per method, the best at the end first.

    Bands are 95 % bootstrap intervals over seeds. Of more than `MOST_BANDS` methods only some have one, see `_shown`,
    and the lines of the others are thin: bands that lie on each other cannot be told apart.

    Args:
        runs: of one suite and memory size.
        among: methods of the whole comparison, see `figures.method_looks`.
    """
    groups = by_method(runs)
    looks = dict(zip(groups, method_looks(list(groups), among), strict=True))
    found: dict[str, list[Estimate]] = {}
    for method, own in groups.items():
        seeds = [run.seed for run in own]
        found[method] = [bootstrap_mean(column, groups=seeds) for column in _curves(own).T]
    best = sorted(found, key=lambda method: _or_lowest(found[method][-1].mean), reverse=True)
    with_band = [method for method in best if not math.isnan(found[method][-1].low)]
    shown = _shown(with_band, MOST_BANDS)
    widest = max(map(len, found.values()))
    with rc_context(STYLE):
        figure = Figure()
        axes = figure.add_subplot()
        for place, method in enumerate(best):
            values, (colour, marker) = found[method], looks[method]
            stages, strong = np.arange(len(values)), method in shown or len(best) <= MOST_BANDS
            if method in shown:
                low, high = [e.low for e in values], [e.high for e in values]
                axes.fill_between(stages, low, high, color=colour, alpha=0.13, linewidth=0)
            axes.plot(
                stages,
                [e.mean for e in values],
                color=colour,
                marker=marker,
                markersize=5 if strong else 3.2,
                linewidth=1.8 if strong else 0.8,
                zorder=(3 if strong else 4) - place / 1000,  # a thin line hides little
                label=_label(method, groups[method]),
            )
        axes.set(xlim=(-0.2, widest - 0.8), ylim=(-0.03, 1.03), ylabel="success on the tasks seen")
        axes.set_xticks(range(widest), [stage_name(stage) for stage in range(widest)])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:.0f} %"))
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.tick_params(length=0)
        _finish(figure, axes, (4.0, max(3.1, 0.19 * len(best))), title, path, note=_what("bands", shown, with_band))


def draw_retention(
    runs: Sequence[ComparedRun], title: str, path: str | os.PathLike[str], *, among: Sequence[str] = ()
) -> None:
    """Success on the old tasks at the end against success on the new ones right after learning, a point per method.

    Bars are 95 % bootstrap intervals over seeds, of some methods only where there are more than `MOST_BARS`, see
    `_shown`. Both axes have one scale and show what there is, not all from 0 to 100 %. A method in which one of the
    two is not measured is left out.

    Args:
        runs: of one suite and memory size.
        among: methods of the whole comparison, see `figures.method_looks`.
    """
    groups = by_method(runs)
    found = {method: (e["adaptation"], e["retention"]) for method, e in estimates(runs).items()}
    looks = dict(zip(groups, method_looks(list(groups), among), strict=True))
    best = sorted(found, key=lambda method: _or_lowest(found[method][1].mean), reverse=True)
    best = [method for method in best if not any(math.isnan(e.mean) for e in found[method])]
    with_bars = [method for method in best if not any(math.isnan(e.low) for e in found[method])]
    shown = _shown(with_bars, MOST_BARS)
    limits = _limits([found[method] for method in best], [found[method] for method in shown])
    longest = max(high - low for low, high in limits)
    width, height = (3.9 * (high - low) / longest for low, high in limits)
    with rc_context(STYLE):
        figure = Figure()
        axes = figure.add_subplot()
        for method in best:
            (x, y), (colour, marker) = found[method], looks[method]
            if method in shown:
                axes.plot([x.low, x.high], [y.mean] * 2, color=colour, alpha=0.45, linewidth=1.2, zorder=2)
                axes.plot([x.mean] * 2, [y.low, y.high], color=colour, alpha=0.45, linewidth=1.2, zorder=2)
            axes.plot(
                x.mean,
                y.mean,
                marker,
                color=colour,
                markersize=8.5 if method in shown else 7.5,
                markeredgecolor="white",
                markeredgewidth=0.5,
                zorder=4 if method in shown else 3,
                label=_label(method, groups[method]),
            )
        axes.set(xlim=limits[0], ylim=limits[1])
        axes.set(xlabel="adaptation: new tasks, right after learning", ylabel="retention: old tasks, at the end")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MultipleLocator(0.05 if longest < 0.4 else 0.1))
            axis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:.0f} %"))
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        _finish(figure, axes, (width, height), title, path, note=_what("bars", shown, with_bars))


def draw_matrices(runs: Sequence[ComparedRun], title: str, path: str | os.PathLike[str], *, columns: int = 4) -> None:
    """The success matrix of each method, mean over its runs, side by side. A frame marks when a task was learned.

    Args:
        runs: of one suite, memory size and order of tasks.
    """
    groups, tasks, learned_at = by_method(runs), runs[0].tasks, runs[0].learned_at
    stages, columns = max(learned_at) + 1, min(columns, len(groups))
    rows = -(-len(groups) // columns)
    panel_width, panel_height = max(stages * CELL_WIDTH + GAP, 2.1), len(tasks) * CELL_HEIGHT + TOP
    names = {method: textwrap.fill(_label(method, own), int(panel_width * 11)) for method, own in groups.items()}
    title = textwrap.fill(title, int((LABEL_WIDTH + columns * panel_width) * 11))
    head = 0.3 + 0.16 * title.count("\n")
    width, height = LABEL_WIDTH + columns * panel_width, rows * panel_height + head
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")
        axes.text(0.1, 0.1, title, weight="bold", va="top", linespacing=1.2)
        for index, (method, own) in enumerate(groups.items()):
            row, column = divmod(index, columns)
            left, top = LABEL_WIDTH + column * panel_width, head + row * panel_height + TOP - 0.1
            axes.text(left, top - 0.26, names[method], weight="bold", va="bottom", linespacing=1.1)
            for stage in range(stages):
                centre = left + (stage + 0.5) * CELL_WIDTH
                axes.text(centre, top - 0.12, stage_name(stage), ha="center", va="center", color=MUTED, size=7)
            for i, rates in enumerate(_mean_matrix(own)):
                middle = top + (i + 0.5) * CELL_HEIGHT
                if column == 0:
                    label = textwrap.fill(tasks[i].replace("_", " "), 34, max_lines=2, placeholder=" …")
                    axes.text(left - 0.1, middle, label, ha="right", va="center", size=7, linespacing=1.1)
                for stage, rate in enumerate(rates):
                    if math.isnan(rate):
                        continue
                    background, ink = cell_colours(rate)
                    corner = (left + stage * CELL_WIDTH, top + i * CELL_HEIGHT)
                    _add_box(axes, corner, 0.02, facecolor=background)
                    if stage == learned_at[i]:
                        _add_box(axes, corner, 0.045, fill=False, edgecolor=ink, linewidth=0.9)
                    axes.text(
                        left + (stage + 0.5) * CELL_WIDTH, middle, f"{100 * rate:.0f}",
                        ha="center", va="center", size=7.5, color=ink,
                    )  # fmt: skip
        save_figure(figure, path)


def _label(method: str, runs: Sequence[ComparedRun]) -> str:
    seeds = seeds_text(runs)
    return f"{method} (seed{'s' if len({run.seed for run in runs}) > 1 else ''} {seeds})"


def _shown(methods: Sequence[str], most: int) -> list[str]:
    """Whose intervals are drawn: of all up to `most`, else of infovla, of er and of the best others, three in all.

    Args:
        methods: those that have an interval, the best first.
    """
    if len(methods) <= most:
        return list(methods)
    first = [method for method in ("infovla", "er") if method in methods]
    return [*first, *(method for method in methods if method not in first)][:3]


def _what(drawn: str, shown: Sequence[str], among: Sequence[str]) -> str:
    """What bands or bars are, and whose, where not every method that could has them; empty without any."""
    if not shown:
        return ""
    alone = f", of {', '.join(shown[:-1])} and {shown[-1]} alone" if len(shown) < len(among) else ""
    return f"{drawn}: 95 % bootstrap over seeds{alone}"


def _or_lowest(value: float) -> float:
    return -1.0 if math.isnan(value) else value


def _limits(
    points: Sequence[tuple[Estimate, Estimate]], with_bars: Sequence[tuple[Estimate, Estimate]]
) -> list[tuple[float, float]]:
    """Of both axes, around what is drawn; the shorter one has at least 0.6 of the longer one's span."""
    spans = []
    for axis in range(2):
        ends = [pair[axis].mean for pair in points]
        ends += [end for pair in with_bars for end in (pair[axis].low, pair[axis].high)]
        spans.append((min(ends, default=0.0) - 0.04, max(ends, default=1.0) + 0.04))
    least = max(0.2, 0.6 * max(high - low for low, high in spans))
    widened = []
    for low, high in spans:
        more = max(0.0, least - (high - low)) / 2
        shift = max(0.0, more - low - 0.04) - max(0.0, high + more - 1.04)  # rates are from 0 to 1
        widened.append((low - more + shift, high + more + shift))
    return widened


def _finish(
    figure: Figure, axes: Axes, size: tuple[float, float], title: str, path: str | os.PathLike[str], *, note: str = ""
) -> None:
    """Axes of this size in inches, the legend beside them, the title above both and a note below."""
    legend = axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), borderaxespad=0.0, frameon=False, fontsize=8)
    extent = legend.get_window_extent()
    left, right = 0.75, 0.3 + extent.width / figure.dpi
    width = left + size[0] + right
    title, note = textwrap.fill(title, int(12 * width)), textwrap.fill(note, int(15.5 * width))
    top = 0.38 + 0.15 * title.count("\n")
    bottom = 0.3 + (0.22 if axes.get_xlabel() else 0) + (0.2 + 0.13 * note.count("\n") if note else 0)
    height = top + max(size[1] + bottom, extent.height / figure.dpi + 0.1)
    figure.set_size_inches(width, height)
    axes.set_position((left / width, (height - top - size[1]) / height, size[0] / width, size[1] / height))
    figure.text(0.1 / width, 1 - 0.1 / height, title, va="top", weight="bold")
    figure.text(0.1 / width, 0.08 / height, note, va="bottom", size=7.5, color=MUTED)
    save_figure(figure, path)


def _add_box(axes: Axes, corner: tuple[float, float], inset: float, **style: Any) -> None:
    place = (corner[0] + inset, corner[1] + inset)
    axes.add_patch(Rectangle(place, CELL_WIDTH - 2 * inset, CELL_HEIGHT - 2 * inset, **style))


def _curves(runs: Sequence[ComparedRun]) -> NDArray[np.float64]:
    """(runs, stages) mean success on the tasks seen; NaN beyond the end of a shorter run."""
    curves = [average_by_stage(run.matrix, np.array(run.learned_at)) for run in runs]
    padded = np.full((len(curves), max(map(len, curves))), np.nan)
    for row, curve in zip(padded, curves, strict=True):
        row[: len(curve)] = curve
    return padded


def _mean_matrix(runs: Sequence[ComparedRun]) -> NDArray[np.float64]:
    """(tasks, stages) mean over the runs that measured a cell; NaN where none did, and before a task is learned."""
    stacked = np.stack([run.matrix for run in runs])  # (runs, tasks, stages)
    alive = np.arange(stacked.shape[2]) >= np.array(runs[0].learned_at)[:, None]
    return masked_mean(stacked, np.broadcast_to(alive, stacked.shape), axis=0)


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text)
