"""`infovla demos`: scripted demonstrations."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import CAMERAS, AddCommand, add_simulation, check_simulation


def _demos(options: argparse.Namespace) -> None:
    from ..data.demonstrations import load_demonstrations
    from ..data.lerobot_export import check_target, export_lerobot
    from ..data.recorded import count_recorded
    from ..data.recording import check_recording, record_demonstrations
    from ..plan import worker_count
    from ..progress import quiet_libraries
    from ..simulation import find_assets, find_task, suite_tasks

    quiet_libraries(loading_bars=False)
    check_simulation(options)
    if in_the_way := [place for place in (Path(options.folder), *Path(options.folder).parents) if place.is_file()]:
        raise NotADirectoryError(f"{in_the_way[0]} is a file; name a folder for the demonstrations")
    names = options.tasks or [task.name for task in suite_tasks(options.suite)]
    tasks = [find_task(options.suite, name) for name in names]
    if options.lerobot:
        check_target(Path(options.lerobot))
        if options.image_size % 2:
            raise ValueError(f"--lerobot writes videos, which need an even --image_size, not {options.image_size}")
        if Path(options.folder).resolve().is_relative_to(Path(options.lerobot).resolve()):
            raise ValueError(f"--lerobot would replace what is recorded in {options.folder}; name another folder")
    if options.dry_run:
        check_recording(options.episodes, worker_count(options.workers))
        recorded = count_recorded(options.folder)
        for task in tasks:
            print(f"{task.name}: {recorded.get(task.name, 0)} of {options.episodes} are there")
        return
    record_demonstrations(
        tasks,
        Path(options.folder),
        episodes=options.episodes,
        assets=find_assets(options.assets, options.assets_folder),
        image_size=options.image_size,
        cameras=options.cameras,
        renderer=options.renderer,
        noise=options.noise,
        seed=options.seed,
        num_workers=worker_count(options.workers),
    )
    if options.lerobot:
        frames = load_demonstrations(options.folder, [task.name for task in tasks], options.episodes, streaming=True)
        print(f"LeRobot data set: {export_lerobot(frames, options.lerobot)}")


def register(add: AddCommand) -> None:
    """Add `demos` to the parser."""
    demos = add("demos", "record scripted demonstrations on fresh layouts", _demos)
    demos.add_argument("folder", help="where they are kept; recording continues if some are there")
    add_simulation(demos)
    demos.add_argument("--cameras", nargs="+", default=["agentview"], choices=CAMERAS, help="what is recorded")
    demos.add_argument("--episodes", type=int, default=40, help="demonstrations per task")
    demos.add_argument("--noise", type=float, default=0.1, help="noise on the executed, not on the recorded, actions")
    demos.add_argument("--seed", type=int, default=0, help="of layouts and noise")

    demos.add_argument("--lerobot", metavar="FOLDER", help="also write them as a LeRobot data set v3")
    demos.add_argument("--dry-run", action="store_true", help="say what is there and what is missing, and stop")
