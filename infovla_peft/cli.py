"""`infovla <command>`: train, evaluate, analyse, demos, report, verify, act, push, list, cp, bench, doctor, ..."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from . import __version__
from .command_options import CommandParser, add_config_option, apply_config, find_config
from .interruption import Stopped, stop_signals

CAMERAS = ("agentview", "robot0_eye_in_hand")
EVALUATION_DEFAULTS = {
    "suite": "libero_goal", "assets": "auto", "renderer": "fast", "image_size": 128, "open_loop_steps": 8,
}  # fmt: skip
"""Of a policy that does not say how it was trained."""


_DISK_FULL = ("No space left on device", "PytorchStreamWriter failed", "inline_container.cc")  # torch names no reason


def explain(error: BaseException) -> str:
    """What went wrong and what to do; the error's own words where they say it."""
    text = str(error).strip() or type(error).__name__
    if getattr(error, "errno", None) == errno.ENOSPC or any(words in text for words in _DISK_FULL):
        return (
            f"the disk is full ({text.splitlines()[0]}); free some space and give the same command again. "
            "What was finished before is kept"
        )
    number = getattr(error, "errno", None)
    if number == errno.EIO:
        return (
            f"the disk fails ({text.splitlines()[0]}); check it. What was finished before is kept: "
            "`infovla verify RUN_DIR` says whether it is whole"
        )
    if isinstance(error, PermissionError) or number == errno.EROFS:
        where = getattr(error, "filename", None) or text
        return f"no permission to write {where}; choose another folder (--output_dir), or get the permission"
    if isinstance(error, KeyError):  # whose text is the repr of its message
        return str(error.args[0]) if error.args else text
    return text


def run_command(command: Callable[[], int | None]) -> int:
    """Run a command; errors become one message on stderr and a non-zero exit code (INFOVLA_DEBUG=1: a traceback).

    Returns:
        0, what `command` returned, 1 after an error, 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        with stop_signals():
            return command() or 0
    except Stopped as stop:
        _close_bars()
        saved = f"; saved {stop.saved}" if stop.saved else ""
        name = "Ctrl-C" if stop.number == signal.SIGINT else signal.Signals(stop.number).name
        print(f"\ninfovla: stopped by {name}{saved}; the same command continues", file=sys.stderr)
        return stop.exit_code
    except KeyboardInterrupt:
        print("\ninfovla: stopped; the same command continues", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        _close_bars()
        if os.environ.get("INFOVLA_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        known = isinstance(error, (OSError, ValueError, RuntimeError, KeyError, ImportError))
        what = explain(error) if known else f"{type(error).__name__}: {explain(error)} (INFOVLA_DEBUG=1 shows more)"
        print(f"infovla: error: {what}", file=sys.stderr)
        return 1


def _close_bars() -> None:
    # So that the message begins on a line of its own.
    if "tqdm" in sys.modules:
        from tqdm import tqdm

        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()


_DRY_RUN = (
    "The recipe may be named as --config RECIPE.yaml, too. With --dry-run the plan is printed: stages, tasks, steps, "
    "rollouts, about how long; and nothing is written."
)


def train(argv: Sequence[str], *, prog: str = "infovla train") -> None:
    """The main job, from a recipe and its overrides."""
    from .config import load_recipe
    from .progress import quiet_libraries
    from .stream import Stream

    dry_run = bool({"--dry-run", "--dry_run"} & set(argv))  # no field of a recipe: it is not kept with the run
    argv = [argument for argument in argv if argument not in ("--dry-run", "--dry_run")]
    recipe, overrides = split_recipe(argv, prog)
    config, training = load_recipe(
        recipe, overrides, prog=f"{prog} [RECIPE.yaml]", description=f"{train.__doc__}\n\n{_DRY_RUN}"
    )
    quiet_libraries(loading_bars=config.base_model != "tiny")
    if dry_run:
        print(Stream(config, training).plan())
        return
    with Stream(config, training) as stream:
        if stream.run_folder.main_process:
            print(stream.plan(), flush=True)
        stream.run()
        if stream.run_folder.main_process:
            print(stream.summary())


def split_recipe(argv: Sequence[str], prog: str) -> tuple[Path | None, list[str]]:
    """The recipe's path, if the arguments begin with one or name it as `--config`, and the options.

    Raises:
        ValueError: neither a recipe nor an option was given, or two recipes.
    """
    if not argv:
        raise ValueError(f"say what to do: {prog} RECIPE.yaml [--option value ...]; --help explains every option")
    named, others = find_config(argv)
    if not others or others[0].startswith("-"):
        return named, others
    if named is not None:
        raise ValueError(f"two recipes, {others[0]} and --config {named}; give one, and its changes as options")
    return Path(others[0]), others[1:]


def _evaluate(options: argparse.Namespace) -> None:
    from .evaluation import check_episodes, evaluate
    from .files import write_json
    from .metrics import wilson_interval
    from .plan import workers
    from .progress import quiet_libraries
    from .results import collect_versions, source_commit
    from .simulation import find_assets
    from .simulation.workers import EnvironmentPool

    check_episodes(options.episodes)
    if options.dry_run:
        from .hub import describe_policy

        where = {name: getattr(options, name) for name in ("stage", "revision", "base", "token")}
        described = describe_policy(options.policy, **where)
        suite = str(options.suite or described.recipe.get("suite") or EVALUATION_DEFAULTS["suite"])
        planned = _tasks_to_evaluate(options, suite, described.recipe, described.tasks)
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
    tasks = _tasks_to_evaluate(options, chosen["suite"], policy.recipe, policy.tasks_after(options.stage))
    assets = find_assets(chosen["assets"], options.assets_folder)
    output = Path(options.output) if options.output else None
    print(f"{options.policy} on {chosen['suite']}: {assets.name} assets, {chosen['renderer']} renderer")
    given = ("policy", "stage", "revision", "base", "unnorm_key", "dtype", "episodes")
    content: dict[str, Any] = {
        **{key: getattr(options, key) for key in given},
        "center_crop": policy.crop,
        **chosen,
        "assets": assets.name,
        "step_cap": options.max_steps or tasks[0].max_steps,
        "versions": collect_versions(),
        "commit": source_commit(),
        "results": [],
    }
    with EnvironmentPool(
        workers(options.workers),
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
    options: argparse.Namespace, suite: str, recipe: Mapping[str, Any], learned: Sequence[str]
) -> list[Any]:
    """Those that were named, or that the policy has learned; all of a suite of which it has learned nothing."""
    from .simulation import find_task, suite_tasks

    known = learned if recipe.get("suite") == suite else ()
    return [find_task(suite, name) for name in options.tasks or known or range(len(suite_tasks(suite)))]


def _by_policy(policy: Any, tasks: Sequence[Any], stage: int | None) -> Iterator[Sequence[Any]]:
    """The tasks, each while the policy is the one that its run has measured on it; first those it has not learned.

    Of `single_task` that is the adapter of the task, of other methods the latest one.
    """
    from .methods import METHODS

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


def _demos(options: argparse.Namespace) -> None:
    from .data.demonstrations import DemonstrationManifest, load_demonstrations
    from .data.lerobot_export import check_target, export_lerobot
    from .data.recording import check_episodes, record_demonstrations
    from .plan import workers
    from .progress import quiet_libraries
    from .simulation import find_assets, find_task, suite_tasks

    quiet_libraries(loading_bars=False)
    names = options.tasks or [task.name for task in suite_tasks(options.suite)]
    tasks = [find_task(options.suite, name) for name in names]
    if options.lerobot:
        check_target(Path(options.lerobot))
        if options.image_size % 2:
            raise ValueError(f"--lerobot writes videos, which need an even --image_size, not {options.image_size}")
        if Path(options.folder).resolve().is_relative_to(Path(options.lerobot).resolve()):
            raise ValueError(f"--lerobot would replace what is recorded in {options.folder}; name another folder")
    if options.dry_run:
        check_episodes(options.episodes, workers(options.workers))
        try:
            recorded = DemonstrationManifest.load(options.folder).tasks
        except FileNotFoundError:
            recorded = {}
        for task in tasks:
            there = len(recorded[task.name].episodes) if task.name in recorded else 0
            print(f"{task.name}: {there} of {options.episodes} are there")
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
        num_workers=workers(options.workers),
    )
    if options.lerobot:
        frames = load_demonstrations(options.folder, [task.name for task in tasks], options.episodes, streaming=True)
        print(f"LeRobot data set: {export_lerobot(frames, options.lerobot)}")


def _cp(options: argparse.Namespace) -> None:
    from .recipe_files import copy_recipe, list_recipes

    if options.name is None:
        print("\n".join(list_recipes()))
    else:
        print(copy_recipe(options.name, options.target, overwrite=options.force))


def _docs(options: argparse.Namespace) -> None:
    from .documentation import render_documentation

    print(render_documentation(options.folder))


def _report(options: argparse.Namespace) -> None:
    from .report import write_report

    print(write_report(options.run))


def _verify(options: argparse.Namespace) -> int:
    from .verify import verify_run

    found = verify_run(options.run)
    print(found.describe())
    return 0 if found.ok else 1


def _analyse(options: argparse.Namespace) -> None:
    from .analysis import analyse_run, compare_analyses, is_analysed
    from .progress import quiet_libraries

    quiet_libraries(loading_bars=False)
    for run in options.runs:
        if options.again or not is_analysed(run):
            analyse_run(
                run,
                frames=options.frames,
                demonstrations=options.demonstrations_folder,
                device=options.device,
            )
    print(compare_analyses(options.runs, options.output).table())
    print("\n".join(f"report: {Path(run) / 'report' / 'index.html'}" for run in options.runs))
    if options.output:
        print(f"figure: {options.output}")


def _act(options: argparse.Namespace) -> None:
    import numpy as np
    from PIL import Image

    from .progress import quiet_libraries

    quiet_libraries(loading_bars=False)
    policy = _policy(options, task=options.task)
    images = [np.asarray(Image.open(path).convert("RGB")) for path in options.images]
    actions = policy.act(images, options.instruction, options.proprio)
    print(json.dumps([[round(float(value), 6) for value in action] for action in actions]))


def _policy(options: argparse.Namespace, task: str | None = None) -> Any:
    """The policy that the options of `_add_policy` describe."""
    from .hub import load_policy
    from .models.openvla.quantization import quantization_config

    policy = load_policy(
        options.policy,
        task=task,
        stage=options.stage,
        revision=options.revision,
        base=options.base,
        unnorm_key=options.unnorm_key,
        device=options.device,
        dtype=options.dtype,
        quantization_config=quantization_config(options.quantization),
        token=options.token,
    )
    if options.center_crop is not None:
        policy.crop = options.center_crop
    return policy


def _bench(argv: Sequence[str]) -> None:
    from .speed.command import bench

    bench(argv)


def _push(options: argparse.Namespace) -> None:
    import tempfile

    from .progress import quiet_libraries
    from .publishing import base_files, prepare, push_to_hub
    from .remote import check_repo_id

    quiet_libraries(loading_bars=True)
    message, base_repo = options.commit_message, options.base_repo
    if options.dry_run:
        check_repo_id(options.repo)
        with tempfile.TemporaryDirectory() as workspace:
            base, lines = None, []
            if base_repo is not None:
                check_repo_id(base_repo)
                files, base = base_files(options.run, options.repo, base_repo), (base_repo, "")
                size = sum(file.stat().st_size for file in files.values())
                lines = [f"to {base_repo}: the base, {size:,} bytes in {len(files)} files, one commit"]
            planned = prepare(options.run, options.repo, Path(workspace), base=base, message=message).describe()
        made = {None: "", True: ", private", False: ", public if it is new"}[options.private]
        print("\n".join([*lines, f"to {options.repo}, branch {options.revision or 'main'}{made}:", planned]))
        return
    done = push_to_hub(
        options.run,
        options.repo,
        private=options.private,
        revision=options.revision,
        commit_message=message,
        base_repo=base_repo,
        license=options.license,
        token=options.token,
    )
    print(f"{done.url}: {f'commit {done.commit}' if done.changed else 'everything was there already'}")


def _list(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from .hub import list_adapters
    from .progress import quiet_libraries

    quiet_libraries(loading_bars=False)
    found = list_adapters(options.repo, revision=options.revision, token=options.token)
    if options.json:
        print(json.dumps([asdict(adapter) for adapter in found], indent=2))
        return
    for adapter in found:
        print(f"{adapter.folder}: stage {adapter.stage}, base {adapter.base_model}")
        for task in adapter.tasks:
            reached = adapter.success.get(task)
            print(f"  {task}: {f'{reached[0]} of {reached[1]}' if reached else 'not measured'}")
    if not found:
        raise ValueError(f"{options.repo} holds no adapter")


def _doctor(_options: argparse.Namespace) -> int:
    from .simulation.installation import doctor

    checks = doctor()
    for check in checks:
        print(f"{'ok  ' if check.ok else 'FAIL'}  {check.name}: {check.detail}")
        if check.cure and not check.ok:
            print(f"      cure: {check.cure}")
    return 0 if all(check.ok for check in checks) else 1


def _setup_libero(_options: argparse.Namespace) -> None:
    from .simulation.installation import setup_libero

    setup_libero()


def make_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = CommandParser(
        prog="infovla", description="Teach a vision-language-action model new robot skills one after another."
    )
    parser.add_argument("--version", action="version", version=f"infovla-peft {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, help: str, run: Callable[[argparse.Namespace], int | None]) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name, help=help, description=help, formatter_class=argparse.ArgumentDefaultsHelpFormatter
        )
        added.set_defaults(handler=run)
        add_config_option(added)
        return added

    # `train` takes the recipe's options, which only `load_recipe` knows, `bench` has commands of its own; see `main`.
    commands.add_parser("train", help="learn a stream of tasks: infovla train RECIPE.yaml [--option value ...]")
    commands.add_parser("bench", help="measure speed and memory beside their references: infovla bench NAME")

    evaluate = command("evaluate", "roll a policy out in LIBERO and count successes", _evaluate)
    _add_policy(evaluate)
    _add_simulation(evaluate, trained=True)
    evaluate.add_argument("--episodes", type=int, default=20, help="rollouts per task, from the first of 50 states")
    evaluate.add_argument(
        "--open_loop_steps", type=int, help="actions executed of each chunk; as trained if not given"
    )
    evaluate.add_argument("--max_steps", type=int, help="step cap; the suite's own if not given")
    evaluate.add_argument("--videos", type=int, default=2, help="MP4s per task below --output, failures first")
    evaluate.add_argument("--output", help="folder for evaluation.json and videos")
    evaluate.add_argument("--dry-run", action="store_true", help="say what would be rolled out, and stop")

    demos = command("demos", "record scripted demonstrations on fresh layouts", _demos)
    demos.add_argument("folder", help="where they are kept; recording continues if some are there")
    _add_simulation(demos)
    demos.add_argument("--cameras", nargs="+", default=["agentview"], choices=CAMERAS, help="what is recorded")
    demos.add_argument("--episodes", type=int, default=40, help="demonstrations per task")
    demos.add_argument("--noise", type=float, default=0.1, help="noise on the executed, not on the recorded, actions")
    demos.add_argument("--seed", type=int, default=0, help="of layouts and noise")

    demos.add_argument("--lerobot", metavar="FOLDER", help="also write them as a LeRobot data set v3")
    demos.add_argument("--dry-run", action="store_true", help="say what is there and what is missing, and stop")

    cp = command("cp", "copy a recipe, to read and to change; without a name: list them", _cp)
    cp.add_argument("name", nargs="?", help="such as continual (the loop), quickstart.yaml, libero_goal_b5_5n1")
    cp.add_argument("target", nargs="?", default=".", help="folder, or name of the copy")
    cp.add_argument("--force", action="store_true", help="replace a file that is there")

    docs = command("docs", "render the docstrings of all modules as web pages", _docs)
    docs.add_argument("folder", nargs="?", default="site", help="where the pages go")

    report = command("report", "draw the figures and the page of a run again", _report)
    report.add_argument("run", help="folder of a run")

    verify = command("verify", "check every file of a run; the exit code is 1 if one is damaged", _verify)
    verify.add_argument("run", metavar="RUN_DIR", help="folder of a run")

    analyse = command("analyse", "show what the stages of runs have kept, and compare the runs", _analyse)
    analyse.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    analyse.add_argument("--output", help="PNG of the comparison")
    analyse.add_argument("--frames", type=int, default=32, help="probe frames per task")
    analyse.add_argument("--demonstrations_folder", help="where they are, if not where the run says")
    analyse.add_argument("--device", default="cpu", help="where the policies run")
    analyse.add_argument("--again", action="store_true", help="also analyse runs that are analysed already")

    act = command("act", "print the actions for one observation, as JSON", _act)
    _add_policy(act)
    act.add_argument("--task", help="name or instruction of a learned task: its adapter is taken")
    act.add_argument("--images", nargs="+", required=True, help="one upright image per camera, in the policy's order")
    act.add_argument("--instruction", help="what to do; may be left out with --task")
    act.add_argument("--proprio", type=float, nargs="+", help="raw state: hand position, axis-angle, fingers")

    push = command("push", "publish a run on the Hub: adapters, results, figures, videos, card; one commit", _push)
    push.add_argument("run", help="folder of a run")
    push.add_argument("--repo", required=True, help="user/name; made if it does not exist")
    push.add_argument(
        "--private",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether a new repository is; the account's default if not given",
    )
    push.add_argument("--revision", help="branch; made if it does not exist; the main one if not given")
    push.add_argument("--commit_message", help="first line of the commit; names the stages if not given")
    push.add_argument("--base_repo", help="publish a base that was trained here under this name of its own")
    push.add_argument("--license", help="such as mit; what the repository's card says, apache-2.0 for a new one")
    _add_token(push)
    push.add_argument("--dry-run", action="store_true", help="say what would be pushed, and push nothing")

    listing = command("list", "say which adapters a repository or run holds, without downloading weights", _list)
    listing.add_argument("repo", help="Hub id or folder")
    listing.add_argument("--revision", help="branch, tag or commit; the main branch if not given")
    _add_token(listing)
    listing.add_argument("--json", action="store_true", help="everything that is known, as JSON")

    command("doctor", "say what is wrong with this installation, and the cure", _doctor)
    command("setup-libero", "install the LIBERO simulation without its 80 training packages", _setup_libero)
    return parser


def _add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("policy", help="folder or Hub id of an adapter, a run or a checkpoint")
    parser.add_argument("--stage", type=int, help="the policy after this stage of a run; 0 is the base")
    parser.add_argument("--revision", help="branch, tag or commit of a repository; its main branch if not given")
    _add_token(parser)
    parser.add_argument("--base", help="where the base is, if not where the adapter says")
    parser.add_argument("--unnorm_key", help="statistics to un-normalise with, for a checkpoint without adapter")
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


def _add_token(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--token", help="of the Hub; HF_TOKEN or that of `hf auth login` if not given")


def _add_simulation(parser: argparse.ArgumentParser, *, trained: bool = False) -> None:
    default: dict[str, Any] = {} if trained else EVALUATION_DEFAULTS
    note = "; as trained if not given" if trained else ""
    parser.add_argument("--suite", default=default.get("suite"), help=f"LIBERO suite{note}")
    default_tasks = "those that the policy has learned, or else all of the suite," if trained else "all of the suite"
    parser.add_argument("--tasks", nargs="+", help=f"by number or name; {default_tasks} if not given")
    sets = ("auto", "official", "primitive")
    parser.add_argument("--assets", default=default.get("assets"), choices=sets, help=f"asset set{note}")
    parser.add_argument("--assets_folder", help="folder of the official assets")
    renderers = ("fast", "exact")
    parser.add_argument(
        "--renderer", default=default.get("renderer"), choices=renderers, help=f"exact: LIBERO's own pictures{note}"
    )
    size = default.get("image_size")
    parser.add_argument("--image_size", type=int, default=size, help=f"side of the rendered images in pixels{note}")
    parser.add_argument("--workers", type=int, default=0, help="simulation processes; 0 = one per core")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `infovla`; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["train"]:
        return run_command(lambda: train(arguments[1:]))
    if arguments[:1] == ["bench"]:
        return run_command(lambda: _bench(arguments[1:]))
    return run_command(lambda: _run(make_parser(), arguments))


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> int | None:
    assert parser._subparsers is not None
    commands: Any = parser._subparsers._group_actions[0].choices
    if arguments and arguments[0] in commands:
        apply_config(commands[arguments[0]], arguments[1:])
    options: Any = parser.parse_args(arguments)
    result: int | None = options.handler(options)
    return result


if __name__ == "__main__":
    sys.exit(main())
