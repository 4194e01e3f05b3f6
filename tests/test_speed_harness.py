"""The harness of `infovla bench`: turns, medians within rounds, tables, JSON. No timing is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infovla_peft.speed.harness import Report, interleave, machine, summarise


class Clock:
    """Time passes only where a contestant lets it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_contestants_take_turns_and_warm_up_does_not_count() -> None:
    clock, order = Clock(), []

    def work(name: str, seconds: float) -> None:
        order.append(name)
        clock.now += seconds * ((len(order) - 1) // 3)  # slower from round to round; the first takes no time

    contestants = {name: lambda name=name: work(name, ord(name)) for name in "abc"}  # type: ignore[misc]
    rounds = interleave(contestants, repetitions=20, warm_up=1, clock=clock)
    turns = [tuple(order[start : start + 3]) for start in range(0, len(order), 3)]
    assert len(turns) == 21
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) == 6  # everyone follows everyone
    assert rounds == {name: [ord(name) * turn for turn in range(1, 21)] for name in "abc"}


@pytest.mark.parametrize(("contestants", "repetitions"), [({}, 3), ({"a": lambda: None}, 0)])
def test_nothing_to_measure_is_an_error(contestants: dict, repetitions: int) -> None:
    with pytest.raises(ValueError, match="at least one of each"):
        interleave(contestants, repetitions=repetitions)


def test_a_ratio_is_the_median_of_the_ratios_within_rounds() -> None:
    report = Report("title")
    report.add_ratio("r", [2.0, 30.0, 9.0], [1.0, 10.0, 9.0], at_most=2.0)  # ratios 2, 3, 1; of medians: 1
    assert report.ratios == {"r": 2.0}
    report.add_ratio("s", 3.0, 2.0, at_least=2.0)
    table = report.table()
    assert "<= 2  met" in table
    assert ">= 2  MISSED" in table
    with pytest.raises(ValueError, match="1 and 2 rounds"):
        report.add_ratio("t", [1.0], [1.0, 2.0])


def test_summaries() -> None:
    assert summarise([5.0]) == (5.0, 0.0, 1)
    assert summarise([1.0, 2.0, 3.0, 4.0]) == (2.5, 0.75, 4)


def test_the_file_has_ratios_figures_and_the_machine(tmp_path: Path) -> None:
    report = Report("title")
    report.add_figure("step", [0.25, 0.5, 0.75], "s")
    report.add_figure("weights", 3 * 2**20, "B")
    report.note("batch", 8)
    report.add_ratio("r", 1.0, 4.0)
    report.write(tmp_path / "new" / "bench.json")
    written = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert set(written) == {"ratios", "figures", "machine"}
    assert written["ratios"] == {"r": 0.25}
    assert written["figures"]["step"] == {"median": 0.5, "spread": 0.125, "unit": "s", "repetitions": 3}
    assert written["figures"]["batch"] == 8
    assert written["machine"]["versions"]["torch"]
    assert set(written["machine"]) == set(machine())
    assert [line.split()[:3] for line in report.table().splitlines()[2:4]] == [
        ["step", "500", "ms"],
        ["weights", "3.00", "MiB"],
    ]
