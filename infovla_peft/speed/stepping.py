"""Several trainings in turns: each advances by single steps of 🤗 Trainer's own loop.

A benchmark that copies the loop measures the copy. Here `trainer.train()` itself runs, in a thread that stops at the
end of each optimiser step and waits until it is told to take the next one; one thread runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from types import TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..trainer import InfoVLATrainer


class SteppedTraining(TrainerCallback):
    """A training that waits at the end of each step.

        with SteppedTraining(trainer) as training:
            training.step()

    Entering prepares everything (anchors included) and takes the first step.

    Args:
        trainer: with more steps than will be taken.
    """

    def __init__(self, trainer: InfoVLATrainer) -> None:
        self.trainer = trainer
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._stop = False
        self._within: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._context = ExitStack()
        self._error: BaseException | None = None
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._train, daemon=True)
        trainer.add_callback(self)

    def step(self, within: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        """From the end of one optimiser step to the end of the next: log, batch, forward, backward, optimiser.

        Args:
            within: entered in the training's thread before the step, left after it.

        Raises:
            RuntimeError: the training is over.
        """
        if not self._thread.is_alive():
            raise RuntimeError(f"the training ended after {self.trainer.state.global_step} steps; raise max_steps")
        self._within = within
        self._go.release()
        self._wait()

    def __enter__(self) -> SteppedTraining:
        self._thread.start()
        self._wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop, self._within = True, nullcontext
        self._go.release()
        self._thread.join()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Wait for the next turn."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self._context.close()
        self._done.release()
        self._go.acquire()
        self._context.enter_context(self._within())
        control.should_training_stop = control.should_training_stop or self._stop
        return control

    def _train(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP counts per thread
        try:
            self.trainer.train()
        except BaseException as error:
            self._error = error
        finally:
            self._done.release()

    def _wait(self) -> None:
        self._done.acquire()
        if self._error is not None:
            raise self._error
