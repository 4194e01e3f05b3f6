"""What each part of the loss pulls at, and that watching it changes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from test_trainer import BOWL, adapter_stage, config, first_batch, losses
from tiny_policy import tiny_policy
from torch import Tensor, nn

from infovla_peft import trainer as trainer_module
from infovla_peft.adapters import adapter_parameters, add_adapter
from infovla_peft.conflict import conflicts
from infovla_peft.consolidation import Consolidation
from infovla_peft.data.sampling import StratifiedBatchSampler
from infovla_peft.trainer import InfoVLATrainer

METHODS = {
    "er": {"current", "replay"},
    "mir": {"current", "replay"},
    "der++": {"current", "replay", "output"},
    "infovla": {"current", "replay", "rac", "cmi", "output"},
    "infovla_paper": {"current", "replay", "rac", "cmi"},
}
OPTIONS: dict[str, Any] = {"counterfactual_share": 0.5, "lambda_output": 0.3}


def test_norms_and_cosines_are_those_of_the_gradients() -> None:
    torch.manual_seed(0)
    first, second, untouched = (nn.Parameter(torch.randn(shape)) for shape in ((3,), (2, 2), (4,)))
    parts = {"current": (first**3).sum() + second.sum(), "rac": -(second**2).sum(), "none": torch.tensor(1.0)}
    found = {name: float(value) for name, value in conflicts(parts, [first, second, untouched]).items()}
    mine = torch.cat((3 * first.detach() ** 2, torch.ones(4)))
    other = torch.cat((torch.zeros(3), -2 * second.detach().flatten()))
    assert found["grad_norm_current"] == pytest.approx(float(mine.norm()), rel=1e-6)
    assert found["grad_norm_rac"] == pytest.approx(float(other.norm()), rel=1e-6)
    assert found["grad_cosine_rac"] == pytest.approx(float(mine @ other / (mine.norm() * other.norm())), rel=1e-5)
    assert found["grad_norm_none"] == found["grad_cosine_none"] == 0.0
    assert set(found) == {f"grad_norm_{name}" for name in parts} | {"grad_cosine_rac", "grad_cosine_none"}
    assert first.grad is None  # nothing was added
    sum(part for part in parts.values() if part.requires_grad).backward()  # the graph is still there
    torch.testing.assert_close(cast(Tensor, first.grad), 3 * first.detach() ** 2)


@pytest.mark.parametrize("method", METHODS)
def test_the_parts_are_the_whole_loss(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Tensor]] = []

    def spy(parts: dict[str, Tensor], parameters: list[nn.Parameter]) -> dict[str, Tensor]:
        seen.append(parts)
        return conflicts(parts, parameters)

    monkeypatch.setattr(trainer_module, "conflicts", spy)
    trainer = adapter_stage(tmp_path, method=method, log_gradients=True, **OPTIONS)
    trainer.prepare_anchors()
    trainer.state.logging_steps = 1
    model = cast(nn.Module, trainer.model).train()
    loss = trainer.compute_loss(model, first_batch(trainer))
    assert set(seen[0]) == METHODS[method]
    whole = cast(Tensor, sum(seen[0].values()))
    torch.testing.assert_close(whole, loss, atol=1e-6, rtol=1e-5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    mine, theirs = (
        torch.autograd.grad(value, trained, retain_graph=True, allow_unused=True) for value in (whole, loss)
    )
    torch.testing.assert_close(
        [value for value in mine if value is not None], [value for value in theirs if value is not None]
    )


def test_a_process_without_samples_of_the_new_task_has_nothing_to_compare(tmp_path: Path) -> None:
    """As of four processes with one sample each, of which two replay."""
    trainer = adapter_stage(tmp_path, method="infovla", log_gradients=True, **OPTIONS)
    trainer.prepare_anchors()
    trainer.state.logging_steps = 1
    rehearsal, model = trainer.rehearsal, cast(nn.Module, trainer.model).train()
    for rank, logs in ((0, True), (3, False)):
        sampler = StratifiedBatchSampler(
            trainer.train_dataset, rehearsal.remembered, batch_size=1, replay_fraction=0.5, batches=1, seed=0,
            processes=4, rank=rank, counterfactual=rehearsal.counterfactual, counterfactual_share=0.5,
            views=rehearsal.views,
        )  # fmt: skip
        batch = trainer.data_collator(rehearsal.mixture().__getitems__(sampler.draw(0)))
        assert math.isfinite(trainer.compute_loss(model, batch).item())
        assert ("grad_norm_current" in trainer._sums) == logs
        trainer._sums.clear()


@pytest.mark.parametrize("method", ["infovla", "infovla_paper", "er"])
def test_watching_changes_nothing_and_is_in_every_entry(tmp_path: Path, method: str) -> None:
    plain = adapter_stage(tmp_path / "plain", method=method, logging_steps=2, **OPTIONS)
    plain.train()
    watched = adapter_stage(tmp_path / "watched", method=method, logging_steps=2, log_gradients=True, **OPTIONS)
    watched.train()
    assert losses(watched) == losses(plain)
    mine, theirs = (
        {name: value for name, value in cast(nn.Module, trainer.model).state_dict().items() if "lora" in name}
        for trainer in (watched, plain)
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in mine | theirs)
    entries = [entry for entry in watched.state.log_history if "loss" in entry]
    assert len(entries) == 2
    for entry in entries:
        parts = METHODS[method]
        assert {f"grad_norm_{part}" for part in parts} <= set(entry)
        assert {f"grad_cosine_{part}" for part in parts - {"current"}} <= set(entry)
        assert all(entry[f"grad_norm_{part}"] > 0 for part in ("current", "replay"))
        assert all(-1 <= value <= 1 for name, value in entry.items() if name.startswith("grad_cosine"))
        assert all(math.isfinite(value) for value in entry.values())
    assert not any(
        name.startswith(("grad_norm_", "grad_cosine_")) for entry in plain.state.log_history for name in entry
    )


def test_ewc_is_a_part_too(tmp_path: Path) -> None:
    policy = tiny_policy()
    args = config(tmp_path, method="ewc", lambda_ewc=1e3, log_gradients=True, max_steps=3)  # of a Fisher of ones
    model = add_adapter(policy.model, "one", args)
    fisher = {key.replace(".one.", "."): torch.ones_like(value) for key, value in adapter_parameters(model, "one")}
    reference = {key: torch.zeros_like(value) for key, value in fisher.items()}
    trainer = InfoVLATrainer(
        model, args, policy.dataset.like(policy.task(BOWL)), policy.collator,
        consolidation=Consolidation(fisher, reference),
    )  # fmt: skip
    trainer.train()
    entry = trainer.state.log_history[-2]
    assert entry["grad_norm_ewc"] > 0
    assert -1 <= entry["grad_cosine_ewc"] <= 1
    assert "grad_norm_replay" not in entry


def test_what_it_cannot_go_with_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave one out"):
        config(tmp_path, log_gradients=True, torch_compile=True)
