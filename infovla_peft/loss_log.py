"""The log of a training as lines of JSON, from which the report draws its curves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .files import atomic_file, fsync


class LossLog(TrainerCallback):
    """Writes each log entry of a training as one line of JSON, for the report's curves.

    An evaluation (`eval_*`) has a line of its own. A resumed training drops the lines beyond its checkpoint, so that
    every entry appears once.

    Args:
        path: the file.
        stage: written into every line.
    """

    def __init__(self, path: str | os.PathLike[str], stage: int) -> None:
        self._path, self._stage = Path(path), stage

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            there = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
            lines = there.splitlines()
            kept = [line for line in lines if _step(line) <= state.global_step]
            with atomic_file(self._path) as temporary:
                temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and any(key == "loss" or key.startswith("eval_") for key in logs):
            entry = {"stage": self._stage, "step": state.global_step, **logs}
            if "learning_rate" in entry:
                entry["lr"] = entry.pop("learning_rate")
            numbers = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in entry.items()}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(numbers) + "\n")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero and self._path.exists():
            fsync(self._path)  # a continued training goes on behind these lines


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf  # cut off by a kill, or damaged
