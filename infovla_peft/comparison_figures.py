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
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from .comparison import ComparedRun, Comparison, by_method, comparable, estimates, seeds_text
from .figures import GRID, MUTED, STYLE, cell_colours, method_looks, save_figure, stage_name
from .intervals import bootstrap_mean
from .metrics import average_by_stage, masked_mean

LABEL_WIDTH, CELL_WIDTH, CELL_HEIGHT, GAP, TOP = 2.3, 0.44, 0.34, 0.35, 0.62  # inches
MOST_BANDS = 8
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
    """Mean success on the tasks seen so far after each stage, one line per method; bands are 95 % bootstrap intervals
    over seeds, left out where there are too many to be told apart.

    Args:
        runs: of one suite and memory size.
        among: methods of the whole comparison, see `figures.method_looks`.
    """
    groups = by_method(runs)
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, max(3.4, 0.3 + 0.24 * len(groups))), layout="constrained")
        axes = figure.add_subplot()
        widest = 0
        for (method, own), (colour, marker) in zip(groups.items(), method_looks(list(groups), among), strict=True):
            curves = _curves(own)  # (runs, stages)
            found = [bootstrap_mean(column, groups=[run.seed for run in own]) for column in curves.T]
            stages = np.arange(len(found))
            widest = max(widest, len(found))
            if len(groups) <= MOST_BANDS:
                low, high = [e.low for e in found], [e.high for e in found]
                axes.fill_between(stages, low, high, color=colour, alpha=0.15, linewidth=0)
            means = [e.mean for e in found]
            axes.plot(stages, means, color=colour, marker=marker, markersize=4.5, label=_label(method, own))
        axes.set(xlim=(-0.2, widest - 0.8), ylim=(-0.03, 1.03), ylabel="success on the tasks seen")
        axes.set_xticks(range(widest), [stage_name(stage) for stage in range(widest)])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:.0f} %"))
        axes.grid(axis="y", color=GRID, linewidth=0.7)
        axes.tick_params(length=0)
        _finish(figure, title, path)


def draw_retention(
    runs: Sequence[ComparedRun], title: str, path: str | os.PathLike[str], *, among: Sequence[str] = ()
) -> None:
    """Success on the old tasks at the end against success on the new ones right after learning, a point per method.

    Bars are 95 % bootstrap intervals over seeds. A method in which one of the two is not measured is left out.

    Args:
        runs: of one suite and memory size.
        among: methods of the whole comparison, see `figures.method_looks`.
    """
    found, groups = estimates(runs), by_method(runs)
    with rc_context(STYLE):
        figure = Figure(figsize=(5.8, max(3.9, 0.3 + 0.24 * len(found))), layout="constrained")
        axes = figure.add_subplot()
        for (method, values), (colour, marker) in zip(found.items(), method_looks(list(found), among), strict=True):
            x, y = values["adaptation"], values["retention"]
            if math.isnan(x.mean) or math.isnan(y.mean):
                continue
            if not math.isnan(x.low):
                axes.plot([x.low, x.high], [y.mean] * 2, color=colour, alpha=0.45, linewidth=1.4)
            if not math.isnan(y.low):
                axes.plot([x.mean] * 2, [y.low, y.high], color=colour, alpha=0.45, linewidth=1.4)
            axes.plot(x.mean, y.mean, marker, color=colour, markersize=6.5, label=_label(method, groups[method]))
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
        axes.set(xlabel="adaptation: new tasks, right after learning", ylabel="retention: old tasks, at the end")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:.0f} %"))
        axes.grid(color=GRID, linewidth=0.7)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        _finish(figure, title, path)


def draw_matrices(runs: Sequence[ComparedRun], title: str, path: str | os.PathLike[str], *, columns: int = 4) -> None:
    """The success matrix of each method, mean over its runs, side by side. A frame marks when a task was learned.

    Args:
        runs: of one suite, memory size and order of tasks.
    """
    groups, tasks, learned_at = by_method(runs), runs[0].tasks, runs[0].learned_at
    stages, columns = max(learned_at) + 1, min(columns, len(groups))
    rows = -(-len(groups) // columns)
    panel_width, panel_height = max(stages * CELL_WIDTH + GAP, 2.1), len(tasks) * CELL_HEIGHT + TOP
    names = {method: textwrap.fill(f"{method} ({len(own)})", int(panel_width * 11)) for method, own in groups.items()}
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


def _finish(figure: Figure, title: str, path: str | os.PathLike[str]) -> None:
    """The title over the whole figure, not over the axes alone: beside them stands the legend."""
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=9)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
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
