"""What a training step costs: Info-VLA beside plain replay, beside plain fine-tuning, and beside the paper's wording.

Steps are those of Trainer's own loop, taken in turns by contestants with equal batches (see speed/training.py). Times
are CPU seconds of this process on a CPU, where another process would otherwise be measured too, and wall-clock
seconds on a GPU. Peak memory is what lives throughout (weights, optimiser, the bank of
anchors) and what one step adds to it.
"""

from __future__ import annotations

import argparse
import time

from ..command_options import positive
from .harness import Report, interleave
from .memory import add_loss_memory, add_training_memory
from .training import CONTESTANTS, MANY_TASKS, contest
from .training import add_arguments as _add_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `infovla bench train`."""
    _add_arguments(parser)
    parser.add_argument("--repetitions", type=positive, default=12, help="rounds that count")
    parser.add_argument("--clock", choices=("cpu", "wall"), help="of the step times; see above")


def run(options: argparse.Namespace) -> Report:
    """Time and memory of a training step."""
    cpu = (options.clock or ("wall" if options.device == "cuda" else "cpu")) == "cpu"
    report = Report(
        f"A training step of the {options.shape} model, {options.decoding}, batches of {options.batch_size}, "
        f"{'CPU' if cpu else 'wall-clock'} time"
    )
    for name in ("batch_size", "shape", "decoding", "device"):
        report.note(name, getattr(options, name))
    report.note("clock", "cpu" if cpu else "wall")
    with contest(list(CONTESTANTS), options) as trainings:
        seconds = interleave(
            {name: training.step for name, training in trainings.items()},
            repetitions=options.repetitions,
            clock=time.process_time if cpu else time.perf_counter,
        )
        for name, samples in seconds.items():
            report.add_figure(f"step_time_{name}", samples, "s")
        report.add_ratio("step_time_ratio_infovla_er", seconds["infovla"], seconds["er"], at_most=1.05)
        report.add_ratio("step_time_ratio_infovla_plain", seconds["infovla"], seconds["plain"])
        report.add_ratio("step_time_ratio_naive_infovla", seconds["naive"], seconds["infovla"], at_least=1.3)
        many, few = seconds[f"infovla_{MANY_TASKS}_tasks"], seconds["infovla"]
        report.add_ratio("step_time_ratio_100_tasks_2_tasks", many, few, at_most=1.05)
        add_training_memory(report, trainings, options)
    add_loss_memory(report, options)
    return report
