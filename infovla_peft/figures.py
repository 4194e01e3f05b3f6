"""The report's pictures: success matrix, success of each task over the stages, loss terms over the steps."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from .files import atomic_file
from .methods import METHODS
from .metrics import average_by_stage
from .results import Results

INK, MUTED, GRID, ACCENT, SECOND = "#1d2b33", "#66757f", "#e3e8ea", "#0b6e78", "#c8622a"
SUCCESS_COLOURS = LinearSegmentedColormap.from_list(
    "success", ["#fbeee6", "#f3dcc0", "#cfe0cf", "#7fbcb4", "#2f8f95", "#064a55"]
)
MARKERS = "osD^vP*X<>"
FORMATS: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "pdf": {"CreationDate": None},
    "svg": {"Date": None},
}
"""What a figure is written as -> metadata, without what would differ from one day or version to the next."""
MAX_PIXELS = 2e7  # of one picture: the matrix of 100 stages must not take gigabytes
STYLE: dict[str, Any] = {
    "font.size": 9,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "figure.facecolor": "white",
    "text.parse_math": False,  # instructions are data
}


@dataclass(frozen=True)
class LossCurve:
    """One term of the loss over the optimiser steps of one stage; arrays of equal length, steps ascending."""

    stage: int
    term: str
    steps: NDArray[np.float64]
    values: NDArray[np.float64]


def stage_name(stage: int) -> str:
    return "base" if stage == 0 else f"+{stage}"


def cell_colours(rate: float) -> tuple[str, str]:
    """Background and text colour, as #rrggbb, of a success rate in [0, 1]; their contrast is at least 4.4 : 1."""
    return to_hex(SUCCESS_COLOURS(rate)), "#ffffff" if rate > 0.825 else "#0a1216"


def draw_success_matrix(results: Results, path: str | os.PathLike[str]) -> None:
    """Heatmap of the success matrix: one row per task, one column per stage, rate and counts in each cell.

    The cell of the stage at which a task was learned has a frame. The last row is the average over the tasks seen.
    """
    success, stages, tasks = results.success, results.stages, len(results.tasks)
    label_width, cell_width, cell_height, average_gap = 2.9, 0.92, 0.52, 0.18
    width = label_width + stages * cell_width + 0.1
    height = (tasks + 1) * cell_height + average_gap + 0.45
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.axis("off")

        def cell(row_top: float, stage: int, rate: float, counts: str, *, learned: bool) -> None:
            left, middle = label_width + stage * cell_width, row_top + cell_height / 2
            background, ink = cell_colours(rate)
            axes.add_patch(
                Rectangle((left + 0.025, row_top + 0.025), cell_width - 0.05, cell_height - 0.05, facecolor=background)
            )
            if learned:
                axes.add_patch(
                    Rectangle(
                        (left + 0.05, row_top + 0.05),
                        cell_width - 0.1,
                        cell_height - 0.1,
                        fill=False,
                        edgecolor=ink,
                        linewidth=0.9,
                    )
                )
            text: dict[str, Any] = {"ha": "center", "va": "center", "color": ink}
            offset = 0.07 if counts else 0.0
            axes.text(left + cell_width / 2, middle - offset, f"{100 * rate:.0f} %", weight="bold", size=10, **text)
            axes.text(left + cell_width / 2, middle + 0.12, counts, size=6.5, **text)

        for stage in range(stages):
            centre = label_width + (stage + 0.5) * cell_width
            axes.text(centre, 0.24, stage_name(stage), ha="center", va="center", weight="bold", color=MUTED)
        for i, task in enumerate(results.tasks):
            top = 0.4 + i * cell_height
            label = textwrap.fill(task.instruction, 36, max_lines=2, placeholder=" …")
            axes.text(label_width - 0.12, top + cell_height / 2, label, ha="right", va="center", linespacing=1.15)
            for stage in range(stages):
                if not np.isnan(success[i, stage]):
                    counts = f"{results.successes[i][stage]} / {results.episodes[i][stage]}"
                    cell(top, stage, success[i, stage], counts, learned=stage == task.learned_at)
        top = 0.4 + tasks * cell_height + average_gap
        axes.plot((0.1, width - 0.05), (top - average_gap / 2,) * 2, color=GRID, linewidth=0.8)
        axes.text(label_width - 0.12, top + cell_height / 2, "all tasks seen", ha="right", va="center", weight="bold")
        for stage, rate in enumerate(average_by_stage(success, results.learned_at)):
            if not np.isnan(rate):
                cell(top, stage, rate, "", learned=False)
        save_figure(figure, path)


def draw_success_by_stage(results: Results, path: str | os.PathLike[str], *, columns: int = 3) -> None:
    """One small panel per task learned so far, and one for the average over the tasks seen: success over the stages.

    Bars are 95 % Wilson intervals; the open dot is the stage at which the task was learned.
    """
    low, high = results.intervals()
    tasks = [(i, task) for i, task in enumerate(results.tasks) if task.learned_at < results.stages]
    with rc_context(STYLE):
        figure, grid = panels(len(tasks) + 1, columns, height=1.72, bottom=0.28)
        average = grid[0]
        average.set_title("all tasks seen", weight="bold")
        average.plot(average_by_stage(results.success, results.learned_at), color=SECOND, marker="o", markersize=4.5)
        for (i, task), axes in zip(tasks, grid[1:], strict=True):
            rates = np.where(np.arange(results.stages) >= task.learned_at, results.success[i], np.nan)
            stages = np.flatnonzero(~np.isnan(rates))
            axes.set_title(textwrap.fill(task.instruction, 34, max_lines=2, placeholder=" …"))
            axes.vlines(stages, low[i, stages], high[i, stages], color=ACCENT, alpha=0.3, linewidth=3.5)
            axes.plot(rates, color=ACCENT, marker="o", markersize=4.5)
            if task.learned_at in stages:
                axes.plot(
                    task.learned_at, rates[task.learned_at], "o", color=ACCENT, markerfacecolor="white", markersize=5.5
                )
        for axes in grid:
            axes.set(xlim=(-0.35, results.planned_stages - 0.65), ylim=(-0.06, 1.06), yticks=(0, 0.5, 1))
            ticks = range(0, results.planned_stages, -(-results.planned_stages // 8))
            axes.set_xticks(ticks, [stage_name(stage) for stage in ticks])
            axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{100 * rate:.0f} %"))
            axes.grid(axis="y", color=GRID, linewidth=0.7)
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
        save_figure(figure, path)


def draw_loss_terms(
    curves: Sequence[LossCurve], labels: Mapping[str, str], path: str | os.PathLike[str], *, columns: int = 3
) -> None:
    """One panel per term of the loss, over the optimiser steps of all stages, one after the other.

    The faint line is what was logged, the strong one its running median. A scale is logarithmic where a term is
    positive throughout and spans more than a factor 10.
    """
    terms = [term for term in labels if any(curve.term == term for curve in curves)]
    lengths = {stage: max(c.steps[-1] for c in curves if c.stage == stage) for stage in {c.stage for c in curves}}
    starts = dict(zip(sorted(lengths), np.cumsum([0.0, *(lengths[stage] for stage in sorted(lengths))]), strict=False))
    with rc_context(STYLE):
        figure, grid = panels(len(terms), min(columns, len(terms)), height=2.5, bottom=0.42)
        for term, axes in zip(terms, grid, strict=True):
            own = [curve for curve in curves if curve.term == term]
            values = np.concatenate([curve.values for curve in own])
            if values.min() > 0 and values.max() > 10 * values.min():
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 200 * values.min() else (1,)))
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.yaxis.set_minor_locator(NullLocator())
            for curve in own:
                steps = starts[curve.stage] + curve.steps
                axes.plot(steps, curve.values, color=ACCENT, alpha=0.25, linewidth=0.7)
                axes.plot(steps, _running_median(curve.values), color=ACCENT, linewidth=1.5)
            for stage in sorted({curve.stage for curve in own}):
                start = starts[stage]
                axes.axvline(start, color=GRID, linewidth=0.8, zorder=0)
                centre = start + lengths[stage] / 2
                axes.text(
                    centre, 1.0, stage_name(stage), transform=axes.get_xaxis_transform(),
                    ha="center", va="bottom", color=MUTED, size=7,
                )  # fmt: skip
            axes.set_title(labels[term], weight="bold", pad=14)
            axes.set_xlim(
                min(starts[curve.stage] for curve in own), max(starts[c.stage] + lengths[c.stage] for c in own)
            )
            axes.set_xlabel("optimiser step", size=8)
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.grid(axis="y", color=GRID, linewidth=0.7)
            axes.tick_params(length=0, which="both")
        save_figure(figure, path)


def panels(
    count: int, columns: int, *, height: float, bottom: float, width: float = 2.9, top: float = 0.42
) -> tuple[Figure, list[Axes]]:
    """`count` panels in a grid, row by row, placed by hand: matplotlib's layout engines are slow for many.

    Args:
        height, width: of a panel with its margins, in inches.
        bottom, top: margins of a panel, in inches.
    """
    rows, left, right = -(-count // columns), 0.5, 0.2
    figure = Figure(figsize=(width * columns, height * rows))
    panels = []
    for index in range(count):
        row, column = divmod(index, columns)
        x, y = column * width + left, (rows - 1 - row) * height + bottom
        size = width - left - right, height - bottom - top
        bounds = (x / (width * columns), y / (height * rows), size[0] / (width * columns), size[1] / (height * rows))
        panels.append(figure.add_axes(bounds))
    return figure, panels


def _running_median(values: NDArray[np.float64]) -> NDArray[np.float64]:
    reach = max(len(values) // 30, 1)
    padded = np.pad(values, reach, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1), axis=1)


def figure_format(path: str | os.PathLike[str]) -> str:
    """What a figure is to be written as, by the suffix of its file; call it before the work that the figure shows.

    Raises:
        ValueError: another suffix than those of `FORMATS`, or none; or a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file for the figure, {path / 'figure.png'}")
    name = path.suffix[1:].lower()
    if name not in FORMATS:
        *others, last = (f".{known}" for known in FORMATS)
        raise ValueError(f"{path}: a figure is written as {', '.join(others)} or {last}; name it {path.stem}.png")
    return name


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure atomically, as its suffix says; a PNG at 200 dots per inch unless the picture is huge.

    Raises:
        ValueError: see `figure_format`.
    """
    kind = figure_format(path)
    width, height = figure.get_size_inches()
    resolution = min(200.0, (MAX_PIXELS / (width * height)) ** 0.5)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=kind, dpi=resolution, metadata=FORMATS[kind])


def method_looks(methods: Sequence[str], among: Sequence[str] = ()) -> list[tuple[str, str]]:
    """A colour and a marker for each method: the accents for the two that are compared most, and no pair twice.

    A method of the package has the same ones in every figure; another has those of its place in `among`, the names of
    the whole comparison that the figure is of (by default, in `methods`).
    """
    fixed = {"infovla": ACCENT, "er": SECOND}
    # tab20's orange and cyan are too near the accents.
    palette = [to_hex(colormaps["tab20"](shade)) for shade in range(20)]
    palette[2:4], palette[18:20] = ["#2b3a8c", "#a3acd9"], ["#d9a400", "#efd98a"]
    others = [method for method in dict.fromkeys((*METHODS, *among, *methods)) if method not in fixed]
    looks = {name: (colour, "o") for name, colour in fixed.items()}
    for index, method in enumerate(others):
        shade = (2 * index) % 20 + (index // 10) % 2  # the strong ones first
        looks[method] = (palette[shade], MARKERS[1 + index % (len(MARKERS) - 1)])
    return [looks[method] for method in methods]
