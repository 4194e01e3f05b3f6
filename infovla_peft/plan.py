"""What a stream will do, in which stages, and about how long it takes."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .config import InfoVLAConfig, StreamConfig
from .costs import UTILISATION, Shape, openvla_7b, shape_of
from .data.recorded import count_recorded
from .data.rows import DemonstrationError
from .methods import METHODS
from .models.openvla import OpenVLAConfig, OpenVLAForActionPrediction, build_tiny_openvla
from .results import Results

if TYPE_CHECKING:
    from .simulation import AssetSet, Task

SECONDS_PER_DEMONSTRATION, SECONDS_PER_ROLLOUT, SECONDS_PER_ENVIRONMENT = 4.0, 2.0, 3.0
"""On one core of 2020, 128 px, primitive assets; the plan's only guesses about the simulator."""


@dataclass(frozen=True)
class Stage:
    """One step of the stream.

    Attributes:
        index: 0 = base.
        tasks: what is learned in it; empty only for a base that is a checkpoint and learns nothing here.
    """

    index: int
    tasks: tuple[Task, ...]

    @property
    def name(self) -> str:
        """Name of its folder below adapters/: stage_01_put_the_bowl_on_the_plate."""
        if self.index == 0:
            return "base"
        more = f"_and_{len(self.tasks) - 1}_more" if len(self.tasks) > 1 else ""
        return f"stage_{self.index:02d}_{self.tasks[0].name}{more}"


def plan_stages(config: StreamConfig) -> list[Stage]:
    """The base stage and the steps after it.

    Raises:
        ValueError: the suite has fewer tasks than the stream needs, or `tasks` names an unknown one or one twice.
    """
    from .simulation import find_task, suite_tasks

    shape = config.shape
    known = suite_tasks(config.suite)
    if config.tasks is None and shape.total_tasks > len(known):
        raise ValueError(
            f"stream {config.stream} needs {shape.total_tasks} tasks, but {config.suite} has {len(known)}"
        )
    tasks = [find_task(config.suite, task) for task in config.tasks or range(shape.total_tasks)]
    if len({task.index for task in tasks}) != len(tasks):
        raise ValueError(f"`tasks` names a task of {config.suite} twice: {[task.name for task in tasks]}")
    step = shape.tasks_per_step
    starts = range(shape.base_tasks, shape.total_tasks, step)
    return [
        Stage(0, tuple(tasks[: shape.base_tasks])),
        *(Stage(number, tuple(tasks[first : first + step])) for number, first in enumerate(starts, start=1)),
    ]


def step_name(what: str, stage: Stage) -> str:
    """Under which a step of a stage is entered in state.json."""
    return f"{what}_{stage.index:02d}"


def worker_count(wanted: int, *, shared: bool = False) -> int:
    """Worker processes to use: `wanted`, or one per core that this process may use.

    Args:
        shared: all processes of a launch on this machine do so at once, and these are divided among them.

    Raises:
        ValueError: `wanted` is negative.
    """
    if wanted < 0:
        raise ValueError(f"workers must be at least 0 (one per core), got {wanted}")
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if shared else 1
    return max(1, (wanted or len(os.sched_getaffinity(0))) // processes)


def describe_plan(
    config: StreamConfig,
    training: InfoVLAConfig,
    stages: Sequence[Stage],
    assets: AssetSet,
    state: Mapping[str, Any],
    demonstrations: Path,
) -> str:
    """The plan as it is printed before the start: stages, tasks, steps, rollouts, and an estimate of the time left.

    Args:
        state: the finished steps.
        demonstrations: the folder that they are recorded into, in which some may be.
    """
    tiny = config.base_model == "tiny"
    tasks = sum(len(stage.tasks) for stage in stages)
    recording = 0.0
    if "demonstrations" not in state and config.demonstrations_source is None:
        each = SECONDS_PER_DEMONSTRATION / worker_count(config.demonstration_workers)
        missing = _missing(demonstrations, config.demonstrations, stages)
        recording = sum(count * each + SECONDS_PER_ENVIRONMENT for count in missing if count)
    terms = ", ".join(METHODS[training.method].terms)
    lines = [
        f"{config.stream} on {config.suite}: {training.method}"
        + (f" ({terms}; teacher {training.teacher})" if terms else "")
        + f", base {config.base_model}, seed {training.seed}",
        f"  simulation    {assets.name} assets, {config.renderer} renderer, {config.image_size} px, "
        + ", ".join(config.cameras),
        f"  demonstrations  {tasks} tasks x {config.demonstrations}, "
        + (f"from {config.demonstrations_source}" if config.demonstrations_source else _about(recording)),
    ]
    total = recording
    step_seconds = measure_step(config, training)
    for stage in stages:
        names = ", ".join(task.instruction for task in stage.tasks) or "nothing: the checkpoint as it is"
        seen = sum(len(earlier.tasks) for earlier in stages[: stage.index + 1])
        learns = stage.index > 0 or tiny
        steps = config.stage_steps if stage.index else config.base_steps
        batch = training.per_device_train_batch_size if stage.index else config.base_batch_size
        episodes = config.episodes(stage.index)
        seconds = 0.0
        if learns and ("base" if stage.index == 0 else step_name("learn", stage)) not in state:
            seconds += steps * batch * training.gradient_accumulation_steps * step_seconds
        if step_name("measure", stage) not in state:
            simulators = worker_count(config.eval_workers)
            seconds += seen * (episodes * SECONDS_PER_ROLLOUT / simulators + SECONDS_PER_ENVIRONMENT)
        total += seconds
        what = f"{steps} steps, " if learns else ""
        lines.append(
            f"  {f'stage {stage.index}' if stage.index else 'base':<14}{names}\n"
            f"{'':16}{what}{seen} x {episodes} rollouts, {_about(seconds)}"
        )
    if training.push_to_hub:
        where = training.hub_model_id or Path(str(training.output_dir)).resolve().name
        branch = f", branch {training.hub_revision}" if training.hub_revision else ""
        lines.append(
            f"  published     on the Hub after every stage: {where}{branch}"
            + ", private" * (training.hub_private_repo is True)
        )
    return "\n".join([*lines, f"  together      {_about(total)} from now; results in {training.output_dir}"])


def describe_results(results: Results) -> str:
    """The success matrix in per cent, a task per line and a stage per column, and the metrics."""
    header = [
        f"{'success in %':<60}",
        *(f"{f'stage {stage}' if stage else 'base':>9}" for stage in range(results.stages)),
    ]
    lines = ["".join(header)]
    for task, row in zip(results.tasks, results.success, strict=True):
        cells = ["-" if math.isnan(rate) else f"{100 * rate:.0f}" for rate in row]
        lines.append(f"{task.instruction:<60}" + "".join(f"{cell:>9}" for cell in cells))
    known = {name: value for name, value in results.metrics().items() if not math.isnan(value)}
    lines.append(", ".join(f"{name.replace('_', ' ')} {100 * value:.1f}" for name, value in known.items()))
    return "\n".join(lines)


def measure_step(config: StreamConfig, training: InfoVLAConfig) -> float:
    """About how many seconds a training step takes per sample of its batch: tried on the tiny base, else reckoned."""
    if config.base_model != "tiny":
        # Forward, and backward through frozen weights to the inputs.
        shape = _shape(Path(config.base_model))
        return 4 * shape.parameters * shape.tokens / (UTILISATION["bf16"] * _throughput(training.device))
    model, processor = build_tiny_openvla(instructions=["plan"], num_images=len(config.cameras), **tiny_shape(config))
    model.to(training.device)  # type: ignore[arg-type]
    batch = min(config.base_batch_size, 16)
    side = config.tiny_image_size
    inputs = {
        **processor.tokenizer(["put the bowl on the plate " * 4] * batch, return_tensors="pt"),
        "pixel_values": torch.zeros(batch, 3 * len(config.cameras), side, side),
        "proprio": torch.zeros(batch, model.config.proprio_dim),
        "actions": torch.zeros(batch, model.config.num_actions_chunk, model.config.action_dim),
    }
    inputs = {name: tensor.to(training.device) for name, tensor in inputs.items()}
    seconds = []
    for _ in range(4):  # the first one also warms up, and one of the others may be interrupted
        start = time.monotonic()
        model(**inputs).loss.backward()
        seconds.append(time.monotonic() - start)
    return min(seconds) / batch


def tiny_shape(config: StreamConfig) -> dict[str, Any]:
    """The sizes of a tiny base as `build_tiny_openvla` takes them."""
    names = ("image_size", "patch_size", "vision_width", "vision_depth", "hidden_size", "layers", "heads")
    return {name: getattr(config, f"tiny_{name}") for name in names}


def _missing(folder: Path, wanted: int, stages: Sequence[Stage]) -> list[int]:
    """How many demonstrations of each task are still to be recorded."""
    recorded: dict[str, int] = {}
    with suppress(DemonstrationError):  # a damaged folder is named when it is recorded into
        recorded = count_recorded(folder)
    return [max(0, wanted - recorded.get(task.name, 0)) for stage in stages for task in stage.tasks]


def _shape(folder: Path) -> Shape:
    """Of a checkpoint, by its configuration; of OpenVLA 7B if it is not here yet."""
    if not (folder / "config.json").is_file():
        return openvla_7b()
    with torch.device("meta"):
        return shape_of(OpenVLAForActionPrediction(OpenVLAConfig.from_pretrained(folder)))


def _throughput(device: torch.device) -> float:
    """Floating-point operations per second of a matrix product, as weights of 7 G parameters would be held."""
    side = 4096 if device.type == "cuda" else 768
    matrix = torch.ones(side, side, device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    for _ in range(2):
        start = time.monotonic()
        float((matrix @ matrix)[0, 0])  # waits for the device
    return float(2 * side**3 / (time.monotonic() - start))


def _about(seconds: float) -> str:
    if seconds <= 0:
        return "finished"
    if seconds < 90:
        return f"about {seconds:.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
