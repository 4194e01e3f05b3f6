"""What a run shows while it runs: one bar per training, with the loss beside it, and no chatter of the libraries."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from .bars import progress_bar


class TrainingBar(TrainerCallback):
    """A bar with the latest loss terms, instead of a printed dictionary per log entry (they go to log.jsonl)."""

    _SHOWN = ("loss", "policy_loss", "rac", "cmi")

    def __init__(self, label: str) -> None:
        self._label = label
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and not args.disable_tqdm:
            self._bar = progress_bar(
                total=state.max_steps, initial=state.global_step, desc=self._label, unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
    ) -> None:
        if self._bar is not None and logs:
            self._bar.set_postfix({name: f"{logs[name]:.3g}" for name in self._SHOWN if name in logs}, refresh=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def show_progress(trainer: Trainer, label: str) -> None:
    """Replace the trainer's own output by one bar."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(TrainingBar(label))


def quiet_libraries(*, loading_bars: bool) -> None:
    """Only errors of the libraries, and no bars for what takes less than seconds. For commands, not for a library.

    Args:
        loading_bars: keep those for loading weights; a large checkpoint takes its time.
    """
    import datasets
    import transformers
    from huggingface_hub import utils as hub_utils

    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not (loading_bars and sys.stderr.isatty()):
        hub_utils.disable_progress_bars()  # type: ignore[attr-defined]
        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
