"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, Protocol

from ..option_checks import check_at_least

CAMERAS = ("agentview", "robot0_eye_in_hand")
EVALUATION_DEFAULTS = {
    "suite": "libero_goal", "assets": "auto", "renderer": "fast", "image_size": 128, "open_loop_steps": 8,
}  # fmt: skip
"""Of a policy that does not say how it was trained."""


_LOWEST = {"image_size": 1, "workers": 0, "open_loop_steps": 1, "max_steps": 1, "videos": 0, "noise": 0}


class AddCommand(Protocol):
    """Adds a command: its name, what it does, and the function that does it and returns the exit code."""

    def __call__(
        self, name: str, help: str, run: Callable[[argparse.Namespace], int | None], /
    ) -> argparse.ArgumentParser:
        """Its parser, for its options."""


def add_token(parser: argparse.ArgumentParser) -> None:
    """For what asks the Hub."""
    parser.add_argument("--token", help="of the Hub; HF_TOKEN or that of `hf auth login` if not given")


def add_simulation(parser: argparse.ArgumentParser, *, trained: bool = False) -> None:
    """For what simulates; `trained`: what is not said is as the policy was trained."""
    default: dict[str, Any] = {} if trained else EVALUATION_DEFAULTS

    def note(name: str) -> str:
        return f"; as trained if not given, {EVALUATION_DEFAULTS[name]} if that is not known" if trained else ""

    parser.add_argument("--suite", default=default.get("suite"), help=f"LIBERO suite{note('suite')}")
    default_tasks = "those that the policy has learned, or else all of the suite," if trained else "all of the suite"
    parser.add_argument("--tasks", nargs="+", help=f"by number or name; {default_tasks} if not given")
    sets = ("auto", "official", "primitive")
    parser.add_argument("--assets", default=default.get("assets"), choices=sets, help=f"asset set{note('assets')}")
    parser.add_argument("--assets_folder", help="folder of the official assets")
    renderers = ("fast", "exact")
    parser.add_argument(
        "--renderer",
        default=default.get("renderer"),
        choices=renderers,
        help=f"exact: LIBERO's own pictures{note('renderer')}",
    )
    size = default.get("image_size")
    parser.add_argument(
        "--image_size",
        type=int,
        default=size,
        help=f"side of the rendered images in pixels{note('image_size')}",
    )
    parser.add_argument("--workers", type=int, default=0, help="simulation processes; 0 = one per core")


def check_simulation(options: argparse.Namespace) -> None:
    """Raise a ValueError that names an option below its lowest value, before a plan is printed or a policy loaded."""
    for name, lowest in _LOWEST.items():
        if getattr(options, name, None) is not None:
            check_at_least(options, lowest, name)
