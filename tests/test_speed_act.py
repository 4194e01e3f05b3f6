"""`infovla bench act`: what it measures is what it says. No timing is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from infovla_peft.speed.act import INSTRUCTION, Acting, Reference, check_against_reference, make_acting
from infovla_peft.speed.command import bench


@pytest.fixture(scope="module")
def acting() -> Acting:
    return make_acting("tiny", "autoregressive")


def test_ours_and_the_reference_give_the_same_varied_actions(acting: Acting) -> None:
    assert check_against_reference(acting) == 8 * 7
    actions = Reference(acting.policy)(acting.images, INSTRUCTION)
    assert len(np.unique(actions)) > 7  # else equality would say little
    assert acting.call(8)().shape == (8, 1, 7)


def test_the_reference_computes_logits_of_every_position_and_word(acting: Acting) -> None:
    model = acting.policy.model
    shapes: list[tuple[int, ...]] = []
    handle = model.language_model.lm_head.register_forward_hook(lambda _, __, output: shapes.append(output.shape))
    Reference(acting.policy)(acting.images[:1], INSTRUCTION)
    handle.remove()
    assert shapes[0][1] > 16  # more than the patches
    assert shapes[1:] == [(1, 1, 32064)] * 6
    assert shapes[0][2] == 32064


def test_other_actions_than_the_references_are_an_error(acting: Acting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reference, "_act", lambda *_: np.zeros(7))
    with pytest.raises(RuntimeError, match="batches of 1 give other actions"):
        check_against_reference(acting)


def test_the_command_writes_its_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench(["act", "--repetitions", "1", "--shapes", "tiny", "--json", str(tmp_path / "act.json")])
    written = json.loads((tmp_path / "act.json").read_text())
    assert set(written) == {"ratios", "figures", "machine"}
    assert set(written["ratios"]) == {
        "batch8_over_batch1",
        "batch8_over_batch1_parallel",
        "latency_ratio_reference_tiny",
    }
    assert all(value > 0 for value in written["ratios"].values())
    assert written["figures"]["identical_actions_tiny"] == 56
    assert "batch8_over_batch1" in capsys.readouterr().out
