"""`infovla evaluate | act`: what a policy can do."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from .options import CAMERAS, EVALUATION_DEFAULTS, AddCommand, add_simulation, add_token, check_simulation


def _evaluate(options: argparse.Namespace) -> None:
    from ..evaluation import check_initial_states, evaluate, executed_steps
    from ..files import make_folder, write_json
    from ..metrics import wilson_interval
    from ..plan import worker_count
    from ..progress import quiet_libraries
    from ..results import collect_versions, source_commit
    from ..simulation import find_assets
    from ..simulation.workers import EnvironmentPool

    check_initial_states(options.episodes)
    check_simulation(options)
    if options.dry_run:
        from ..hub import describe_policy

        where = {name: getattr(options, name) for name in ("stage", "revision", "base", "unnorm_key", "token")}
        described = describe_policy(options.policy, **where)
        suite, planned = _tasks_to_evaluate(options, described.recipe, described.key, described.tasks)
        plural = "s" * (len(planned) != 1)
        print(f"{options.policy} on {suite}: {len(planned)} task{plural} x {options.episodes} rollouts")
        print("\n".join(f"  {task.name}" for task in planned))
        return
    quiet_libraries(loading_bars=True)
    policy = _policy(options)
    # What is not said on the command line is as it was in training.
    chosen = {
        **EVALUATION_DEFAULTS,
        **{key: policy.recipe[key] for key in EVALUATION_DEFAULTS if key in policy.recipe},
    }
    chosen |= {key: value for key, value in vars(options).items() if key in chosen and value is not None}
    learned = policy.tasks_after(options.stage)
    chosen["suite"], tasks = _tasks_to_evaluate(options, policy.recipe, policy.normaliser.key, learned)
    known = policy.recipe.get("assets_folder")
    # Of a published run the name of the folder is left, which says nothing about one that is called the same here.
    place_is_known = known and (Path(known).is_absolute() or Path(options.policy).is_dir()) and Path(known).is_dir()
    known = known if place_is_known else None
    assets = find_assets(chosen["assets"], options.assets_folder or known)
    chosen["open_loop_steps"] = executed_steps(policy, chosen["open_loop_steps"])
    output = Path(options.output) if options.output else None
    if output:
        make_folder(output)  # fails now, not after the first rollouts
    print(
        f"{options.policy} on {chosen['suite']}: {assets.name} assets, {chosen['renderer']} renderer, "
        f"{chosen['image_size']} px"
    )
    given = ("policy", "stage", "revision", "base", "unnorm_key", "dtype", "episodes")
    content: dict[str, Any] = {
        **{key: getattr(options, key) for key in given},
        "center_crop": policy.crop,
        **chosen,
        "assets": assets.name,
        "step_cap": tasks[0].max_steps if options.max_steps is None else options.max_steps,
        "versions": collect_versions(),
        "commit": source_commit(),
        "results": [],
    }
    with EnvironmentPool(
        worker_count(options.workers),
        assets=assets,
        image_size=chosen["image_size"],
        cameras=policy.cameras,
        renderer=chosen["renderer"],
    ) as pool:
        rollouts = (
            evaluate(
                policy,
                some,
                pool,
                episodes=options.episodes,
                open_loop_steps=chosen["open_loop_steps"],
                max_steps=options.max_steps,
                videos=options.videos if output else 0,
                video_folder=output / "videos" if output else None,
            )
            for some in _by_policy(policy, tasks, options.stage)
        )
        for result in chain.from_iterable(rollouts):
            low, high = wilson_interval(sum(result.successes), result.episodes)
            print(f"{result.rate:6.1%}  [{low:.0%}, {high:.0%}]  {result.task}", flush=True)
            content["results"].append(result.to_dict())
            if output:
                write_json(output / "evaluation.json", content)
    rates = [sum(row["successes"]) / len(row["successes"]) for row in content["results"]]
    print(f"{sum(rates) / len(rates):6.1%}  mean of {len(rates)} tasks")


def _tasks_to_evaluate(
    options: argparse.Namespace, recipe: Mapping[str, Any], key: str | None, learned: Sequence[str]
) -> tuple[str, list[Any]]:
    """The suite and the tasks that were named, or those that the policy has learned.

    A policy that does not name its suite says it by the key of its statistics, or not at all. Of a suite of which it
    has learned nothing these are all tasks.
    """
    from ..simulation import SUITES, find_task, suite_tasks

    data_set = (key or "").removesuffix("_no_noops")
    trained_on = recipe.get("suite") or (data_set if data_set in SUITES else None)
    suite = str(options.suite or trained_on or EVALUATION_DEFAULTS["suite"])
    known = learned if suite == trained_on else ()
    return suite, [find_task(suite, name) for name in options.tasks or known or range(len(suite_tasks(suite)))]


def _by_policy(policy: Any, tasks: Sequence[Any], stage: int | None) -> Iterator[Sequence[Any]]:
    """The tasks, each while the policy is the one that its run has measured on it; first those it has not learned.

    Of `single_task` that is the adapter of the task, of other methods the latest one, or that of `stage`.
    """
    from ..methods import METHODS

    method = METHODS.get(policy.recipe.get("method", ""))
    if stage is not None or method is None or method.policy != "own":
        yield tasks
        return
    if others := [task for task in tasks if task.name not in policy.tasks]:
        yield others
    for task in tasks:
        if task.name in policy.tasks:
            policy.use(task.name)
            yield [task]


def _act(options: argparse.Namespace) -> None:
    from ..progress import quiet_libraries

    quiet_libraries(loading_bars=False)
    policy = _policy(options, task=options.task)
    images = [_read_image(path) for path in options.images]
    if options.instruction is None and policy.instruction is None:
        raise ValueError(f"say what to do: --instruction TEXT, or --task, one of {', '.join(policy.tasks) or 'none'}")
    actions = policy.act(images, options.instruction, options.proprio)
    print(json.dumps([[round(float(value), 6) for value in action] for action in actions]))


def _read_image(path: str) -> Any:
    """RGB (height, width, 3) of an image file."""
    from PIL import Image

    from ..models.openvla.processing_openvla import rgb_pixels

    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no image file {path}; name one upright image per camera")
    try:
        with Image.open(path) as picture:
            picture.load()
    except PermissionError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL raises each of bad bytes
        raise ValueError(f"{path} cannot be read as an image ({error!s:.200}); give a PNG or JPEG file") from error
    try:
        return rgb_pixels(picture)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _policy(options: argparse.Namespace, task: str | None = None) -> Any:
    """The policy that the options of `add_policy` describe."""
    from ..hub import load_policy
    from ..models.openvla.quantization import quantization_config

    policy = load_policy(
        options.policy,
        task=task,
        stage=options.stage,
        revision=options.revision,
        base=options.base,
        unnorm_key=options.unnorm_key,
        cameras=options.cameras,
        device=options.device,
        dtype=options.dtype,
        quantization_config=quantization_config(options.quantization),
        token=options.token,
    )
    if options.center_crop is not None:
        policy.crop = options.center_crop
    return policy


def _add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", help="folder or Hub id of an adapter, a run or a checkpoint")
    parser.add_argument("--stage", type=int, help="the policy after this stage of a run; 0 is the base")
    parser.add_argument("--revision", help="branch, tag or commit of a repository; its main branch if not given")
    add_token(parser)
    parser.add_argument("--base", help="where the base is, if not where the adapter says")
    parser.add_argument("--unnorm_key", help="statistics to un-normalise with, for a checkpoint without adapter")
    parser.add_argument(
        "--cameras", nargs="+", choices=CAMERAS, help="of a checkpoint that does not say how many images it reads"
    )
    parser.add_argument("--device", default="cpu", help="where the policy runs")
    parser.add_argument("--dtype", help="of the weights, such as bfloat16; the base's own if not given")
    parser.add_argument(
        "--quantization",
        default="none",
        choices=("none", "nf4"),
        help="nf4: hold the base in 4 bits; one under whose 4-bit form the adapter was trained is held so anyway",
    )
    parser.add_argument(
        "--center_crop",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="show the central nine tenths of each image, for checkpoints trained with random crops (as trained)",
    )


def register(add: AddCommand) -> None:
    """Add `evaluate` and `act` to the parser."""
    evaluate = add("evaluate", "roll a policy out in LIBERO and count successes", _evaluate)
    _add_policy(evaluate)
    add_simulation(evaluate, trained=True)
    evaluate.add_argument("--episodes", type=int, default=20, help="rollouts per task, from the first of 50 states")
    evaluate.add_argument(
        "--open_loop_steps", type=int, help="actions executed of each chunk; as trained if not given"
    )
    evaluate.add_argument("--max_steps", type=int, help="step cap; the suite's own if not given")
    evaluate.add_argument("--videos", type=int, default=2, help="MP4s per task below --output, failures first")
    evaluate.add_argument("--output", help="folder for evaluation.json and videos; nothing is written if not given")
    evaluate.add_argument("--dry-run", action="store_true", help="say what would be rolled out, and stop")

    act = add("act", "print the actions for one observation, as JSON", _act)
    _add_policy(act)
    act.add_argument("--task", help="name or instruction of a learned task: its adapter is taken")
    act.add_argument("--images", nargs="+", required=True, help="one upright image per camera, in the policy's order")
    act.add_argument("--instruction", help="what to do; may be left out with --task")
    act.add_argument("--proprio", type=float, nargs="+", help="raw state: hand position, axis-angle, fingers")
