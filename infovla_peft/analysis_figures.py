"""The pictures of analysis.json: affinity maps over the image, tables over the stages, similarities, a comparison."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .analysis_results import AffinityPair, Analysis, AnalysisComparison, AnalysisError, SimilarityPair, mean_of_runs
from .figures import ACCENT, GRID, MUTED, SECOND, STYLE, method_looks, panels, save_figure, stage_name

Pair = TypeVar("Pair", AffinityPair, SimilarityPair)
WHEN = "when learned", "after the last stage"
SHADES = np.column_stack([colormaps["YlOrRd"](np.linspace(0, 1, 256))[:, :3], np.linspace(0.1, 0.8, 256)])
"""(256, 4) colours of an affinity map: the less there is, the more of the scene is seen through it."""


class AnalysedRun(NamedTuple):
    """An analysis to draw: what its panels are called (nothing where it is the only one), and where its frames lie."""

    name: str
    analysis: Analysis
    folder: Path


class Quantity(NamedTuple):
    """How a table of analysis.json is drawn: its figure's name, what it shows, and limits it reaches in any case.

    `span` is the least that an axis shows, so that chance does not fill it. All of them are chosen by eye.
    """

    figure: str
    label: str
    low: float | None = None
    high: float | None = None
    span: float = 0.0


class Compared(NamedTuple):
    """A panel of a comparison: its title, what is measured in which unit, and limits it reaches in any case."""

    title: str
    unit: str
    low: float | None = None
    high: float | None = None


QUANTITIES = {
    "diffusion": Quantity("diffusion", "diffusion (1 = even)", span=0.1),
    "cka": Quantity("cka", "CKA (when learned = 1)", 0.9, 1.0),
    "listening": Quantity("listening", "listening (when learned = 1)", 0.0),
    "swap_change": Quantity("swap_change", "change when told otherwise", 0.0),
    "action_error": Quantity("action_error", "error of the actions", 0.0),
}
COMPARED_LABELS = {
    "diffusion_change": Compared(
        "diffusion of the affinity maps",
        "change of their entropy since learning,\nas a share of the largest entropy",
        -0.05,
        0.05,
    ),
    "cka": Compared(
        "representation kept", "CKA of the action features with those\nright after learning, 1 = the same", 0.9, 1.0
    ),
    "listening": Compared(
        "listening to the instruction",
        "change of the actions when told otherwise,\nas a multiple of that right after learning",
        0.8,
        1.2,
    ),
    "action_error": Compared(
        "error of the actions", "mean absolute difference to the recorded\nones, in normalised actions", 0.0
    ),
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
        draw_affinity([AnalysedRun("", analysis, run)], folder / "affinity.png")
    if analysis.matrices:
        draw_similarity([AnalysedRun("", analysis, run)], folder / "similarity.png")
    for table, quantity in QUANTITIES.items():
        drawn[quantity.figure] = not np.isnan(analysis.table(table)).all()
        if drawn[quantity.figure]:
            draw_over_stages(analysis, table, folder / f"{quantity.figure}.png", columns=3)
            draw_over_stages(analysis, table, folder / f"{quantity.figure}_narrow.png", columns=1)
    return drawn


def draw_affinity(runs: Sequence[AnalysedRun], path: str | os.PathLike[str], *, scenes: bool = True) -> None:
    """A row per task: over its frame, each run's affinity map right after learning and after the last stage.

    Of a single run the frame alone stands before them. One colour scale for all maps of all runs, from 0 to the
    largest affinity; 1 is a patch's share if all had the same. The bar's colours are those of a map over the mean
    grey of the pictures.

    Args:
        scenes: False: the maps alone, as of runs of which only analysis.json was kept.

    Raises:
        AnalysisError: a frame is missing or no picture.
    """
    rows = _by_task([run.analysis.affinity for run in runs])
    highest = max(np.max(pair.maps) for pairs in rows.values() for pair in pairs if pair)
    frame_first = scenes and len(runs) == 1
    images = {
        (task, index): _read_image(runs[index].folder / pair.image)
        for task, pairs in rows.items()
        for index, pair in enumerate(pairs)
        if pair and scenes
    }
    colours = ListedColormap(SHADES if scenes else SHADES[:, :3])
    with rc_context(STYLE):
        sheet = _Sheet(_instructions(runs, rows), frame_first + 2 * len(runs), gap=0.15, names=len(runs) > 1)
        for row, (task, pairs) in enumerate(rows.items()):
            for index, pair in enumerate(pairs):
                if pair is None:
                    continue
                if frame_first:
                    sheet.panel(row, 0, "what the policy sees").imshow(images[task, index], extent=(0, 1, 0, 1))
                for place, (when, stage, value) in enumerate(zip(WHEN, pair.stages, pair.diffusion, strict=True)):
                    title = f"{when} ({stage_name(stage)}): diffusion {value:.2f}"
                    axes = sheet.panel(row, frame_first + 2 * index + place, title, runs[index].name)
                    if scenes:
                        axes.imshow(_pale(images[task, index]), extent=(0, 1, 0, 1))
                    axes.imshow(
                        pair.maps[place],
                        extent=(0, 1, 0, 1),
                        cmap=colours,
                        vmin=0.0,
                        vmax=highest,
                        interpolation="nearest",
                    )
        if scenes:
            grey = float(np.mean([_pale(image).mean() for image in images.values()])) / 255
            colours = ListedColormap(SHADES[:, 3:] * SHADES[:, :3] + (1 - SHADES[:, 3:]) * grey)
        sheet.bar(ScalarMappable(Normalize(0.0, highest), colours), "affinity (1 = the even share)")
        save_figure(sheet.figure, path)


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
    margin = max(0.12 * (high - low), (quantity.span - (high - low)) / 2) or 0.05
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


def draw_similarity(runs: Sequence[AnalysedRun], path: str | os.PathLike[str]) -> None:
    """A row per task: of each run, cosines of its frames right after learning with themselves and the last stage's."""
    rows = _by_task([run.analysis.matrices for run in runs])
    scale = Normalize(-1.0, 1.0)
    with rc_context(STYLE):
        sheet = _Sheet(_instructions(runs, rows), 2 * len(runs), gap=0.3, left=0.35, below=0.25, names=len(runs) > 1)
        for row, pairs in enumerate(rows.values()):
            for index, pair in enumerate(pairs):
                if pair is None:
                    continue
                for place, (when, stage) in enumerate(zip(WHEN, pair.stages, strict=True)):
                    title = f"{when} ({stage_name(stage)})"
                    axes = sheet.panel(row, 2 * index + place, title, runs[index].name)
                    axes.imshow(pair.similarity[place], cmap="RdBu_r", norm=scale, interpolation="nearest")
                    axes.set_axis_on()
                    axes.set(xticks=[], yticks=[])
                    axes.set_xlabel("frame", size=7, labelpad=2)
                    if index + place == 0:
                        axes.set_ylabel("frame, when learned", size=7, labelpad=2)
        sheet.bar(ScalarMappable(scale, "RdBu_r"), "cosine")
        save_figure(sheet.figure, path)


def draw_analysis_comparison(comparison: AnalysisComparison, path: str | os.PathLike[str]) -> None:
    """A panel per quantity, a line per method: mean over the old tasks of each stage.

    The band is from the lowest to the highest run of a method, where there are several.
    """
    columns = [name for name in COMPARED_LABELS if name in comparison.values]
    with rc_context(STYLE):
        figure, grid = panels(len(columns), 2, height=2.75, bottom=0.28, width=3.1, top=0.72)
        for name, axes in zip(columns, grid, strict=True):
            stages, (title, unit, *limits) = 1, COMPARED_LABELS[name]
            lines = comparison.values[name]
            for (method, values), (colour, marker) in zip(lines.items(), method_looks(list(lines)), strict=True):
                mean, stages = mean_of_runs(values), values.shape[1]
                known = np.flatnonzero(~np.isnan(mean))
                axes.plot(
                    known, mean[known], color=colour, marker=marker, markersize=4, label=comparison.label(method)
                )
                if len(values) > 1 and len(known):
                    band = np.nanmin(values[:, known], axis=0), np.nanmax(values[:, known], axis=0)
                    axes.fill_between(known, *band, color=colour, alpha=0.13, linewidth=0)
            everything = [value for values in lines.values() for value in values[~np.isnan(values)]]
            everything += [limit for limit in limits if limit is not None]
            if everything:
                low, high = min(everything), max(everything)
                margin = 0.05 * (high - low) or 0.05
                axes.set_ylim(low - margin, high + margin)
            axes.set_title(title, weight="bold", pad=24)
            axes.text(0, 1.03, unit, transform=axes.transAxes, va="bottom", color=MUTED, size=7.5, linespacing=1.15)
            _stage_axis(axes, stages)
            axes.yaxis.set_major_locator(MaxNLocator(5))
        bands = "; bands: from the lowest run to the highest" if max(comparison.runs.values()) > 1 else ""
        _legend_below(figure, grid, f"over the stages: mean over the tasks learned before{bands}")
        save_figure(figure, path)


class _Sheet:
    """Square panels in rows, a headline above each row, a colour bar at the lower right; all in inches.

    Args:
        headlines: of the rows.
        names: panels have a second line of title, for the names of runs.
        left, below: room for labels of the axes.
    """

    def __init__(
        self,
        headlines: Sequence[str],
        columns: int,
        *,
        gap: float,
        names: bool,
        left: float = 0.06,
        below: float = 0.0,
    ) -> None:
        self.side, self.gap, self.left, self.below = 2.3, gap, left, below
        self.row_height = self.side + 0.62 + (0.15 if names else 0.0) + below
        self.width = left + columns * (self.side + gap) - gap + 0.85
        self.rows = len(headlines)
        self.height = self.rows * self.row_height + 0.06
        self.figure = Figure(figsize=(self.width, self.height))
        for row, text in enumerate(headlines):
            self.figure.text(
                left / self.width,
                1 - (row * self.row_height + 0.14) / self.height,
                textwrap.fill(text, int(11 * (self.width - 0.85)), max_lines=1, placeholder=" …"),
                weight="bold",
                size=10,
                va="top",
            )

    def panel(self, row: int, column: int, title: str, name: str = "") -> Axes:
        x, y = self.left + column * (self.side + self.gap), self.height - (row + 1) * self.row_height + self.below
        axes = self.figure.add_axes(self._part(x, y, self.side, self.side))
        axes.set_axis_off()
        axes.set_title(f"{name}\n{title}" if name else title, size=8, color=MUTED, pad=3, linespacing=1.15)
        return axes

    def bar(self, colours: ScalarMappable, label: str) -> None:
        y = self.height - self.rows * self.row_height + self.below
        scale = self.figure.add_axes(self._part(self.width - 0.65, y + 0.08, 0.12, self.side - 0.16))
        self.figure.colorbar(colours, cax=scale).set_label(label, size=7.5)
        scale.tick_params(length=0, labelsize=7)

    def _part(self, x: float, y: float, width: float, height: float) -> tuple[float, float, float, float]:
        return x / self.width, y / self.height, width / self.width, height / self.height


def _by_task(pairs: Sequence[Sequence[Pair]]) -> dict[str, list[Pair | None]]:
    """Task -> what each run has of it, None where it has nothing; tasks as they first occur."""
    tasks = dict.fromkeys(pair.task for own in pairs for pair in own)
    return {task: [next((pair for pair in own if pair.task == task), None) for own in pairs] for task in tasks}


def _instructions(runs: Sequence[AnalysedRun], tasks: Iterable[str]) -> list[str]:
    texts = {task.name: task.instruction for run in runs for task in run.analysis.tasks}
    return [texts[task] for task in tasks]


def _legend_below(figure: Figure, grid: list[Axes], note: str) -> None:
    """What the lines of all panels are, in as few rows as the width allows, and a note: the figure grows by them."""
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
    line = 0.24  # of the note
    strip = size.height / figure.dpi + line + 0.1
    figure.set_size_inches(width, height + strip)
    legend.set_bbox_to_anchor((0.5, line / (height + strip)), figure.transFigure)
    figure.text(0.5, 0.07 / (height + strip), note, ha="center", va="bottom", size=7.5, color=MUTED)
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


def _pale(image: Any) -> Any:
    """The picture without colours and light, so that all colours are the map's."""
    grey = np.asarray(Image.fromarray(image).convert("L").convert("RGB"))
    return (90 + grey * (165 / 255)).astype(np.uint8)
