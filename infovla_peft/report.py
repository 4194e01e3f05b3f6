"""results.json → figures and one HTML page, with the videos of the run.

    report/index.html               everything on one page; opens from disk, no network, no script
    report/success_matrix.png       heatmap, for cards and slides
    report/success_by_stage*.png    each task over the stages (`_narrow`: for phones)
    report/loss_terms*.png          each term of the loss over the optimiser steps
    report/affinity.png …           where there is an analysis.json: what it found (see analysis_figures.py)

Every number in the text is one of results.json, or follows from it. The loss curves are drawn from the training logs
(stages/stage_NN/log.jsonl, one JSON object per line with `step` and the terms), and none of their values is quoted.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from .analysis_figures import draw_analysis
from .analysis_results import FILE as ANALYSIS
from .analysis_results import Analysis
from .figures import (
    LossCurve,
    cell_colours,
    draw_loss_terms,
    draw_success_by_stage,
    draw_success_matrix,
    stage_name,
)
from .files import atomic_folder, write_text
from .metrics import average_by_stage
from .results import Results, Video
from .simulation.jobs import work_off
from .text_tables import count_span

PATIENCE = 900.0
"""Seconds for one picture; all five of 51 stages took 11 on a busy core."""

LOSS_TERMS = {
    "policy_loss": "policy loss",
    "rac": "RAC (replay anchors)",
    "cmi": "CMI (cross-modal)",
    "output": "output (the teacher's answers)",
    "ewc": "EWC (penalty)",
    "grad_norm_current": "gradient, new task (norm)",
    "grad_norm_replay": "gradient, replay (norm)",
    "grad_norm_rac": "gradient, RAC (norm)",
    "grad_norm_cmi": "gradient, CMI (norm)",
    "grad_norm_output": "gradient, output (norm)",
    "grad_norm_ewc": "gradient, EWC (norm)",
    "grad_cosine_replay": "replay against new task (cosine)",
    "grad_cosine_rac": "RAC against new task (cosine)",
    "grad_cosine_cmi": "CMI against new task (cosine)",
    "grad_cosine_output": "output against new task (cosine)",
    "grad_cosine_ewc": "EWC against new task (cosine)",
}


class MetricText(NamedTuple):
    """How a metric is shown: its name, its unit, which way is good, and what it says."""

    label: str
    unit: str
    better: str
    meaning: str
    formula: str


METRIC_TEXTS = {
    "final_average": MetricText("final average", "%", "higher", "all tasks, after the last stage", "mean_i R[i, N]"),
    "auc": MetricText(
        "area under the curve", "%", "higher", "each task, from its own stage on", "mean_i mean_{j ≥ i} R[i, j]"
    ),
    "forward_transfer": MetricText(
        "right after learning", "%", "higher", "each task, after its own stage (the paper's FWT)", "mean_i R[i, i]"
    ),
    "negative_backward_transfer": MetricText(
        "lost afterwards", "pp", "lower", "mean over the later stages (NBT)", "mean_i mean_{j > i} (R[i, i] − R[i, j])"
    ),
    "average_accuracy": MetricText(
        "average accuracy", "%", "higher", "all tasks seen, over the stages", "mean_j mean_{i ≤ j} R[i, j]"
    ),
    "forgetting": MetricText(
        "forgetting",
        "pp",
        "lower",
        "from the best earlier stage to the last",
        "mean_i (max_{j < N} R[i, j] − R[i, N])",
    ),
    "backward_transfer": MetricText(
        "backward transfer", "pp", "higher", "from a task's own stage to the last", "mean_i (R[i, N] − R[i, i])"
    ),
}

ANALYSIS_TEXTS = {
    "affinity": (
        "What the instruction looks at",
        "The stronger a patch's colour, the nearer it is to the instruction's words in the policy's features. "
        "Forgetting, as the paper describes it, shows as strong patches that move off the named object, and as rising "
        "diffusion.",
    ),
    "diffusion": (
        "Diffusion",
        "Entropy of these maps, between all on one patch and spread evenly over all; a line that rises after the open "
        "dot says that later tasks have blurred what the instruction points at.",
    ),
    "cka": (
        "Representation kept",
        "CKA of the action features with those right after the task was learned (the open dot): the lower the line, "
        "the more later tasks have rearranged what the policy makes of the same frames.",
    ),
    "similarity": (
        "Frame by frame",
        "Each frame right after learning (rows) against each frame then (left) and after the last stage (right): the "
        "same picture on both sides, with its diagonal, says that frames still mean what they meant.",
    ),
    "listening": (
        "Does it still listen?",
        "How much another instruction changes the action on the same frame, relative to right after learning (the "
        "open dot): a line that falls to the bottom is a policy that does the same whatever it is told.",
    ),
    "swap_change": (
        "How much the instruction decides",
        "The same change as it is, in normalised actions: where it is small at the open dot already, there was little "
        "listening to lose, and its relative line above says little.",
    ),
    "action_error": (
        "Error of the actions",
        "Mean absolute difference to the recorded, normalised actions: it says whether what is still listened to is "
        "also answered rightly; lower is better.",
    ),
}
"""Figure of the analysis -> its heading, and how to read it."""


def write_report(run_folder: str | os.PathLike[str], *, alive: Callable[[], None] = lambda: None) -> Path:
    """Draw the figures and write the page of a run; an older report is replaced as a whole.

    Args:
        run_folder: holds results.json, and usually stages/ (training logs) and videos/.
        alive: called after each picture; what it raises ends the drawing, and the older report stays.

    Returns:
        The page, `run_folder`/report/index.html.

    Raises:
        FileNotFoundError: no results.json.
        ResultsError, AnalysisError: results.json or analysis.json is damaged.
        ValueError: no stage has been evaluated yet.
    """
    run = Path(run_folder)
    results = Results.load(run / "results.json")
    if not results.stages:
        raise ValueError(f"{run / 'results.json'} holds no evaluated stage yet; the report follows the first one")
    curves, unreadable = read_loss_curves(run)
    analysis = Analysis.load(run) if (run / ANALYSIS).exists() else None
    with atomic_folder(run / "report") as folder:
        draw_success_matrix(results, folder / "success_matrix.png")
        alive()
        for columns, suffix in ((3, ""), (1, "_narrow")):
            draw_success_by_stage(results, folder / f"success_by_stage{suffix}.png", columns=columns)
            alive()
            if curves:
                draw_loss_terms(curves, LOSS_TERMS, folder / f"loss_terms{suffix}.png", columns=columns)
                alive()
        figures = [name for name, drawn in draw_analysis(analysis, run, folder).items() if drawn] if analysis else []
        page = render_page(
            results, run, has_curves=bool(curves), unreadable_log_lines=unreadable, analysis_figures=figures
        )
        write_text(folder / "index.html", page)
        alive()
    return run / "report" / "index.html"


def write_report_apart(run_folder: str | os.PathLike[str]) -> Path:
    """`write_report` in a process of its own, so that a long run does not keep what its figures took: they grow.

    Should this process end meanwhile, the other ends too, and the older report stays.

    Raises:
        LostJobError: three processes were lost, one after another: out of memory, most likely.
        FileNotFoundError, ResultsError, AnalysisError, ValueError: as `write_report`.
    """
    (page,) = work_off(
        _write_for, [os.fspath(run_folder)], workers=1, patience=PATIENCE, name="the report of {}".format
    )
    return page


def _write_for(run_folder: str, alive: Callable[[], None]) -> Path:
    return write_report(run_folder, alive=alive)


def read_loss_curves(run: Path) -> tuple[list[LossCurve], int]:
    """The loss terms of every stage's log, and how many lines could not be read (a killed run leaves a torn one).

    A step that was logged twice, before and after a resume, counts as logged last. Values that are not finite are left
    out.
    """
    curves, unreadable = [], 0
    for log in sorted(run.glob("stages/stage_*/log.jsonl")):
        stage_digits = log.parent.name.removeprefix("stage_")
        values: dict[str, dict[float, float]] = {term: {} for term in LOSS_TERMS}
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                step = float(entry["step"])
                found = {term: float(entry[term]) for term in LOSS_TERMS if entry.get(term) is not None}
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                unreadable += bool(line.strip())
                continue
            for term, value in found.items():
                if math.isfinite(step) and math.isfinite(value):
                    values[term][step] = value
        for term, points in values.items():
            if points and stage_digits.isdecimal():
                steps, numbers = np.array(sorted(points.items()), dtype=np.float64).T
                curves.append(LossCurve(int(stage_digits), term, steps, numbers))
    return curves, unreadable


def render_page(
    results: Results, run: Path, *, has_curves: bool, unreadable_log_lines: int, analysis_figures: Sequence[str] = ()
) -> str:
    """The HTML of the page. Everything that comes from data is escaped."""
    environment = Environment(
        loader=PackageLoader("infovla_peft"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    metrics = results.metrics()
    return environment.get_template("report.html.jinja").render(
        results=results,
        stage_names=[stage_name(stage) for stage in range(results.stages)],
        rows=_matrix_rows(results),
        averages=[_average_cell(rate) for rate in average_by_stage(results.success, results.learned_at)],
        metrics=[(text, _points(metrics[name])) for name, text in METRIC_TEXTS.items()],
        summary=_summary(results, metrics),
        episodes=count_span([count for row in results.episodes for count in row if count is not None]),
        timings=_timings(results),
        video_groups=_video_groups(results, run),
        missing_videos=sum(not (run / video.path).is_file() for video in results.videos),
        has_curves=has_curves,
        unreadable_log_lines=unreadable_log_lines,
        analysis=[(name, *ANALYSIS_TEXTS[name]) for name in ANALYSIS_TEXTS if name in analysis_figures],
        config=[(key, json.dumps(value, ensure_ascii=False)) for key, value in results.config.items()],
    )


def _points(value: float) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.1f}".replace("-", "−")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _matrix_rows(results: Results) -> list[tuple[str, list[dict[str, Any] | None]]]:
    success, (low, high) = results.success, results.intervals()
    rows = []
    for i, task in enumerate(results.tasks):
        cells: list[dict[str, Any] | None] = []
        for j in range(results.stages):
            if results.episodes[i][j] is None:
                cells.append(None)
                continue
            background, ink = cell_colours(success[i, j])
            cells.append(
                {
                    "percent": f"{100 * success[i, j]:.0f}",
                    "counts": f"{results.successes[i][j]}/{results.episodes[i][j]}",
                    "interval": f"{100 * low[i, j]:.0f}–{100 * high[i, j]:.0f}",
                    "learned": task.learned_at == j,
                    "background": background,
                    "ink": ink,
                }
            )
        rows.append((task.instruction, cells))
    return rows


def _average_cell(rate: float) -> dict[str, str] | None:
    if math.isnan(rate):
        return None
    background, ink = cell_colours(rate)
    return {"percent": f"{100 * rate:.0f}", "background": background, "ink": ink}


def _summary(results: Results, metrics: dict[str, float]) -> dict[str, str | int]:
    return {
        "final": _points(metrics["final_average"]),
        "learned": _points(metrics["forward_transfer"]),
        "tasks": sum(task.learned_at < results.stages for task in results.tasks),
    }


def _timings(results: Results) -> tuple[list[str], list[list[str]]]:
    kinds = list(dict.fromkeys(kind for stage in results.timings for kind in stage))
    rows = [
        [stage_name(j), *(_duration(stage[kind]) if kind in stage else "–" for kind in kinds)]
        for j, stage in enumerate(results.timings)
    ]
    return kinds, rows


def _video_groups(results: Results, run: Path) -> list[tuple[str, list[dict[str, Any]]]]:
    """Newest stage first; within a stage as recorded (failures first). Videos that are not on disk are left out."""
    instructions = {task.name: task.instruction for task in results.tasks}

    def entry(video: Video) -> dict[str, Any]:
        return {
            "source": quote(f"../{video.path}"),
            "instruction": instructions[video.task],
            "success": video.success,
        }

    groups = []
    for stage in reversed(range(results.stages)):
        videos = [entry(v) for v in results.videos if v.stage == stage and (run / v.path).is_file()]
        if videos:
            groups.append((stage_name(stage), videos))
    return groups
