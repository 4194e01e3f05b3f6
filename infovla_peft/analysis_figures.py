"""The pictures of analysis.json: affinity maps over the image, tables over the stages, similarities, a comparison."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .analysis_results import Analysis, AnalysisComparison, AnalysisError, mean_of_runs
from .figures import ACCENT, GRID, MUTED, SECOND, STYLE, method_looks, panels, save_figure, stage_name

WHEN = "when learned", "after the last stage"
MAP_COLOURS, MAP_ALPHA = "inferno", 0.62


class Quantity(NamedTuple):
    """How a table of analysis.json is drawn: its figure's name, what it shows, and limits it reaches in any case."""

    figure: str
    label: str
    low: float | None = None
    high: float | None = None


QUANTITIES = {
    "diffusion": Quantity("diffusion", "diffusion (1 = even)"),
    "cka": Quantity("cka", "CKA (when learned = 1)", None, 1.0),
    "listening": Quantity("listening", "listening (when learned = 1)", 0.0),
    "swap_change": Quantity("swap_change", "change when told otherwise", 0.0),
    "action_error": Quantity("action_error", "error of the actions", 0.0),
}
COMPARED_LABELS = {
    "diffusion_change": "diffusion gained since learning",
    "cka": "CKA with right after learning",
    "listening": "listening, right after learning = 1",
    "action_error": "error of the normalised actions",
}


def draw_analysis(analysis: Analysis, run: Path, folder: Path) -> dict[str, bool]:
    """Draw every figure of a run's analysis into `folder`.

    Args:
        run: folder of analysis.json, where the frames lie.

    Returns:
        Name of each figure -> whether there was something to draw.

    Raises:
        AnalysisError: a frame is missing or no picture.
    """
    drawn = {"affinity": bool(analysis.affinity), "similarity": bool(analysis.matrices)}
    if analysis.affinity:
        draw_affinity(analysis, run, folder / "affinity.png")
    if analysis.matrices:
        draw_similarity(analysis, folder / "similarity.png")
    for table, quantity in QUANTITIES.items():
        drawn[quantity.figure] = not np.isnan(analysis.table(table)).all()
        if drawn[quantity.figure]:
            draw_over_stages(analysis, table, folder / f"{quantity.figure}.png", columns=3)
            draw_over_stages(analysis, table, folder / f"{quantity.figure}_narrow.png", columns=1)
    return drawn


def draw_affinity(analysis: Analysis, run: Path, path: str | os.PathLike[str]) -> None:
    """A row per task: its frame, and over it the affinity map right after learning and after the last stage.

    One colour scale for all maps, from 0 to the largest affinity; 1 is a patch's share if all had the same. The bar's
    colours are those of a map over the mean grey of the pictures.

    Raises:
        AnalysisError: a frame is missing or no picture.
    """
    instructions = {task.name: task.instruction for task in analysis.tasks}
    rows, side, gap, top, bar = len(analysis.affinity), 2.3, 0.15, 0.62, 0.85
    width, height = 3 * side + 2 * gap + bar, rows * (side + top)
    highest = max(max(max(row) for row in grid) for pair in analysis.affinity for grid in pair.maps)
    images = [_read_image(run / pair.image) for pair in analysis.affinity]
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        for number, (pair, image) in enumerate(zip(analysis.affinity, images, strict=True)):
            bottom = height - (number + 1) * (side + top)
            figure.text(
                0.06 / width,
                (bottom + side + 0.3) / height,
                textwrap.fill(instructions[pair.task], 90, max_lines=1, placeholder=" …"),
                weight="bold",
                size=10,
            )
            titles = ["what the policy sees"]
            titles += [
                f"{when} ({stage_name(stage)}): diffusion {value:.2f}"
                for when, stage, value in zip(WHEN, pair.stages, pair.diffusion, strict=True)
            ]
            for column, title in enumerate(titles):
                left = 0.06 + column * (side + gap)
                axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
                axes.imshow(image if column == 0 else _grey(image), extent=(0, 1, 0, 1))
                axes.set_axis_off()
                axes.set_title(title, size=8, color=MUTED, pad=3)
                if column:
                    axes.imshow(
                        pair.maps[column - 1],
                        extent=(0, 1, 0, 1),
                        cmap=MAP_COLOURS,
                        alpha=MAP_ALPHA,
                        vmin=0.0,
                        vmax=highest,
                        interpolation="nearest",
                    )
        scale = figure.add_axes((1 - (bar - 0.2) / width, 0.08 / height, 0.12 / width, (side - 0.16) / height))
        grey = float(np.mean([_grey(image).mean() for image in images])) / 255
        colours = MAP_ALPHA * colormaps[MAP_COLOURS](np.linspace(0, 1, 256))[:, :3] + (1 - MAP_ALPHA) * grey
        seen = ScalarMappable(Normalize(0.0, highest), ListedColormap(colours))
        figure.colorbar(seen, cax=scale).set_label("affinity (1 = the even share)", size=7.5)
        scale.tick_params(length=0, labelsize=7)
        save_figure(figure, path)


def draw_over_stages(analysis: Analysis, table: str, path: str | os.PathLike[str], *, columns: int = 3) -> None:
    """One small panel per task, and one for the mean over the old tasks: a table of analysis.json over the stages.

    The open dot is the stage at which the task was learned. All panels have one scale.
    """
    values, quantity = analysis.table(table), QUANTITIES[table]
    old = analysis.old_mean(table)
    rows = [i for i in range(len(values)) if not np.isnan(values[i]).all()]
    everything = np.concatenate([values[rows].ravel(), old])
    low, high = float(np.nanmin(everything)), float(np.nanmax(everything))
    low, high = min(low, _or(quantity.low, low)), max(high, _or(quantity.high, high))
    margin = 0.12 * (high - low) or 0.05
    with rc_context(STYLE):
        figure, grid = panels(len(rows) + 1, min(columns, len(rows) + 1), height=1.9, bottom=0.28)
        grid[0].set_title(f"{quantity.label}:\nmean over the old tasks", weight="bold")
        grid[0].plot(old, color=SECOND, marker="o", markersize=4.5)
        for row, axes in zip(rows, grid[1:], strict=True):
            task = analysis.tasks[row]
            axes.set_title(textwrap.fill(task.instruction, 34, max_lines=2, placeholder=" …"))
            axes.plot(values[row], color=ACCENT, marker="o", markersize=4.5)
            first = task.learned_at
            axes.plot(first, values[row, first], "o", color=ACCENT, markerfacecolor="white", markersize=5.5)
        for axes in grid:
            axes.set(ylim=(low - margin, high + margin))
            _stage_axis(axes, analysis.stages)
            axes.yaxis.set_major_locator(MaxNLocator(4))
        save_figure(figure, path)


def draw_similarity(analysis: Analysis, path: str | os.PathLike[str]) -> None:
    """A row per task: cosines of its frames right after learning with themselves, and with the last stage's."""
    instructions = {task.name: task.instruction for task in analysis.tasks}
    rows, side, gap, top, left, bar = len(analysis.matrices), 2.3, 0.45, 0.62, 0.35, 0.85
    width, height = left + 2 * side + gap + bar, rows * (side + top + 0.25)
    with rc_context(STYLE):
        figure = Figure(figsize=(width, height))
        for number, pair in enumerate(analysis.matrices):
            bottom = height - (number + 1) * (side + top + 0.25) + 0.25
            figure.text(
                left / width,
                (bottom + side + 0.3) / height,
                textwrap.fill(instructions[pair.task], 60, max_lines=1, placeholder=" …"),
                weight="bold",
                size=10,
            )
            for column, (when, stage) in enumerate(zip(WHEN, pair.stages, strict=True)):
                x = left + column * (side + gap)
                axes = figure.add_axes((x / width, bottom / height, side / width, side / height))
                drawn = axes.imshow(pair.similarity[column], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
                axes.set_title(f"{when} ({stage_name(stage)})", size=8, color=MUTED, pad=3)
                axes.set(xticks=[], yticks=[])
                axes.set_xlabel("frame", size=7, labelpad=2)
                if column == 0:
                    axes.set_ylabel("frame, when learned", size=7, labelpad=2)
        scale = figure.add_axes((1 - (bar - 0.2) / width, 0.33 / height, 0.12 / width, (side - 0.16) / height))
        figure.colorbar(drawn, cax=scale).set_label("cosine", size=7.5)
        scale.tick_params(length=0, labelsize=7)
        save_figure(figure, path)


def draw_analysis_comparison(comparison: AnalysisComparison, path: str | os.PathLike[str]) -> None:
    """A panel per quantity, a line per method: mean over the old tasks of each stage.

    The band is from the lowest to the highest run of a method, where there are several.
    """
    columns = [name for name in COMPARED_LABELS if name in comparison.values]
    with rc_context(STYLE):
        figure, grid = panels(len(columns), 2, height=2.36, bottom=0.28)
        for name, axes in zip(columns, grid, strict=True):
            stages = 1
            lines = comparison.values[name]
            for (method, values), (colour, marker) in zip(lines.items(), method_looks(list(lines)), strict=True):
                mean, stages = mean_of_runs(values), values.shape[1]
                known = np.flatnonzero(~np.isnan(mean))
                axes.plot(known, mean[known], color=colour, marker=marker, markersize=4, label=method)
                if len(values) > 1 and len(known):
                    band = np.nanmin(values[:, known], axis=0), np.nanmax(values[:, known], axis=0)
                    axes.fill_between(known, *band, color=colour, alpha=0.15, linewidth=0)
            axes.set_title(COMPARED_LABELS[name], weight="bold")
            _stage_axis(axes, stages)
            axes.yaxis.set_major_locator(MaxNLocator(5))
        _legend_below(figure, grid)
        save_figure(figure, path)


def _legend_below(figure: Figure, grid: list[Axes]) -> None:
    """What the lines of all panels are, in as few rows as the width allows, in a strip that the figure grows by."""
    handles, labels = grid[0].get_legend_handles_labels()
    width, height = figure.get_size_inches()
    for columns in range(min(len(labels), 5), 0, -1):
        legend = figure.legend(
            handles, labels, loc="lower center", ncols=columns, frameon=False, fontsize=8, borderaxespad=0.2
        )
        size = legend.get_window_extent()
        if size.width <= width * figure.dpi or columns == 1:
            break
        legend.remove()
    strip = size.height / figure.dpi + 0.1
    figure.set_size_inches(width, height + strip)
    for axes in grid:
        x, y, wide, high = axes.get_position().bounds
        axes.set_position((x, (y * height + strip) / (height + strip), wide, high * height / (height + strip)))


def _stage_axis(axes: Axes, stages: int) -> None:
    axes.set_xlim(-0.35, stages - 0.65)
    ticks = range(0, stages, -(-stages // 8))
    axes.set_xticks(ticks, [stage_name(stage) for stage in ticks])
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def _read_image(path: Path) -> Any:
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except OSError as error:
        raise AnalysisError(f"{path} is missing or no picture; analyse the run again") from error


def _grey(image: Any) -> Any:
    """The picture without colours, so that all colours are the map's."""
    return np.asarray(Image.fromarray(image).convert("L").convert("RGB"))
