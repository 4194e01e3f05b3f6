"""results.json: what is written loads again; what is damaged, edited or foreign is refused with its place."""

from __future__ import annotations

import copy
import csv
import doctest
import json
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infovla_peft import results as module
from infovla_peft.results import Results, ResultsError, TaskEntry, Video, collect_versions, source_commit


def example(stages: int = 3) -> Results:
    """A finished B2-2N1 run; the first task was not evaluated after stage 1."""
    results = Results(
        method="infovla",
        stream="B2-2N1",
        suite="libero_goal",
        seed=0,
        base_model="tiny",
        teacher="base",
        assets="primitive",
        renderer="fast",
        step_cap=300,
        open_loop_steps=8,
        tasks=[
            TaskEntry("open_the_drawer", "open the drawer", 0),
            TaskEntry("push_the_plate", "push the plate", 0),
            TaskEntry("turn_on_the_stove", "turn on the stove", 1),
            TaskEntry("put_the_bowl_on_top", "put the bowl on top", 2),
        ],
        versions={"python": "3.11.7"},
        config={"lambda_rac": 0.1, "tasks": None},
    )
    rows: list[dict[str, tuple[int, int]]] = [
        {"open_the_drawer": (18, 20), "push_the_plate": (14, 20)},
        {"push_the_plate": (11, 20), "turn_on_the_stove": (20, 20)},
        dict(zip((task.name for task in results.tasks), [(9, 20), (10, 20), (16, 20), (0, 20)], strict=True)),
    ]
    for stage, row in enumerate(rows[:stages]):
        video = Video(f"videos/stage_{stage:02d}/push_the_plate_03_failure.mp4", "push_the_plate", stage, False)
        results.add_stage(stage, row, timings={"train": 12.5, "evaluate": 30}, videos=[video])
    return results


def test_rows_make_the_matrix() -> None:
    results = example()
    expected = [[0.9, math.nan, 0.45], [0.7, 0.55, 0.5], [math.nan, 1.0, 0.8], [math.nan, math.nan, 0.0]]
    np.testing.assert_allclose(results.success, expected)
    low, high = results.intervals()
    assert (low[0, 0], high[2, 1]) == (pytest.approx(0.699, abs=1e-3), 1.0)
    assert np.isnan(low[0, 1])
    assert (results.stages, results.planned_stages) == (3, 3)
    assert results.metrics()["forward_transfer"] == pytest.approx((0.9 + 0.7 + 1.0 + 0.0) / 4)


@pytest.mark.parametrize("stages", [0, 1, 2, 3])
def test_what_is_saved_loads_again(tmp_path: Path, stages: int) -> None:
    results = example(stages)
    results.save(tmp_path / "results.json")
    assert Results.load(tmp_path / "results.json") == results
    assert not re.search(r"NaN|Infinity", (tmp_path / "results.json").read_text())
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "success.csv"}


def test_csv_holds_one_line_per_evaluated_cell(tmp_path: Path) -> None:
    example().save(tmp_path / "results.json")
    with (tmp_path / "success.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 8
    assert lines[0] == {
        "task": "open_the_drawer",
        "learned_at": "0",
        "stage": "0",
        "successes": "18",
        "episodes": "20",
        "success": "0.9000",
        "low": "0.6990",
        "high": "0.9721",
    }


def test_a_repeated_stage_is_replaced() -> None:
    results = example()
    results.add_stage(
        1, {"turn_on_the_stove": (5, 10)}, videos=[Video("videos/new.mp4", "turn_on_the_stove", 1, True)]
    )
    assert results.stages == 3
    np.testing.assert_array_equal(results.success[:, 1], [math.nan, math.nan, 0.5, math.nan])
    assert [video.stage for video in results.videos] == [0, 2, 1]
    assert results.timings[1] == {}
    Results.from_dict(json.loads(json.dumps(results.to_dict())))


@pytest.mark.parametrize(
    ("stage", "cells", "message"),
    [
        (4, {}, "next one is 3"),
        (-1, {}, "next one is 3"),
        (3, {"close_the_drawer": (1, 2)}, "close_the_drawer"),
        (3, {"push_the_plate": (3, 2)}, "3 successes of 2"),
        (3, {"push_the_plate": (0, 0)}, "0 successes of 0"),
    ],
)
def test_impossible_rows_are_refused(stage: int, cells: dict[str, tuple[int, int]], message: str) -> None:
    results = example()
    with pytest.raises(ValueError, match=message):
        results.add_stage(stage, cells)
    assert results == example()


def test_save_refuses_what_would_not_load(tmp_path: Path) -> None:
    results = example()
    results.save(tmp_path / "results.json")
    before = (tmp_path / "results.json").read_bytes()
    results.videos.append(Video("/etc/passwd", "push_the_plate", 0, True))
    with pytest.raises(ResultsError, match=r"videos\[3\]\.path"):
        results.save(tmp_path / "results.json")
    assert (tmp_path / "results.json").read_bytes() == before


def edited(path: str, value: Any) -> dict[str, Any]:
    content = json.loads(json.dumps(example().to_dict()))
    *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place = content
    for key in parents:
        place = place[key]
    place[last] = value
    return content


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("format_version", 2, "update infovla-peft"),
        ("format_version", True, "update infovla-peft"),
        ("extra", 1, "extra"),
        ("method", 5, "method must be a string"),
        ("seed", 0.5, "seed must be an integer"),
        ("seed", True, "seed must be an integer"),
        ("teacher", 1, "teacher must be null or a string"),
        ("step_cap", 0, "step_cap must be from 1"),
        ("tasks", [], "tasks must be at least one"),
        ("tasks.0.name", "push_the_plate", "each with its own name"),
        ("tasks.0.learned_at", 7, "order they are learned"),
        ("tasks.3.learned_at", 10**12, "from 0 to"),
        ("tasks.1", {"name": "x"}, r"tasks\[1\] lacks instruction, learned_at;"),
        ("successes", [[1, 2, 3]], "4 rows"),
        ("successes.0", [1], "one width"),
        ("successes.0.0", 21, "stage 0"),
        ("successes.0.0", -1, "from 0 to"),
        ("successes.0.0", None, "successes of episodes"),
        ("successes.0.0", 17, r"metrics\.\w+ must be .* follows from"),
        ("episodes.0.0", 0, "from 1 to"),
        ("episodes.0.0", "20", "an integer"),
        ("metrics.auc", 0.99, r"metrics\.auc must be"),
        ("metrics.auc", None, r"metrics\.auc must be"),
        ("timings", [], "3 objects"),
        ("timings.0.train", -1, r"timings\[0\]\.train"),
        ("videos.0.path", "../outside.mp4", r"inside the run's folder"),
        ("videos.0.path", "javascript:alert(1)", r"inside the run's folder"),
        ("videos.0.path", "C:\\x.mp4", r"inside the run's folder"),
        ("videos.0.path", "", r"inside the run's folder"),
        ("videos.0.stage", 3, "task and stage of this run"),
        ("videos.0.task", "unknown", "task and stage of this run"),
        ("videos.0.success", 1, "true or false"),
        ("versions.python", 3.11, "a string"),
        ("config", [], "an object"),
    ],
)
def test_damage_is_refused_and_named(tmp_path: Path, path: str, value: Any, message: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(json.dumps(edited(path, value)))
    with pytest.raises(ResultsError, match=message) as error:
        Results.load(file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "NaN", '{"format_version": 1}', "[" * 100_000, "1" * 10_000])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(ResultsError, match=r"results\.json"):
        Results.load(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ResultsError, match="no valid JSON"):
        Results.load(file)


def test_missing_file_names_the_cure(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="folder of a run"):
        Results.load(tmp_path / "results.json")


def mutate(value: Any, draw: random.Random) -> Any:
    """Replace one random place of a JSON value by something else."""
    if isinstance(value, dict | list) and value and draw.random() < 0.9:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = draw.choice(keys)
        if draw.random() < 0.1:
            del value[key]
        else:
            value[key] = mutate(value[key], draw)
        return value
    return draw.choice([None, True, -1, 0, 3, 10**30, 1e308, "", "x" * 50, [], {}, [[]], {"": []}, "../..", 0.5])


def test_mutated_files_are_read_right_or_refused() -> None:
    content, draw = json.loads(json.dumps(example().to_dict())), random.Random(0)
    refused = 0
    for _ in range(2000):
        mutated = mutate(copy.deepcopy(content), draw)
        try:
            results = Results.from_dict(mutated)
        except ResultsError:
            refused += 1
        else:
            assert json.loads(json.dumps(results.to_dict())) == mutated
    assert refused > 1000


def test_mutated_bytes_are_read_or_refused(tmp_path: Path) -> None:
    file, draw = tmp_path / "results.json", random.Random(0)
    example().save(file)
    original = file.read_bytes()
    for _ in range(500):
        broken = bytearray(original[: draw.randrange(len(original))] if draw.random() < 0.3 else original)
        for _ in range(draw.randint(1, 5)):
            if broken:
                broken[draw.randrange(len(broken))] = draw.randrange(256)
        file.write_bytes(broken)
        try:
            Results.load(file)
        except ResultsError:
            continue


def test_versions_and_commit() -> None:
    versions = collect_versions()
    assert {"python", "infovla_peft", "torch", "numpy"} <= set(versions)
    assert all(isinstance(version, str) for version in versions.values())
    commit = source_commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)


def test_docstring_example() -> None:
    assert doctest.testmod(module).failed == 0
