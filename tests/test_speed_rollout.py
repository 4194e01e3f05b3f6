"""`infovla bench rollout`: our states are the plain loop's, and a difference is found. No timing is asserted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from infovla_peft.cli import main
from infovla_peft.simulation import LiberoEnvironment, Observation, find_assets, find_task
from infovla_peft.speed.plain_loop import PlainLoop
from infovla_peft.speed.rollout import CAMERAS, compare

pytestmark = pytest.mark.libero
STEPS = 10


@pytest.fixture(scope="module")
def environment() -> Iterator[LiberoEnvironment]:
    assets = find_assets("primitive")
    with LiberoEnvironment(find_task("libero_goal", 7), assets=assets, cameras=CAMERAS, image_size=32) as made:
        yield made


def test_a_lazy_rollout_has_the_states_of_the_plain_loop_step_by_step(environment: LiberoEnvironment) -> None:
    environment.reset(initial_state=3, seed=8)
    plain = PlainLoop(environment.task, environment.assets, 32, environment.start)
    assert set(plain.images()) == set(CAMERAS)
    actions = np.random.default_rng(0).uniform(-1, 1, (STEPS, 7))
    for action in actions:
        plain.step(action)
    plain.close()

    def looks() -> list[Observation]:
        environment.reset(initial_state=3, seed=8)
        seen = []
        for step, action in enumerate(actions):
            if step % 8 == 0:
                seen.append(environment.observe())
            environment.step(action)
        environment.reset(initial_state=3, seed=8)
        return seen

    assert compare(plain, environment, actions, looks()) == STEPS
    # Whatever is different is found: an action, a worker's hand, the last bit of one number.
    other = actions.copy()
    other[4, 0] += 1e-9
    with pytest.raises(RuntimeError, match="after step 4 the state is not"):
        compare(plain, environment, other, looks())
    seen = looks()
    seen[1].state[0] = np.nextafter(seen[1].state[0], np.float32(1))
    with pytest.raises(RuntimeError, match="before step 8 the worker's hand"):
        compare(plain, environment, actions, seen)
    plain.states[9][5] = np.nextafter(plain.states[9][5], 1)
    with pytest.raises(RuntimeError, match="after step 9"):
        compare(plain, environment, actions, looks())


@pytest.mark.slow
def test_the_whole_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rollout.json"
    options = ["--assets", "primitive", "--image_size", "32", "--chunks", "3", "--repetitions", "1"]
    assert main(["bench", "rollout", "--json", str(file), *options]) == 0
    assert "steps_per_second_ratio_physics" in capsys.readouterr().out
    found = json.loads(file.read_text())
    names = {"steps_per_second_ratio_physics", "steps_per_second_ratio_plain_loop", "scaling_2_processes"}
    assert set(found["ratios"]) == names
    assert all(ratio > 0 for ratio in found["ratios"].values())
    assert found["figures"]["states_equal_steps"] == 16
    assert found["figures"]["renderer"] == {"rollout": "fast", "plain_loop": "exact"}
    assert main(["bench", "rollout", "--chunks", "2", "--repetitions", "2"]) == 1
    assert "more --chunks" in capsys.readouterr().err
