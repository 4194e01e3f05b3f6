"""Rollouts in worker processes: one batched forward of the policy serves all environments.

Workers advance in rounds. In a round every worker executes its chunk of actions and shows what it then sees; the
policy looks at all of it at once. Which episodes share a batch therefore follows from the episodes alone, not from
the speed of the machine, and neither does any result depend on it. Pictures go through shared memory (`frames.py`).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import traceback
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..bars import progress_bar
from .assets import AssetSet
from .environment import LiberoEnvironment, Observation
from .frames import SharedFrames
from .headless import choose_gl, libero_folder
from .suites import Task

Act = Callable[[list[Observation], list[Task]], Sequence[NDArray[Any]]]
"""The policy: what each environment shows and its task -> one chunk of LIBERO actions (T, 7) for each."""

_MODELS_PER_WORKER = 4
_SINGLE_THREADED = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "LP_NUM_THREADS",
)


class WorkerError(RuntimeError):
    """A worker process died, or the simulation in it failed; the message names the task and the seed."""


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

    def __init__(self, settings: _Settings) -> None:
        # A fresh interpreter, as multiprocessing's "spawn", but it does not import the caller's main module again,
        # so that scripts without a __main__ guard and notebooks work.
        ours, theirs = socket.socketpair()
        environment = dict.fromkeys(_SINGLE_THREADED, "1") | dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with theirs, SharedFrames(settings.cameras, settings.image_size) as self._frames:
            inherited = theirs.fileno(), self._frames.descriptor
            command = f"from {__name__} import _serve; _serve{inherited}"
            self.process = subprocess.Popen(
                [sys.executable, "-c", command], env=environment, stdin=subprocess.DEVNULL, pass_fds=inherited
            )
        self.connection: Connection[Any, Any] = Connection(ours.detach())
        self.episode: Episode | None = None
        self.index = -1
        self._seen: list[NDArray[np.uint8]] = []
        self.send(settings)

    def start(self, episode: Episode, index: int, max_steps: int | None) -> None:
        self.episode, self.index, self._seen = episode, index, []
        self.send((episode, max_steps or episode.task.max_steps))

    def send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError:
            self.report_death()

    def receive(self) -> Observation | EpisodeResult:
        """What the worker sees, or the result of its episode.

        Raises:
            WorkerError: it died, or the simulation failed.
        """
        try:
            message = self.connection.recv()
        except (EOFError, OSError):
            self.report_death()
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

    def report_death(self) -> NoReturn:
        code = self.process.wait()
        killed = f" by {signal.Signals(-code).name}" if code < 0 else ""
        raise WorkerError(
            f"the worker process for {self.episode or 'the next episode'} died{killed} (exit code {code}): "
            "if the machine ran out of memory, use fewer workers"
        )

    def close(self) -> None:
        self.connection.close()  # the worker ends when it reads this
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class EnvironmentPool:
    """Worker processes that hold LIBERO environments and keep them from one call to the next.

    Args:
        num_workers: processes; each holds up to four tasks' models. One per core is right, or fewer if a worker's
            1 GB (primitive assets) to 1.5 GB (official ones) would not fit.
        assets, image_size, cameras, renderer: as for `LiberoEnvironment`.

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
    ) -> None:
        if num_workers < 1:
            raise ValueError(f"a pool needs at least one worker, not {num_workers}")
        if not cameras:
            raise ValueError("a pool needs at least one camera")
        libero_folder()
        choose_gl()
        self.num_workers = num_workers
        self._settings = _Settings(assets, image_size, tuple(cameras), renderer)
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
            WorkerError: a worker died or its simulation failed. The pool can be used again.
        """
        if open_loop_steps < 1:
            raise ValueError(f"open_loop_steps must be at least 1, not {open_loop_steps}")
        while len(self._workers) < min(self.num_workers, len(episodes)):
            self._workers.append(_Worker(self._settings))
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
                        for connection in wait(list(waiting)):
                            worker = waiting[connection]  # type: ignore[index]
                            message = worker.receive()
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
                            worker.send(chunk[:open_loop_steps])
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
