"""Side-by-side measurement: warm-up, interleaved repetitions, median, spread, ratio; as a table and as JSON.

For `infovla bench`. Not the harness of `infovla_peft.benchmark`, which runs continual-learning methods.

A machine is never quiet and never twice the same, so a single time says little. Contestants take turns, each once per
round and every round in another order (who follows whom matters to caches and allocators); a ratio is the median over
the rounds of the ratios *within* a round, in which both met the same load. Its spread is half the distance between
its quartiles.

Example:
    >>> rounds = interleave({"ours": lambda: sum(range(900)), "theirs": lambda: sum(range(9000))}, repetitions=5)
    >>> sorted(rounds)
    ['ours', 'theirs']
    >>> report = Report("sums")
    >>> for name, seconds in rounds.items():
    ...     report.add_figure(name, seconds, "s")
    >>> report.add_ratio("ours_over_theirs", rounds["ours"], rounds["theirs"], at_most=0.5)
    >>> report.ratios["ours_over_theirs"] < 0.5
    True
"""

from __future__ import annotations

import os
import platform
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, NamedTuple

from ..files import write_json
from ..results import collect_versions, source_commit

_PREFIXES = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


def interleave(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    repetitions: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time each contestant once per round, in turns.

    Args:
        contestants: name → what is timed. Its result is ignored; work on an accelerator must be waited for in it.
        repetitions: rounds that count, at least 1.
        warm_up: rounds before them that do not.
        clock: seconds; `time.process_time` counts this process alone, which is steadier on a busy machine.

    Returns:
        Name → seconds in each round; entry k of every list is from the same round.

    Raises:
        ValueError: nothing to time, or no repetitions.
    """
    if not contestants or repetitions < 1:
        raise ValueError(f"{len(contestants)} contestants and {repetitions} repetitions: give at least one of each")
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for turn in range(warm_up + repetitions):
        for name in order.sample(names, len(names)):
            start = clock()
            contestants[name]()
            elapsed = clock() - start
            if turn >= warm_up:
                seconds[name].append(elapsed)
    return seconds


class Summary(NamedTuple):
    """Median of some samples and half the distance between their quartiles (0 for a single one)."""

    median: float
    spread: float
    repetitions: int


def summarise(samples: Sequence[float]) -> Summary:
    """Median and spread.

    Example:
        >>> summarise([1.0, 2.0, 3.0, 4.0, 100.0])
        Summary(median=3.0, spread=1.0, repetitions=5)
    """
    if len(samples) < 2:
        return Summary(float(samples[0]), 0.0, len(samples))
    low, _, high = quantiles(samples, n=4, method="inclusive")
    return Summary(float(median(samples)), (high - low) / 2, len(samples))


class _Row(NamedTuple):
    name: str
    summary: Summary
    unit: str
    bound: str
    met: bool | None


@dataclass
class Report:
    """What one benchmark found: figures (medians of samples, with a unit) and ratios (pure numbers).

    Attributes:
        title: heads the table.
        figures: name → {"median", "spread", "unit", "repetitions"}, or what `note` was given.
        ratios: name → value.
    """

    title: str
    figures: dict[str, Any] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    _rows: list[_Row] = field(default_factory=list, repr=False)

    def add_figure(self, name: str, samples: float | Sequence[float], unit: str) -> None:
        """Add what was measured, once or several times, in `unit` ("s", "B", "1/s", ...)."""
        summary = summarise([samples] if isinstance(samples, (int, float)) else samples)
        self.figures[name] = {**summary._asdict(), "unit": unit}
        self._rows.append(_Row(name, summary, unit, "", None))

    def add_ratio(
        self,
        name: str,
        samples: float | Sequence[float],
        reference: float | Sequence[float],
        *,
        at_most: float | None = None,
        at_least: float | None = None,
    ) -> None:
        """Add samples / reference: of each round, of which the median counts, or of two single numbers.

        Args:
            name: as in the JSON file.
            samples: of one contestant.
            reference: of the other, in the same rounds.
            at_most: what the table holds the ratio against; nothing fails if it is missed.
            at_least: likewise.

        Raises:
            ValueError: different numbers of rounds.
        """
        over = [samples] if isinstance(samples, (int, float)) else list(samples)
        under = [reference] if isinstance(reference, (int, float)) else list(reference)
        if len(over) != len(under):
            raise ValueError(f"{name}: {len(over)} and {len(under)} rounds; a ratio is taken within a round")
        summary = summarise([a / b for a, b in zip(over, under, strict=True)])
        self.ratios[name] = summary.median
        bounds = [(f"<= {at_most:g}", summary.median <= at_most)] if at_most is not None else []
        bounds += [(f">= {at_least:g}", summary.median >= at_least)] if at_least is not None else []
        met = all(held for _, held in bounds) if bounds else None
        self._rows.append(_Row(name, summary, "", " and ".join(text for text, _ in bounds), met))

    def note(self, name: str, value: Any) -> None:
        """Add a figure that was not measured (a batch size, the names of the tasks): JSON only."""
        self.figures[name] = value

    def table(self) -> str:
        """Figures and ratios as text: median, spread, number of rounds, and what a ratio should be."""
        cells = [("", "median", "spread", "rounds", "should be")]
        for row in self._rows:
            spread = f"± {abs(row.summary.spread / row.summary.median):.1%}" if row.summary.median else ""
            held = "" if row.met is None else f"{row.bound}  {'met' if row.met else 'MISSED'}"
            value = _quantity(row.summary.median, row.unit) if row.unit else f"{row.summary.median:.3f}"
            cells.append((row.name, value, spread if row.summary.repetitions > 1 else "", str(row.summary[2]), held))
        widths = [max(len(line[column]) for line in cells) for column in range(5)]
        lines = [
            f"{line[0]:<{widths[0]}}  "
            + "  ".join(f"{cell:>{width}}" for cell, width in zip(line[1:4], widths[1:4], strict=True))
            + f"  {line[4]}"
            for line in cells
        ]
        return "\n".join([self.title, *(line.rstrip() for line in lines)])

    def to_dict(self) -> dict[str, Any]:
        """What `--json` writes: `ratios`, `figures`, `machine`."""
        return {"ratios": self.ratios, "figures": self.figures, "machine": machine()}

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write `to_dict()` as strict JSON, atomically."""
        write_json(path, self.to_dict())


def _quantity(value: float, unit: str) -> str:
    if unit == "B":
        return f"{value / 2**20:.2f} MiB"
    if unit != "s":
        return f"{value:.4g} {unit}"
    scale, prefix = next(((s, p) for s, p in _PREFIXES if abs(value) >= s), _PREFIXES[3])
    return f"{value / scale:.4g} {prefix}{unit}"


def machine() -> dict[str, Any]:
    """Where it was measured: processor, cores, threads, accelerator, load, versions, commit."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "processor": _processor(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if cuda else None,
        "load": list(os.getloadavg()),
        "versions": collect_versions(),
        "commit": source_commit(),
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
