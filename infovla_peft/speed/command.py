"""`infovla bench NAME`: one benchmark of speed or memory, its table, and its JSON file."""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..command_options import CommandParser, HelpFormatter, add_config_option, apply_config, positive
from ..files import make_folder
from ..progress import quiet_libraries

BENCHMARKS: dict[str, str] = {
    "train": "time and memory of a training step, beside plain replay and the paper's wording",
    "memory": "memory of a training step alone",
    "act": "latency of an action, batched and beside decoding as the original does it",
    "rollout": "environment steps per second, beside the physics alone and a plain loop",
    "data": "samples per second beside a trainer's, seconds and memory to open demonstrations",
}
"""Name → one line of help. `speed/<name>.py` offers `add_arguments(parser)` and `run(options) -> Report`."""


def bench(argv: Sequence[str], *, prog: str = "infovla bench") -> None:
    """Run one benchmark: print its table and, with `--json FILE`, write what it found."""
    # Before torch is loaded: its profiler, which counts memory, would tell of its own doings on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    only = argv[0] if argv and argv[0] in BENCHMARKS else None
    parser = make_parser(prog, only=only)
    if only is not None:
        assert parser._subparsers is not None
        commands: Any = parser._subparsers._group_actions[0].choices
        apply_config(commands[only], argv[1:])
    options = parser.parse_args(argv)
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    if options.json:
        if Path(options.json).is_dir():
            raise ValueError(f"--json {options.json} is a folder; name a file")
        make_folder(Path(options.json).absolute().parent)  # fails now, not after the measurement
    quiet_libraries(loading_bars=False)
    report = importlib.import_module(f".{options.benchmark}", __package__).run(options)
    print(report.table())
    if options.json:
        report.write(options.json)
        print(f"written: {options.json}")


def make_parser(prog: str = "infovla bench", *, only: str | None = None) -> argparse.ArgumentParser:
    """The parser of `infovla bench`, with the options of one benchmark: the others need not be imported for it."""
    parser = CommandParser(
        prog=prog,
        description="Speed and memory of this package beside their references, interleaved in one process. "
        "To compare continual-learning methods, see recipes/benchmark.py.",
    )
    names = parser.add_subparsers(dest="benchmark", required=True, metavar="{" + ",".join(BENCHMARKS) + "}")
    for name, text in BENCHMARKS.items():
        if name != only:
            names.add_parser(name, help=text)
            continue
        module = importlib.import_module(f".{name}", __package__)
        added = names.add_parser(name, help=text, description=module.__doc__, formatter_class=_Help)
        add_config_option(added)
        added.add_argument("--json", metavar="FILE", help="write ratios, figures and the machine there")
        added.add_argument("--threads", type=positive, help="torch threads; torch's own choice if not given")
        module.add_arguments(added)
    return parser


class _Help(HelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass
