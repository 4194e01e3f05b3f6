"""Why a policy forgets: what its words look at, what its features keep, and whether it still listens.

The paper's claim (arXiv 2603.13335, Fig. 1 and 4) is that forgetting shows as *diffusion of the cross-modal
structure*: after later tasks, what the instruction names no longer stands out of the image. Here that is a number,
beside two that may say otherwise: how alike the representation still is (CKA), and whether the instruction still
changes the action.

The measures are in `representation.py`, one policy on frames of one task is in `probe.py`; `analyse_run` goes through
every stage of a run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .adapters import base_model
from .analysis_figures import AnalysedRun, draw_affinity, draw_analysis_comparison, draw_similarity
from .analysis_results import (
    FILE,
    RANGES,
    AffinityPair,
    Analysis,
    AnalysisComparison,
    ProbedTask,
    SimilarityPair,
    Table,
    compare,
)
from .data.demonstrations import recipe_demonstrations
from .figures import figure_format
from .files import atomic_file
from .hub import load_policy
from .inference import Policy
from .memory import ReplayMemory
from .methods import METHODS
from .probe import PROBE_DEMONSTRATIONS, Findings, Probe, look_at, probe_frames
from .report import write_report
from .representation import diffusion, linear_cka, similarity_matrix
from .results import Results, TaskEntry, collect_versions, source_commit

PROBE_FRAMES = 32
"""Per task; unverified."""
AFFINITY_TEMPERATURE = 0.1
"""Of the affinity maps of every run, whatever it was trained at, so that methods compare; unverified."""
SHOWN_TASKS = 3
"""Tasks whose affinity maps are drawn; unverified."""


def analyse_run(
    run_folder: str | os.PathLike[str],
    *,
    frames: int = PROBE_FRAMES,
    demonstrations: str | os.PathLike[str] | None = None,
    policies: Callable[[int], Policy] | None = None,
    device: Any = None,
) -> dict[str, Any]:
    """Look at every stage of a run that is evaluated, and at every task seen by then; then write the report again.

    The reference of a task is the policy right after the stage that learned it.

    Args:
        run_folder: of a run; finished or not.
        frames: probe frames per task.
        demonstrations: where they are, if not where the run's configuration says.
        policies: gives the policy after a stage; None: `load_policy(run_folder, stage=...)`.
        device: of the policies, where `policies` is None.

    Returns:
        The content of `run_folder`/analysis.json, see `analysis_results`. Written too: analysis/*.png, the frames
        that the report shows.

    Raises:
        FileNotFoundError: no results.json, demonstrations or memory.
        ValueError: nothing is evaluated yet, or a task has too few demonstrations or frames.
    """
    run = Path(run_folder)
    results = Results.load(run / "results.json")
    config = results.config
    tasks = [task for task in results.tasks if task.learned_at < results.stages]
    if not tasks:
        raise ValueError(f"{run} has learned no task yet; analyse it after its first stage")
    source: str | os.PathLike[str]
    source, options = recipe_demonstrations(config, run / "demonstrations")
    if demonstrations is not None:
        source = demonstrations
    memory = ReplayMemory.load(run / "memory")
    load = policies or (lambda stage: load_policy(run, stage=stage, device=device))
    own = results.method in METHODS and METHODS[results.method].policy == "own"
    layer = int(config.get("tap_layer", -1))
    probes: dict[str, Probe] = {}
    found: dict[tuple[str, int], Findings] = {}
    for stage in range(tasks[0].learned_at, results.stages):
        policy = load(stage)
        seen = [task for task in tasks if task.learned_at <= stage]
        print(f"analysis: {f'stage {stage}' if stage else 'base'}, {len(seen)} tasks", flush=True)
        for task in seen:
            if own and task.learned_at < stage:  # each task keeps its adapter
                found[task.name, stage] = found[task.name, task.learned_at]
                continue
            if task.name not in probes:
                probes[task.name] = probe_frames(
                    task, policy, source, memory, frames=frames, episodes=config.get("demonstrations"), **options
                )
            found[task.name, stage] = look_at(
                policy,
                probes[task.name],
                known_with(task, tasks),
                tap_layer=layer,
                temperature=AFFINITY_TEMPERATURE,
            )
        images = base_model(policy.model).config.num_images_in_input
        del policy  # one at a time in memory
    last = results.stages - 1
    shown = [task for task in tasks if task.learned_at < last][:SHOWN_TASKS]
    analysis = Analysis(
        **{name: getattr(results, name) for name in ("method", "stream", "suite", "seed", "base_model", "assets")},
        frames=frames,
        demonstrations=PROBE_DEMONSTRATIONS,
        tap_layer=layer,
        temperature=AFFINITY_TEMPERATURE,
        stages=results.stages,
        tasks=[
            ProbedTask(**vars(task), frames=len(probes[task.name].samples), episodes=probes[task.name].episodes)
            for task in tasks
        ],
        **_tables(tasks, results.stages, found),
        affinity=[_affinity_pair(run, task, last, probes[task.name], found, images) for task in shown],
        matrices=[_similarity_pair(task, last, found) for task in shown],
        versions=collect_versions(),
        commit=source_commit(),
    )
    analysis.save(run)
    write_report(run)
    return analysis.to_dict()


def is_analysed(run_folder: str | os.PathLike[str], *, frames: int | None = None) -> bool:
    """Whether a run has an analysis of all stages that are evaluated, with so many frames per task (None: any).

    Where the analysis is all that was kept of a run, it is taken as it is.

    Raises:
        FileNotFoundError: neither results.json nor an analysis.
        AnalysisError, ResultsError: a damaged file.
    """
    results, analysed = Path(run_folder) / "results.json", (Path(run_folder) / FILE).exists()
    if analysed and not results.exists():
        Analysis.load(run_folder)
        return True
    stages = Results.load(results).stages
    if not analysed:
        return False
    found = Analysis.load(run_folder)
    return found.stages == stages and frames in (None, found.frames)


def known_with(task: TaskEntry, tasks: Sequence[TaskEntry]) -> list[str]:
    """The other instructions that the policy knew when it learned a task.

    The same at every later stage, so that a change of the answer is the policy's and not the question's.
    """
    known = [other.instruction for other in tasks if other.learned_at <= task.learned_at]
    return [text for text in dict.fromkeys(known) if text != task.instruction]


def compare_analyses(
    run_folders: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    names: Sequence[str | None] = (),
) -> AnalysisComparison:
    """Diffusion, CKA and listening over the stages, per method, mean over the old tasks.

    With `output` are drawn: these; beside it `…_affinity`, the affinity maps of all runs on one colour scale, over
    their scenes where every run has its frames; and `…_similarity`, how alike single frames are to themselves.

    Args:
        run_folders: each with an analysis.json; runs of one method with several seeds are averaged.
        output: a figure to draw, .png, .pdf or .svg.
        names: what each run counts as, None for its method: variants of one method need names.

    Raises:
        FileNotFoundError: a run is not analysed.
        ValueError: the runs differ in what makes numbers comparable; or another suffix of `output`.
    """
    if output is not None:
        figure_format(output)
    analyses = [Analysis.load(folder) for folder in run_folders]
    comparison = compare(analyses, names)
    if output is None:
        return comparison
    labels = [(names[index] if names else None) or analysis.method for index, analysis in enumerate(analyses)]
    runs = [
        AnalysedRun(f"{label}, seed {analysis.seed}" if len(analyses) > 1 else "", analysis, Path(folder))
        for label, analysis, folder in zip(labels, analyses, run_folders, strict=True)
    ]
    output = Path(output)
    affinity, similarity = (output.with_stem(f"{output.stem}_{kind}") for kind in ("affinity", "similarity"))
    figures = [output]
    draw_analysis_comparison(comparison, output)
    if any(analysis.affinity for analysis in analyses):
        scenes = all((run.folder / pair.image).exists() for run in runs for pair in run.analysis.affinity)
        draw_affinity(runs, affinity, scenes=scenes)
        figures.append(affinity)
    if any(analysis.matrices for analysis in analyses):
        draw_similarity(runs, similarity)
        figures.append(similarity)
    return replace(comparison, figures=tuple(figures))


def _tables(tasks: Sequence[TaskEntry], stages: int, found: Mapping[tuple[str, int], Findings]) -> dict[str, Any]:
    """The tables of `Analysis` by name."""
    tables: dict[str, Table] = {name: [[None] * stages for _ in tasks] for name in RANGES}
    for row, task in enumerate(tasks):
        then = found[task.name, task.learned_at]
        for stage in range(task.learned_at, stages):
            for name, value in _numbers(found[task.name, stage], then).items():
                tables[name][row][stage] = value
    return tables


def _numbers(now: Findings, then: Findings) -> dict[str, float | None]:
    """A cell of each table."""
    changed, before = (float(np.mean(list(each.change.values()))) if each.change else None for each in (now, then))
    same_frame = similarity_matrix(then.action, now.action, centre=then.action.mean(0)).diagonal()
    return {
        "diffusion": float(diffusion(now.maps).mean()),
        "cka": float(linear_cka(then.action, now.action, unbiased=True)),
        "similarity": float(same_frame.mean()),
        "swap_change": changed,
        "listening": changed / before if changed is not None and before else None,
        "action_error": now.error,
    }


def _affinity_pair(
    run: Path, task: TaskEntry, last: int, probe: Probe, found: Mapping[tuple[str, int], Findings], images: int
) -> AffinityPair:
    """The first probe frame of a task: the start of an episode, when the arm hides nothing."""
    name = f"analysis/{task.name}.png"
    with atomic_file(run / name) as temporary:
        Image.fromarray(probe.samples.images[0, 0].transpose(1, 2, 0)).save(temporary)
    stages = [task.learned_at, last]
    maps = torch.stack([found[task.name, stage].maps[0] for stage in stages])  # (2, Nv)
    patches = maps.shape[1] // images
    side = int(patches**0.5)
    grids = maps[:, :patches].reshape(2, side, patches // side) * maps.shape[1]  # of the first camera
    return AffinityPair(task.name, name, stages, diffusion(maps).tolist(), _rounded(grids))


def _similarity_pair(task: TaskEntry, last: int, found: Mapping[tuple[str, int], Findings]) -> SimilarityPair:
    stages = [task.learned_at, last]
    then = found[task.name, task.learned_at].action
    pair = [similarity_matrix(then, found[task.name, stage].action, centre=then.mean(0)) for stage in stages]
    return SimilarityPair(task.name, stages, _rounded(torch.stack(pair)))


def _rounded(values: Tensor) -> list[Any]:
    rounded: list[Any] = values.double().numpy().round(4).tolist()
    return rounded
