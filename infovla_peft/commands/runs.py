"""`infovla report | verify | analyse`: what a run has left."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import AddCommand


def _report(options: argparse.Namespace) -> None:
    from ..report import write_report

    print(write_report(options.run))


def _verify(options: argparse.Namespace) -> int:
    from ..verify import verify_run

    found = verify_run(options.run)
    print(found.describe())
    return 0 if found.ok else 1


def _analyse(options: argparse.Namespace) -> None:
    from ..analysis import analyse_run, compare_analyses, is_analysed
    from ..figures import figure_format
    from ..progress import quiet_libraries

    if options.output:
        figure_format(options.output)  # fails now, not after hours of looking
    quiet_libraries(loading_bars=False)
    named = [_named(run) for run in options.runs]
    names, runs = [name for name, _ in named], [run for _, run in named]
    for run in runs:
        if options.again or not is_analysed(run, frames=options.frames):
            analyse_run(
                run,
                frames=options.frames,
                demonstrations=options.demonstrations_folder,
                device=options.device,
            )
    comparison = compare_analyses(runs, options.output, names=names)
    print(comparison.table())
    for report in (Path(run) / "report" / "index.html" for run in runs):
        if report.exists():
            print(f"report: {report}")
    for figure in comparison.figures:
        print(f"figure: {figure}")


def _named(run: str) -> tuple[str | None, str]:
    """`name=folder` in its parts; a folder that is there may have the sign in its own name."""
    name, sign, folder = run.partition("=")
    return (name, folder) if sign and name and "/" not in name and not Path(run).exists() else (None, run)


def register(add: AddCommand) -> None:
    """Add `report`, `verify` and `analyse` to the parser."""
    report = add("report", "draw the figures and the page of a run again", _report)
    report.add_argument("run", help="folder of a run")

    verify = add("verify", "check every file of a run; the exit code is 1 if one is damaged", _verify)
    verify.add_argument("run", metavar="RUN_DIR", help="folder of a run")

    analyse = add("analyse", "show what the stages of runs have kept, and compare the runs", _analyse)
    analyse.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN",
        help="folder of a run, of which analysis.json alone is enough; variants of one method need names",
    )
    analyse.add_argument(
        "--output",
        help="figure of the comparison, .png, .pdf or .svg, and beside it …_affinity and …_similarity; "
        "none if not given",
    )
    analyse.add_argument("--frames", type=int, default=32, help="probe frames per task")
    analyse.add_argument("--demonstrations_folder", help="where they are; where the run says if not given")
    analyse.add_argument("--device", default="cpu", help="where the policies run")
    analyse.add_argument("--again", action="store_true", help="also analyse runs that are analysed already")
