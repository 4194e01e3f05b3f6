"""Why a policy forgets: what its words look at, what its features keep, and whether it still listens.

The paper's claim (arXiv 2603.13335, Fig. 1 and 4) is that forgetting shows as *diffusion of the cross-modal
structure*: after later tasks, what the instruction names no longer stands out of the image. Here that is a number,
beside two that may say otherwise: how alike the representation still is (CKA), and whether the instruction still
changes the action.

`affinity_maps`, `diffusion`, `linear_cka`, `similarity_matrix` and `swap_change` are pure functions on tensors;
`analyse_run` applies them to every stage of a run, on frames of demonstrations that are not in the replay memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from .analysis_figures import draw_comparison
from .analysis_results import (
    FILE,
    RANGES,
    AffinityPair,
    Analysis,
    Comparison,
    ProbedTask,
    SimilarityPair,
    Table,
    compare,
)
from .data.chunks import ChunkDataset, Samples
from .data.collator import VLACollator
from .data.demonstrations import CAMERA_COLUMNS, load_demonstrations, recipe_demonstrations
from .features import Features, FeatureTap, extract_features
from .files import atomic_file
from .hub import load_policy
from .inference import Policy
from .losses import summarize_cross_modal
from .memory import ReplayMemory
from .models.openvla import build_prompt
from .report import write_report
from .results import Results, TaskEntry, collect_versions, source_commit

PROBE_FRAMES, PROBE_DEMONSTRATIONS = 32, 2
SHOWN_TASKS = 3
_FEWEST = 4  # frames; CKA without bias is not defined for less


# --- pure functions --------------------------------------------------------------------------------------------------


def affinity_maps(features: Features, words: Tensor | None = None, *, temperature: float = 0.1) -> Tensor:
    """What the instruction looks at: softmax over the patches of cos(patch, word) / τ, averaged over the words.

    Deviation from the paper, whose figures show the attention of its model: these are the affinities that the
    cross-modal loss works on (`losses.summarize_cross_modal`), of the tapped layer.

    Args:
        features: of B frames, see `features.extract_features`.
        words: (B, Nl) bool, the tokens that are averaged; None: all of the prompt.
        temperature: τ > 0.

    Returns:
        (B, Nv), each row a distribution over the patches of all images. 0 in a row without words.
    """
    summary = summarize_cross_modal(
        features.vision, features.language, None, features.language_mask, temperature=temperature
    )
    mask = features.language_mask if words is None else features.language_mask & words  # (B, Nl)
    looks = (summary.affinity / temperature).softmax(dim=1)  # (B, Nv, Nl)
    weight = mask.to(looks.dtype) / mask.sum(1, keepdim=True).clamp(min=1)
    return (looks @ weight[..., None]).squeeze(-1)


def diffusion(maps: Tensor) -> Tensor:
    """Normalised entropy −Σ p log p / log P of distributions (…, P) over P patches: (…), in [0, 1].

    1 = spread evenly over all patches, 0 = all on one.

    Raises:
        ValueError: fewer than two patches.

    >>> diffusion(torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    if maps.shape[-1] < 2:
        raise ValueError(f"a map needs at least two patches to spread over, got {maps.shape[-1]}")
    spread: Tensor = torch.special.entr(maps).sum(-1) / math.log(maps.shape[-1])
    return spread.clamp(0.0, 1.0)


def linear_cka(x: Tensor, y: Tensor, *, unbiased: bool = False) -> Tensor:
    """Linear centred kernel alignment of two representations of the same N samples. Kornblith et al., 1905.00414.

        CKA = ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖), Frobenius norms, X and Y centred

    Invariant to rotation and to isotropic scaling of either; 1 for representations that are equal up to these. With
    few samples in many dimensions it is far above 0 even for independent ones. `unbiased` mends that: the same ratio
    with the unbiased estimator of HSIC (Song et al. 2012; Nguyen et al., 2010.15327), whose expectation for
    independent representations is about 0, and which may be slightly negative.

    Args:
        x: (N, D1), y: (N, D2), any floating dtype; computed in float64.
        unbiased: needs N ≥ 4.

    Returns:
        Scalar, ≤ 1. 0 where one of them does not vary at all.

    Raises:
        ValueError: not two matrices of equally many rows, or too few rows.

    >>> x = torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 3.0]])
    >>> round(float(linear_cka(x, 3 * x @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))), 6)
    1.0
    """
    fewest = 4 if unbiased else 2
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y) or len(x) < fewest:
        raise ValueError(f"expected (N, D1) and (N, D2), N ≥ {fewest}, got {tuple(x.shape)} and {tuple(y.shape)}")
    gram = [features @ features.T for features in (_centred(x), _centred(y))]  # (N, N)
    if unbiased:
        gram = [matrix - matrix.diagonal().diag() for matrix in gram]
    product = _hsic_unbiased if unbiased else _frobenius
    scale = product(gram[0], gram[0]) * product(gram[1], gram[1])
    if not float(scale) > 0:
        return x.new_zeros((), dtype=torch.float64)
    return (product(gram[0], gram[1]) / scale.sqrt()).clamp(max=1.0)


def _centred(x: Tensor) -> Tensor:
    x = x.double()
    return x - x.mean(0)


def _frobenius(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum()


def _hsic_unbiased(one: Tensor, other: Tensor) -> Tensor:
    """Of two Gram matrices (N, N) with zero diagonals, Song et al. 2012, Eq. 5, times N (N − 3)."""
    n = len(one)
    rows = one.sum(0) @ other.sum(0)
    return (one * other).sum() + one.sum() * other.sum() / ((n - 1) * (n - 2)) - 2 * rows / (n - 2)


def similarity_matrix(x: Tensor, y: Tensor, *, centre: Tensor | None = None) -> Tensor:
    """Cosines between the rows of two representations of the same frames: (N, D), (M, D) → (N, M), in [-1, 1].

    Args:
        centre: (D,), taken off both before. All features of a model share a large part that says nothing about the
            frame, and hides what does.
    """
    if centre is not None:
        x, y = x - centre, y - centre
    return F.normalize(x.float(), dim=-1) @ F.normalize(y.float(), dim=-1).T


def swap_change(own: Tensor, swapped: Tensor) -> Tensor:
    """Mean absolute change of actions under other instructions.

    Args:
        own: (N, T, A), normalised chunks under the frames' own instruction.
        swapped: (I, N, T, A), under I others.

    Returns:
        (I,), one number per instruction; 0 where the policy does not hear it.
    """
    return (swapped - own).abs().flatten(1).mean(1)


# --- probe frames ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """Frames of one task on which every stage is looked at.

    Attributes:
        task: the task.
        samples: K frames, see `data.chunks.Samples`.
        episodes: numbers of the demonstrations they come from.
    """

    task: TaskEntry
    samples: Samples
    episodes: list[int]


def choose_episodes(
    recorded: Sequence[int], remembered: Sequence[int], count: int = PROBE_DEMONSTRATIONS
) -> list[int]:
    """The first `count` demonstrations that are not in the memory; fewer where there are no more.

    >>> choose_episodes([0, 1, 2, 3], remembered=[1])
    [0, 2]
    """
    return [episode for episode in sorted(set(recorded)) if episode not in set(remembered)][:count]


def spread_rows(available: int, wanted: int) -> NDArray[np.int64]:
    """Numbers of `wanted` rows, evenly spaced over `available`, first and last included; all if there are fewer.

    >>> spread_rows(9, 3).tolist(), spread_rows(2, 3).tolist()
    ([0, 4, 8], [0, 1])
    """
    return np.linspace(0, available - 1, min(wanted, available)).round().astype(np.int64)


def probe_frames(
    task: TaskEntry,
    policy: Policy,
    source: str | os.PathLike[str],
    memory: ReplayMemory,
    *,
    frames: int,
    episodes: int | None,
    **options: Any,
) -> Probe:
    """Evenly spaced frames of demonstrations of one task that are not in the memory.

    Args:
        policy: says how large the images are, which cameras are seen and how long a chunk is.
        source, options: of the demonstrations, as for `load_demonstrations`.
        frames: K, how many are wanted.
        episodes: how many demonstrations of the task the run used; None: all that are there.

    Raises:
        ValueError: too few demonstrations or frames.
    """
    recorded = load_demonstrations(os.fspath(source), [task.name], episodes=episodes, **options)
    number = np.array(recorded["episode_index"])
    kept: list[int] = []
    if memory.frames is not None:
        names, numbers = memory.frames["task"], memory.frames["episode_index"]
        kept = [number for name, number in zip(names, numbers, strict=True) if name == task.name]
    chosen = choose_episodes(number.tolist(), kept)
    if not chosen:
        raise ValueError(
            f"all {len(set(number.tolist()))} demonstrations of {task.name!r} are in the replay memory, and an "
            "analysis needs others; record more (--demonstrations) or remember fewer (--memory_trajectories)"
        )
    config = _model(policy).config
    dataset = ChunkDataset(
        recorded.select(np.flatnonzero(np.isin(number, chosen))),
        VLACollator(policy.processor, policy.normaliser, config).pipeline,
        chunk=config.num_actions_chunk if config.decoding == "parallel" else 1,
        cameras=[CAMERA_COLUMNS[camera] for camera in policy.cameras],
        cache_images=False,
    )
    rows = spread_rows(len(dataset), frames)
    if len(rows) < _FEWEST:
        raise ValueError(f"an analysis needs at least {_FEWEST} frames per task, got {len(rows)} of {task.name!r}")
    samples = dataset.__getitems__(rows)
    # As results.json has it: the text that the rollouts are told.
    return Probe(task, replace(samples, instructions=[task.instruction] * len(rows)), chosen)


def instruction_words(tokenizer: Any, instruction: str) -> slice:
    """Which of the prompt's tokens are the instruction's own, as columns of `Features.language`.

    The rest is the same in every prompt: what two prompts begin and end with.
    """
    ids, other = (list(tokenizer(build_prompt(text))["input_ids"]) for text in (instruction, _OTHER_TEXT))
    first, last = _common(ids, other), _common(ids[::-1], other[::-1])
    return slice(first - 1, len(ids) - last - 1)  # without BOS


_OTHER_TEXT = "0 9"


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    return next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


# --- one policy on the probe frames ----------------------------------------------------------------------------------


class Findings(NamedTuple):
    """What one policy makes of the probe frames of one task.

    Attributes:
        action: (K, D) float32, pooled action features.
        maps: (K, Nv) float32, affinity maps.
        change: instruction -> mean absolute change of the normalised actions when it is said instead.
        error: mean absolute difference of the normalised actions to the recorded ones.
    """

    action: Tensor
    maps: Tensor
    change: Mapping[str, float]
    error: float


def look_at(
    policy: Policy,
    probe: Probe,
    others: Sequence[str],
    *,
    tap_layer: int = -1,
    temperature: float = 0.1,
    batch_size: int = 16,
) -> Findings:
    """Run a policy on the probe frames of a task, told the truth and told other instructions.

    Args:
        others: instructions to swap in.
        tap_layer, temperature: as in training.
    """
    model, samples = _model(policy), probe.samples
    collator = VLACollator(policy.processor, policy.normaliser, model.config)
    device, dtype = policy.model.device, policy.model.dtype
    words = instruction_words(policy.processor.tokenizer, probe.task.instruction)
    action, maps = [], []
    with torch.inference_mode():
        for start in range(0, len(samples), batch_size):
            batch = {
                name: tensor.to(device, dtype if tensor.is_floating_point() else None)
                for name, tensor in collator(_rows(samples, slice(start, start + batch_size))).items()
            }
            with FeatureTap(model, tap_layer) as tap:
                roles = policy.model(**batch, return_logits=False).token_roles
            features = extract_features(tap.hidden, roles)
            mask = torch.zeros_like(features.language_mask)
            mask[:, words] = True
            action.append(features.action.float().cpu())
            maps.append(affinity_maps(features, mask, temperature=temperature).float().cpu())
    own = _chunks(policy, samples, probe.task.instruction, batch_size)
    change = {other: float(swap_change(own, _chunks(policy, samples, other, batch_size)[None])) for other in others}
    recorded = torch.from_numpy(policy.normaliser.normalise_actions(samples.actions))
    return Findings(torch.cat(action), torch.cat(maps), change, float((own - recorded).abs().mean()))


def _chunks(policy: Policy, samples: Samples, instruction: str, batch_size: int) -> Tensor:
    """Normalised actions (K, T, A) for all frames under one instruction, clipped as recorded ones are."""
    chunks = []
    for start in range(0, len(samples), batch_size):
        rows = slice(start, start + batch_size)
        images = [list(images.transpose(0, 2, 3, 1)) for images in samples.images[rows]]
        chunks.append(policy.act_batch(images, [instruction] * len(images), list(samples.states[rows])))
    return torch.from_numpy(policy.normaliser.normalise_actions(np.concatenate(chunks).astype(np.float32)))


def _rows(samples: Samples, rows: slice) -> Samples:
    return replace(
        samples,
        images=samples.images[rows],
        states=samples.states[rows],
        actions=samples.actions[rows],
        instructions=samples.instructions[rows],
    )


def _model(policy: Policy) -> Any:
    """Without PEFT's wrapper; its layers hold the adapter all the same."""
    return policy.model.get_base_model() if hasattr(policy.model, "get_base_model") else policy.model


# --- a whole run -----------------------------------------------------------------------------------------------------


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
    layer, temperature = int(config.get("tap_layer", -1)), float(config.get("temperature", 0.1))
    probes: dict[str, Probe] = {}
    found: dict[tuple[str, int], Findings] = {}
    for stage in range(tasks[0].learned_at, results.stages):
        policy = load(stage)
        seen = [task for task in tasks if task.learned_at <= stage]
        print(f"analysis: {f'stage {stage}' if stage else 'base'}, {len(seen)} tasks", flush=True)
        for task in seen:
            if task.name not in probes:
                probes[task.name] = probe_frames(
                    task, policy, source, memory, frames=frames, episodes=config.get("demonstrations"), **options
                )
            found[task.name, stage] = look_at(
                policy, probes[task.name], known_with(task, tasks), tap_layer=layer, temperature=temperature
            )
        images = _model(policy).config.num_images_in_input
        del policy  # one at a time in memory
    last = results.stages - 1
    shown = [task for task in tasks if task.learned_at < last][:SHOWN_TASKS]
    analysis = Analysis(
        **{name: getattr(results, name) for name in ("method", "stream", "suite", "seed", "base_model", "assets")},
        frames=frames,
        demonstrations=PROBE_DEMONSTRATIONS,
        tap_layer=layer,
        temperature=temperature,
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


def is_analysed(run_folder: str | os.PathLike[str]) -> bool:
    """Whether a run has an analysis of all stages that are evaluated.

    Raises:
        FileNotFoundError: no results.json.
        AnalysisError, ResultsError: a damaged file.
    """
    stages = Results.load(Path(run_folder) / "results.json").stages
    return (Path(run_folder) / FILE).exists() and Analysis.load(run_folder).stages == stages


def known_with(task: TaskEntry, tasks: Sequence[TaskEntry]) -> list[str]:
    """The other instructions that the policy knew when it learned a task.

    The same at every later stage, so that a change of the answer is the policy's and not the question's.
    """
    known = [other.instruction for other in tasks if other.learned_at <= task.learned_at]
    return [text for text in dict.fromkeys(known) if text != task.instruction]


def compare_analyses(
    run_folders: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str] | None = None
) -> Comparison:
    """Diffusion, CKA and listening over the stages, per method, mean over the old tasks.

    Args:
        run_folders: each with an analysis.json; runs of one method with several seeds are averaged.
        output: a PNG to draw.

    Raises:
        FileNotFoundError: a run is not analysed.
        ValueError: the runs differ in what makes numbers comparable.
    """
    comparison = compare([Analysis.load(folder) for folder in run_folders])
    if output is not None:
        draw_comparison(comparison, output)
    return comparison


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
