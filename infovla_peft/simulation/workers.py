"""Rollouts in worker processes: one batched forward of the policy serves all environments.

Workers advance in rounds. In a round every worker executes its chunk of actions and shows what it then sees; the
policy looks at all of it at once. Which episodes share a batch therefore follows from the episodes alone, not from
the speed of the machine, and neither does any result depend on it. Pictures go through shared memory (`frames.py`).

A worker that dies or hangs is replaced: the new one repeats the episode with the chunks that were already decided, so
the policy is not asked again, the rounds stay as they were, and the episode counts once.
"""

from __future__ import annotations

import logging
import signal
import socket
import time
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..bars import progress_bar
from .assets import AssetSet
from .environment import LiberoEnvironment, Observation
from .frames import SharedFrames
from .headless import choose_gl, libero_folder
from .jobs import MAX_REPLACEMENTS, end_process, exit_text, fresh_interpreter
from .suites import Task

Act = Callable[[list[Observation], list[Task]], Sequence[NDArray[Any]]]
"""The policy: what each environment shows and its task -> one chunk of LIBERO actions (T, 7) for each."""

EPISODE_TIMEOUT = 600.0
"""Seconds. An episode of 520 steps takes about 15 on one core, building its environment 3; the rest is patience."""
_MODELS_PER_WORKER = 4
_log = logging.getLogger(__name__)


class WorkerError(RuntimeError):
    """An episode costs one worker process after another, or its simulation fails; the message names task and seed."""


@dataclass(frozen=True)
class Episode:
    """One rollout to run.

    Attributes:
        task: the task.
        initial_state_index: one of the 50 benchmark states, or None for a fresh layout.
        seed: of `LiberoEnvironment.reset`.
        record_video: keep the pictures that the policy saw.
    """

    task: Task
    initial_state_index: int | None
    seed: int
    record_video: bool = False

    def __str__(self) -> str:
        return f"{self.task}, start state {self.initial_state_index}, seed {self.seed}"


@dataclass(frozen=True)
class EpisodeResult:
    """How a rollout ended.

    Attributes:
        episode: what was asked for.
        success: whether the goal held after some step.
        steps: actions executed, the settling steps not counted.
        frames: the first camera's picture at each look of the policy and at the end, if asked for.
    """

    episode: Episode
    success: bool
    steps: int
    frames: list[NDArray[np.uint8]] | None


@dataclass(frozen=True)
class _Settings:
    assets: AssetSet
    image_size: int
    cameras: tuple[str, ...]
    renderer: str


@dataclass(frozen=True)
class _Ended:
    """What a worker says at the end of an episode; while it lasts, it sends the proprioception of each look."""

    success: bool
    steps: int


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, settings: _Settings, timeout: float) -> None:
        self._settings, self._timeout = settings, timeout
        self.episode: Episode | None = None
        self.index = -1
        self._seen: list[NDArray[np.uint8]] = []
        self._chunks: list[NDArray[np.float64]] = []
        self._steps, self._replaced = 0, 0
        self._spent, self._since = 0.0, time.monotonic()
        self._launch()

    def _launch(self) -> None:
        ours, theirs = socket.socketpair()
        settings = self._settings
        with theirs, SharedFrames(settings.cameras, settings.image_size) as self._frames:
            inherited = theirs.fileno(), self._frames.descriptor
            self.process = fresh_interpreter(f"from {__name__} import _serve; _serve{inherited}", inherited)
        self.connection: Connection[Any, Any] = Connection(ours.detach())
        self._send(settings)

    def start(self, episode: Episode, index: int, max_steps: int | None) -> None:
        self.episode, self.index, self._steps = episode, index, max_steps or episode.task.max_steps
        self._chunks, self._replaced = [], 0
        self._begin()

    def _begin(self) -> None:
        self._seen, self._spent = [], 0.0
        self._send((self.episode, self._steps))

    def execute(self, chunk: NDArray[np.float64]) -> None:
        """Go on with the episode."""
        self._chunks.append(chunk)
        self._send(chunk)

    def _send(self, message: Any) -> None:
        self._since = time.monotonic()
        with suppress(OSError):  # its death shows when its answer is waited for
            self.connection.send(message)

    @property
    def patience(self) -> float:
        """Seconds that the answer may still take; the policy's time does not count."""
        return self._timeout - self._spent - (time.monotonic() - self._since)

    def receive(self) -> Observation | EpisodeResult | None:
        """What the worker sees, or the result of its episode; None if it was replaced and must be waited for again.

        Raises:
            WorkerError: the simulation failed, or the episode has cost too many workers.
        """
        try:
            if self.connection.poll():
                return self._read()
        except (EOFError, OSError):
            self._replace()
        else:
            self._replace(f"gave no answer within {self._timeout:.0f} s")
        return None

    def _read(self) -> Observation | EpisodeResult:
        message = self.connection.recv()
        self._spent += time.monotonic() - self._since
        if isinstance(message, str):
            raise WorkerError(f"the simulation of {self.episode} failed:\n{message}")
        assert self.episode is not None
        images = self._frames.read()
        if self.episode.record_video:
            self._seen.append(next(iter(images.values())))
        if not isinstance(message, _Ended):
            return Observation(images, message)
        return EpisodeResult(
            self.episode, message.success, message.steps, self._seen if self.episode.record_video else None
        )

    def _replace(self, problem: str | None = None) -> None:
        """Start another process, and bring it to where this one was lost."""
        while True:
            problem = self._bury(problem)
            self._replaced += 1
            if self._replaced > MAX_REPLACEMENTS:
                raise WorkerError(
                    f"the worker process for {self.episode} {problem}, as {MAX_REPLACEMENTS} others before it: if the "
                    "machine ran out of memory, use fewer workers"
                )
            _log.warning("the worker process for %s %s; another one repeats the episode", self.episode, problem)
            self._launch()
            self._begin()
            try:
                for chunk in self._chunks:
                    if not self.connection.poll(max(self.patience, 0)):
                        raise TimeoutError
                    self._read()
                    self._send(chunk)
            except TimeoutError:
                problem = f"gave no answer within {self._timeout:.0f} s"
            except (EOFError, OSError):
                problem = None
            else:
                return

    def _bury(self, problem: str | None) -> str:
        """End the process; how it ended, if not of itself then for `problem`."""
        self.connection.close()
        if problem is not None:
            self.process.kill()
        code = end_process(self.process)
        return problem or exit_text(code)

    def close(self) -> None:
        self.connection.close()  # the worker ends when it reads this
        end_process(self.process)


class EnvironmentPool:
    """Worker processes that hold LIBERO environments and keep them from one call to the next.

    Args:
        num_workers: processes; each holds up to four tasks' models. One per core is right, or fewer if a worker's
            1 GB (primitive assets) to 1.5 GB (official ones) would not fit.
        assets, image_size, cameras, renderer: as for `LiberoEnvironment`.
        episode_timeout: seconds an episode's simulation may take before its worker counts as hung and is replaced.

    Raises:
        ValueError: no worker or no camera wanted.
        SimulatorNotFoundError: LIBERO or an OpenGL library is missing.

    Example:
        >>> with EnvironmentPool(2, assets=find_assets()) as pool:  # doctest: +SKIP
        ...     results = pool.run([Episode(task, 0, seed=0)], act)
    """

    def __init__(
        self,
        num_workers: int,
        *,
        assets: AssetSet,
        image_size: int = 128,
        cameras: Sequence[str] = ("agentview",),
        renderer: str = "fast",
        episode_timeout: float = EPISODE_TIMEOUT,
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"a pool needs at least one worker, not {num_workers}")
        if not cameras:
            raise ValueError("a pool needs at least one camera")
        libero_folder()
        choose_gl()
        self.num_workers = num_workers
        self._settings = _Settings(assets, image_size, tuple(cameras), renderer)
        self._timeout = episode_timeout
        self._workers: list[_Worker] = []

    def run(
        self,
        episodes: Sequence[Episode],
        act: Act,
        *,
        open_loop_steps: int = 8,
        max_steps: int | None = None,
        progress: bool = False,
    ) -> list[EpisodeResult]:
        """Run episodes and return their results in the same order.

        Args:
            episodes: what to run.
            act: called with what all waiting environments show, in the order of the workers.
            open_loop_steps: actions of a chunk that are executed before the policy looks again.
            max_steps: step cap; default is the suite's own.
            progress: show a bar with the success rate so far.

        Raises:
            ValueError: `act` returned no chunk (T, 7) for some environment.
            WorkerError: an episode has cost three workers, or its simulation failed. The pool can be used again.
        """
        if open_loop_steps < 1:
            raise ValueError(f"open_loop_steps must be at least 1, not {open_loop_steps}")
        while len(self._workers) < min(self.num_workers, len(episodes)):
            self._workers.append(_Worker(self._settings, self._timeout))
        results: list[EpisodeResult | None] = [None] * len(episodes)
        pending, successes = deque(range(len(episodes))), 0

        def start(worker: _Worker, index: int) -> None:
            worker.start(episodes[index], index, max_steps)

        try:
            with progress_bar(total=len(episodes), unit="episode", disable=not progress or None, leave=False) as bar:
                while True:
                    for worker in self._workers:
                        if worker.episode is None and pending:
                            start(worker, pending.popleft())
                    busy = [worker for worker in self._workers if worker.episode is not None]
                    if not busy:
                        break
                    # Who ends an episode in this round goes on with the one offered to it, whoever ends first.
                    offers = dict(zip(map(id, busy), list(pending), strict=False))
                    seen: dict[int, Observation] = {}
                    waiting = {worker.connection: worker for worker in busy}
                    while waiting:
                        patience = min(worker.patience for worker in waiting.values())
                        ready: list[Any] = wait(list(waiting), max(patience, 0))
                        ready = ready or [each for each, worker in waiting.items() if worker.patience <= 0]
                        for connection in ready:
                            worker = waiting[connection]
                            message = worker.receive()
                            if message is None:
                                del waiting[connection]
                                waiting[worker.connection] = worker
                                continue
                            if isinstance(message, Observation):
                                seen[id(worker)] = message
                                del waiting[worker.connection]
                                continue
                            results[worker.index], worker.episode = message, None
                            successes += message.success
                            bar.update()
                            bar.set_postfix_str(f"success {successes}/{bar.n}")
                            if id(worker) in offers:
                                pending.remove(offers[id(worker)])
                                start(worker, offers.pop(id(worker)))
                            else:
                                del waiting[worker.connection]
                    looking = [worker for worker in busy if id(worker) in seen]
                    if looking:
                        tasks = [worker.episode.task for worker in looking if worker.episode is not None]
                        chunks = act([seen[id(worker)] for worker in looking], tasks)
                        for worker, chunk in zip(looking, _checked(chunks, len(looking)), strict=True):
                            worker.execute(chunk[:open_loop_steps])
        except BaseException:
            self.close()  # the workers are somewhere within an episode
            raise
        return [result for result in results if result is not None]

    def close(self) -> None:
        """End the worker processes."""
        for worker in self._workers:
            worker.close()
        self._workers = []

    def __enter__(self) -> EnvironmentPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _checked(chunks: Sequence[NDArray[Any]], count: int) -> list[NDArray[np.float64]]:
    arrays = [np.asarray(chunk, dtype=np.float64) for chunk in chunks]
    if len(arrays) != count or any(array.ndim != 2 or array.shape[1] != 7 or not len(array) for array in arrays):
        shapes = [array.shape for array in arrays]
        raise ValueError(f"the policy must return {count} chunks of actions (T, 7), not {shapes}")
    return arrays


def _serve(connection_descriptor: int, frames_descriptor: int) -> None:
    """The worker process: episodes in, observations and results out, until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which closes the connection
    connection: Connection[Any, Any] = Connection(connection_descriptor)
    environments: OrderedDict[Task, LiberoEnvironment] = OrderedDict()
    try:
        settings: _Settings = connection.recv()
        frames = SharedFrames(settings.cameras, settings.image_size, frames_descriptor)
        while True:
            episode, max_steps = connection.recv()
            try:
                environment = _environment(episode.task, settings, environments)
                connection.send(_roll_out(environment, episode, max_steps, connection, frames))
            except (EOFError, ConnectionError):
                raise
            except Exception:
                connection.send(traceback.format_exc())
    except (EOFError, ConnectionError):
        pass


def _environment(
    task: Task, settings: _Settings, environments: OrderedDict[Task, LiberoEnvironment]
) -> LiberoEnvironment:
    if task not in environments:
        if len(environments) == _MODELS_PER_WORKER:
            environments.popitem(last=False)[1].close()
        environments[task] = LiberoEnvironment(
            task,
            assets=settings.assets,
            image_size=settings.image_size,
            cameras=settings.cameras,
            renderer=settings.renderer,
        )
    environments.move_to_end(task)
    return environments[task]


def _roll_out(
    environment: LiberoEnvironment,
    episode: Episode,
    max_steps: int,
    connection: Connection[Any, Any],
    frames: SharedFrames,
) -> _Ended:
    environment.reset(initial_state=episode.initial_state_index, seed=episode.seed)
    success, steps = False, 0
    while not success and steps < max_steps:
        observation = environment.observe()
        frames.write(observation.images)
        connection.send(observation.state)
        for action in connection.recv()[: max_steps - steps]:
            success = environment.step(action)
            steps += 1
            if success:
                break
    if episode.record_video:
        frames.write(environment.observe().images)
    return _Ended(success, steps)
