"""Demonstrations: how fast they become batches beside how fast a trainer takes them, and what it costs to open them.

The set is as large as ten tasks of LIBERO with fifty demonstrations each. *reading* decodes random frames out of
memory-mapped files and makes them the model's tensors, in one process; *training* is a step of plain LoRA fine-tuning
of the tiny model, the fastest taker there is here, on all of torch's threads. A set is opened in fresh processes:

    open_seconds_first        as it was recorded, its files not in the page cache
    open_seconds              again, its files in the page cache; up to the training samples made of it
    open_seconds_unprepared   with `--unprepared`: a set that came without its Arrow files; every episode is checked,
                              and they are made
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ..command_options import positive
from ..data.demonstrations import DemonstrationManifest, load_demonstrations
from .demonstration_set import write_demonstration_set
from .harness import Report, interleave
from .opening import evict, open_in_fresh_process, seconds_in_fresh_process
from .reading import reader, tiny_model, training_step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `infovla bench data`."""
    parser.add_argument("--demonstrations", metavar="FOLDER", help="recorded ones to open; made for it if not given")
    parser.add_argument("--tasks", type=positive, default=10, help="of the set that is made")
    parser.add_argument("--episodes", type=positive, default=50, help="of each task of it")
    parser.add_argument("--frames", type=positive, default=100, help="of each episode of it")
    parser.add_argument("--image_size", type=positive, default=128, help="side of its pictures; LIBERO's by default")
    parser.add_argument("--input_size", type=positive, default=224, help="side of the model's; OpenVLA's by default")
    parser.add_argument("--batch_size", type=positive, default=32, help="samples per batch")
    parser.add_argument("--repetitions", type=positive, default=5, help="rounds that count")
    parser.add_argument("--unprepared", action="store_true", help="open it without its Arrow files too; 20 s more")
    parser.add_argument("--temporary", metavar="FOLDER", help="where the set is made, 3.3 GB, and deleted again")


def run(options: argparse.Namespace) -> Report:
    """Measure."""
    made = options.demonstrations is None
    with tempfile.TemporaryDirectory(dir=options.temporary) if made else nullcontext(options.demonstrations) as name:
        folder = Path(name)
        if made:
            size = {key: getattr(options, key) for key in ("tasks", "episodes", "frames", "image_size")}
            write_demonstration_set(folder, **size)
        return _measure(folder, options)


def _measure(folder: Path, options: argparse.Namespace) -> Report:
    manifest = DemonstrationManifest.load(folder)
    episodes = [episode for task in manifest.tasks.values() for episode in task.episodes.values()]
    count = sum(episode.frames for episode in episodes)
    report = Report(f"data: {len(manifest.tasks)} tasks, {len(episodes)} episodes, {count} frames")
    report.note("tasks", len(manifest.tasks))
    report.note("episodes", len(episodes))
    report.note("frames", count)
    report.note("batch_size", options.batch_size)
    report.note("input_size", options.input_size)
    sizes = {"input_size": options.input_size, "batch_size": options.batch_size}
    evict(folder)
    report.add_figure("open_seconds_first", seconds_in_fresh_process(folder), "s")
    first = open_in_fresh_process(folder, **sizes)
    report.add_figure("open_seconds", first.seconds, "s")
    if options.unprepared:
        with tempfile.TemporaryDirectory(dir=options.temporary) as cache:
            report.add_figure("open_seconds_unprepared", seconds_in_fresh_process(folder, cache=Path(cache)), "s")
    report.add_figure("resident_bytes", first.resident, "B")
    report.add_figure("batch_bytes", first.batch, "B")
    report.add_ratio("resident_bytes_ratio_batch", first.resident, first.batch, at_most=1)
    _add_rates(report, folder, options)
    return report


def _add_rates(report: Report, folder: Path, options: argparse.Namespace) -> None:
    frames: Any = load_demonstrations(folder)
    read, rows = reader(frames, tiny_model(options.input_size)[1])
    step, random = training_step(options.input_size), np.random.default_rng(0)

    def draw() -> dict[str, Any]:
        return read(random.integers(0, rows, options.batch_size))

    batch = draw()
    seconds = interleave({"reading": draw, "training": lambda: step(batch)}, repetitions=options.repetitions)
    rates = {name: [options.batch_size / each for each in samples] for name, samples in seconds.items()}
    for name, samples in rates.items():
        report.add_figure(f"samples_per_second_{name}", samples, "1/s")
    report.add_ratio("samples_per_second_ratio_training", rates["reading"], rates["training"], at_least=3)
    report.add_figure("streamed_frames_per_second", _stream(folder, frames, options.batch_size), "1/s")


def _stream(folder: Path, frames: Any, count: int) -> float:
    """Frames per second of the stream, from its start.

    Raises:
        RuntimeError: they are not those of the mapped set.
    """
    start = time.perf_counter()
    streamed = list(islice(load_demonstrations(folder, streaming=True), count))
    rate = len(streamed) / (time.perf_counter() - start)
    for number, frame in enumerate(streamed):
        if frame != frames[number]:
            raise RuntimeError(f"frame {number} of the stream is not that of the mapped set")
    return rate
