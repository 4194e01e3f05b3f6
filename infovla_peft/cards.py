"""The model card of a published run, and the entries by which the Hub's leaderboards read its numbers.

The text is hub_cards/adapters.md, filled by huggingface_hub's own card classes. Every number is one of results.json.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from .adapter_files import AdapterInfo
from .data.sources import Location
from .figures import stage_name
from .methods import METHODS
from .metrics import wilson_interval
from .report import METRIC_TEXTS
from .results import Results
from .task_names import instruction_of
from .text_tables import NOT_MEASURED, count_span, markdown_table

LIBERO = "HuggingFaceVLA/libero"
"""The benchmark as a data set of the Hub: what a policy was measured on."""
SUITES = {
    "libero_spatial": "LIBERO-Spatial",
    "libero_object": "LIBERO-Object",
    "libero_goal": "LIBERO-Goal",
    "libero_10": "LIBERO-Long",
    "libero_90": "LIBERO-90",
}
LICENCE = "apache-2.0"
"""Of adapters whose owner names no other."""


def template_path(name: str) -> Path:
    """A template of hub_cards/, which lies inside an installed package and beside the package in a checkout.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "hub_cards", package.parent / "hub_cards"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"hub_cards/{name} is missing; install infovla-peft again")


def card(
    results: Results,
    info: AdapterInfo,
    repo_id: str,
    *,
    files: Sequence[str],
    stages: Sequence[AdapterInfo],
    license: str = LICENCE,
    revision: str | None = None,
) -> str:
    """The whole README.md of a repository, metadata included.

    Args:
        info: of the adapter at the root.
        files: what the repository holds, so that nothing else is shown.
        stages: descriptions of all adapters.
        license: as the Hub names it.
        revision: the branch, None for the main one.
    """
    suite, last = SUITES.get(results.suite, results.suite), results.stages - 1
    planned = max(task.learned_at for task in results.tasks)
    name = repo_id.rsplit("/", maxsplit=1)[-1]
    figure = "figures/success_matrix.png"
    videos = [f"videos/{task.name}.mp4" for task in results.tasks]
    text = str(
        ModelCard.from_template(
            card_data(results, info, repo_id, license),
            template_path=str(template_path("adapters.md")),
            title=_plain(name),
            repo_id=repo_id,
            tasks=results.tasks,
            learned=[task for task in results.tasks if task.learned_at < results.stages],
            unfinished=f"; {last} of its {planned} stages so far" if last < planned else "",
            suite_name=suite,
            stream=results.stream,
            method=results.method,
            teacher=results.teacher,
            figure=figure if figure in files else None,
            snippet=usage_snippet(info, repo_id, revision),
            branch=f', revision="{revision}"' if revision else "",
            example_task=_plain(instruction_of(stages[0].task.split(", ")[0])),
            base_sentence=_base_sentence(info, results.teacher),
            success_table=success_table(results),
            metrics_table=metrics_table(results),
            measured=_measured(results, last),
            videos=_video_list([video for video in videos if video in files]),
            episodes=count_span([count for row in results.episodes for count in row if count is not None]),
            seed=results.seed,
            policy_limit=_POLICY_LIMITS[METHODS[results.method].policy] if results.method in METHODS else "",
            configuration=json.dumps(results.config, indent=1, ensure_ascii=False).replace("```", "` ` `"),
            versions=", ".join(f"{package} {version}" for package, version in results.versions.items())
            or NOT_MEASURED,
            commit=f"commit {results.commit}" if results.commit else "an installed package",
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text)


_POLICY_LIMITS = {
    "latest": "Every number is of the latest adapter of its stage on all tasks learned so far.",
    "own": "Every task was rolled out with the adapter that learned it: nothing could be forgotten. Load by `task`.",
    "merged": "Every number is of all adapters learned so far, merged into one, on all of their tasks.",
}


def card_data(results: Results, info: AdapterInfo, repo_id: str, license: str = LICENCE) -> ModelCardData:
    """The metadata at the head of the card, with the success rates after the last stage as `model-index`."""
    data = ModelCardData(
        license=license,
        library_name="peft",
        pipeline_tag="robotics",
        base_model=repo_id if info.base_model.startswith(".") else info.base_model,
        base_model_relation="adapter",
        datasets=list(dict.fromkeys([*filter(None, [training_set(results)]), LIBERO])),
        metrics=["success_rate"],
        tags=["infovla", "lora", "vision-language-action", "continual-learning", "robotics", "libero", results.suite,
              results.method],
        model_name=repo_id.rsplit("/", maxsplit=1)[-1],
        eval_results=_evaluations(results) or None,
    )  # fmt: skip
    if data.eval_results is None:
        del data.model_name
    return data


def training_set(results: Results) -> str | None:
    """Hub id of the data set whose demonstrations were learned from; None for scripted ones and for a folder."""
    source = results.config.get("demonstrations_source")
    if not source:
        return None
    try:
        found = Location.find(str(source))
    except FileNotFoundError:  # a folder, of which only the name was kept
        return None
    return found.repo_id if found.folder is None else None


def _evaluations(results: Results) -> list[EvalResult]:
    """Mean and rate of every task after the last stage, in per cent; what was not measured is left out."""
    last, name, final = results.stages - 1, SUITES.get(results.suite, results.suite), final_mean(results)
    rates = [(task.instruction, results.success[row, last]) for row, task in enumerate(results.tasks)]
    known = [(label, float(rate)) for label, rate in rates if not math.isnan(rate)]
    entries = [("mean success rate of all tasks", final)] if final is not None else []
    return [
        EvalResult(
            task_type="robotics",
            task_name="robot manipulation",
            dataset_type=LIBERO,
            dataset_name=name,
            dataset_config=results.suite,
            dataset_split="test",
            metric_type="success_rate",
            metric_name=label,
            metric_value=round(100 * rate, 2),
            metric_args={"assets": results.assets, "stream": results.stream, "stage": last, "seed": results.seed},
        )
        for label, rate in [*entries, *known]
    ]


def final_mean(results: Results) -> float | None:
    """Mean success rate in [0, 1] of all tasks learned so far, after the last stage; None if one was not measured."""
    last = results.stages - 1
    rates = [float(results.success[row, last]) for row, task in enumerate(results.tasks) if task.learned_at <= last]
    return None if any(math.isnan(rate) for rate in rates) else sum(rates) / len(rates)


def eval_results(results: Results, repo_id: str) -> str:
    """`.eval_results/libero.yaml`: the mean success rate after the last stage.

    Returns:
        "" if it was not measured, or on other assets than LIBERO's own: it belongs on no leaderboard then.
    """
    final = final_mean(results)
    if final is None or results.assets != "official":
        return ""
    tasks = sum(task.learned_at < results.stages for task in results.tasks)
    entry = EvalResultEntry(
        dataset_id=LIBERO,
        task_id=results.suite,
        value=round(100 * final, 2),
        source_url=f"https://huggingface.co/{repo_id}",
        source_name="results.json",
        notes=f"{tasks} tasks of the suite, {results.stream}, {results.assets} assets; mean success rate in per cent",
    )
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)


def usage_snippet(info: AdapterInfo, repo_id: str, revision: str | None = None) -> str:
    """Python that loads the policy and asks it for actions; runs as it is."""
    views = "image" if len(info.cameras) < 2 else f"[image] * {len(info.cameras)}"
    task = instruction_of(info.task.split(", ")[0])
    branch = f", revision={json.dumps(revision)}" if revision else ""
    return (
        "import numpy as np\n"
        "from infovla_peft import load_policy\n\n"
        f'policy = load_policy("{repo_id}", task={json.dumps(task)}{branch})\n'
        "image = np.zeros((224, 224, 3), np.uint8)  # what the camera sees, upright RGB"
        + (f"; one for each of {', '.join(info.cameras)}" if len(info.cameras) > 1 else "")
        + "\n"
        "state = np.zeros(8)  # hand position (m), axis-angle (rad), finger positions (m)\n"
        f"actions = policy.act({views}, proprio=state)  # (chunk, 7), un-normalised"
    )


def success_table(results: Results) -> str:
    """The success matrix in Markdown."""
    head = ["task", *(stage_name(stage) for stage in range(results.stages))]
    rows = []
    for row, task in enumerate(results.tasks):
        cells = []
        for stage in range(results.stages):
            reached, tried = results.successes[row][stage], results.episodes[row][stage]
            if stage < task.learned_at:
                cells.append("")
            elif reached is None or tried is None:
                cells.append(NOT_MEASURED)
            else:
                low, high = wilson_interval(reached, tried)
                text = f"{reached}/{tried} ({reached / tried:.0%}, {low:.0%} to {high:.0%})"
                cells.append(f"**{text}**" if stage == task.learned_at else text)
        rows.append([_plain(task.instruction), *cells])
    return markdown_table(head, rows)


def metrics_table(results: Results) -> str:
    """The seven metrics in Markdown."""
    values = {**results.metrics(), **({"final_average": math.nan} if final_mean(results) is None else {})}
    rows = []
    for name, text in METRIC_TEXTS.items():
        value = values[name]
        shown = NOT_MEASURED if math.isnan(value) else f"{100 * value:.1f} {text.unit}"
        rows.append([text.label, shown, f"{text.meaning} ({text.better} is better)", f"`{text.formula}`"])
    return markdown_table(["metric", "value", "meaning", "formula"], rows)


def _plain(text: str) -> str:
    """Text that is no Markdown, no HTML and no template."""
    return re.sub(r"([\\`*_\[\]<>|{}#!])", r"\\\1", " ".join(text.split()))


def _base_sentence(info: AdapterInfo, teacher: str | None) -> str:
    revision = f" at revision `{info.base_revision}`" if info.base_revision else ""
    sentence = f"The base model is [{info.base_model}](https://huggingface.co/{info.base_model}){revision}."
    if info.base_model.startswith("."):
        trained = info.training.get("base_model", "tiny") == "tiny"
        sentence = "The base model was trained with the run and lies in `base/`."
        if not trained:
            sentence = (
                "The base model is a checkpoint that the run was given as a folder; `base/` is a copy of it, under "
                "the licence that it came with."
            )
    if info.quantization != "none":
        too = ", and so was the teacher, which is this same quantised base" if teacher else ""
        sentence += f" It was held in 4 bits (`{info.quantization}`) in training{too}, and is when it is loaded."
    return sentence


def _measured(results: Results, last: int) -> str:
    low, high = results.intervals()
    reached = [f"{_plain(task.instruction)} {100 * low[row, last]:.0f} to {100 * high[row, last]:.0f} %"
               for row, task in enumerate(results.tasks) if not math.isnan(low[row, last])]  # fmt: skip
    scripted = not results.config.get("demonstrations_source")
    stand_in = (
        " (stand-ins built from primitives, not LIBERO's own: not comparable with published numbers, and so without "
        "an entry for leaderboards in `.eval_results/`)"
    )
    episodes = count_span([count for row in results.episodes for count in row if count is not None])
    return "\n".join(
        [
            f"- Suite `{results.suite}` of LIBERO in MuJoCo; asset set `{results.assets}`"
            f"{stand_in * (results.assets == 'primitive')}, renderer `{results.renderer}`.",
            f"- {episodes} rollouts per task and stage, from the benchmark's fixed initial states"
            + (", from which no demonstration was recorded." if scripted else "."),
            f"- At most {results.step_cap} actions per rollout; of each chunk {results.open_loop_steps} were "
            "executed.",
            f"- Training seed {results.seed}; the simulation's seeds are the same for every stage.",
            f"- 95 % Wilson intervals after the last stage: {'; '.join(reached) or NOT_MEASURED}.",
            f"- Trained on {_demonstrations(results)}; `datasets` above names the benchmark's own as well.",
            "- All counts: `results.json`.",
        ]
    )


def _demonstrations(results: Results) -> str:
    if name := training_set(results):
        return f"demonstrations of the data set [{name}](https://huggingface.co/datasets/{name})"
    if results.config.get("demonstrations_source"):
        return "demonstrations that are not published with it"
    return "demonstrations that a script recorded in the scenes of this suite, on fresh layouts"


def _video_list(paths: Sequence[str]) -> str:
    return "\n".join(f"- [{_plain(instruction_of(Path(path).stem))}]({path})" for path in paths)
