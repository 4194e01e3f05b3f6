"""More than one device: Accelerate's configurations, and what two processes do against one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from launcher import ROOT, launch_two
from safetensors.torch import load_file
from tiny_policy import tiny_policy
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from two_processes import CASES, one_step

from infovla_peft import distributed
from infovla_peft.adapters import adapter_weights, add_adapter, fingerprint
from infovla_peft.checkpoints import check_continuable
from infovla_peft.config import InfoVLAConfig
from infovla_peft.memory import Anchors
from infovla_peft.teacher import compute_anchors

ENGINES = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "deepspeed_zero2": "DEEPSPEED", "deepspeed_zero3": "DEEPSPEED"}
CONFIGURATIONS = ROOT / "recipes/accelerate"


def test_every_engine_is_listed() -> None:
    assert {path.stem for path in CONFIGURATIONS.iterdir()} == ENGINES.keys()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_configuration_is_read_by_accelerate_as_its_launch_line_says(engine: str) -> None:
    file = CONFIGURATIONS / f"{engine}.yaml"
    config = load_config_from_file(str(file))
    assert str(config.distributed_type.value) == ENGINES[engine]
    assert config.num_processes == 2
    line = file.read_text(encoding="utf-8").splitlines()[0]
    assert line.startswith(f"# accelerate launch --config_file recipes/accelerate/{engine}.yaml ")
    words = line.split()[3:]
    words[1] = str(ROOT / words[1])
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (ROOT / arguments.training_script).is_file()
    assert all((ROOT / path).is_file() for path in arguments.training_script_args)
    assert arguments.num_processes == 2
    chosen = {name for name in ("multi_gpu", "use_fsdp", "use_deepspeed") if getattr(arguments, name)}
    assert chosen == {{"MULTI_GPU": "multi_gpu", "FSDP": "use_fsdp", "DEEPSPEED": "use_deepspeed"}[ENGINES[engine]]}


def test_fsdp_and_zero_are_of_the_stage_they_are_named_after() -> None:
    def section(engine: str, name: str) -> dict[str, object]:
        content: dict[str, object] = yaml.safe_load((CONFIGURATIONS / f"{engine}.yaml").read_text())[name]
        return content

    assert section("fsdp2", "fsdp_config")["fsdp_version"] == 2
    assert [section(f"deepspeed_zero{stage}", "deepspeed_config")["zero_stage"] for stage in (2, 3)] == [2, 3]


def test_processes_share_the_frames_of_a_teacher_and_all_get_the_anchors_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = tiny_policy()
    shares: list[Any] = []

    def anchors() -> Anchors:
        return compute_anchors(policy.model, policy.dataset, policy.collator, rows=np.arange(11), batch_size=4)

    def send(share: Any) -> Any:
        shares.append(share)
        raise InterruptedError

    alone = anchors()
    monkeypatch.setattr(distributed, "_is_distributed", lambda: True)
    monkeypatch.setattr(distributed, "exchange", send)
    for rank in (0, 1):  # what each process would send ...
        monkeypatch.setattr(distributed, "_world", lambda rank=rank: (2, rank))
        with pytest.raises(InterruptedError):
            anchors()
    assert [[len(batch[0]) for batch in share] for share in shares] == [[4, 3], [4, 3]]  # of 4, 4 and 3 frames
    monkeypatch.setattr(distributed, "exchange", lambda _: shares)  # ... and get
    together = anchors()
    assert all(torch.equal(tensor, together.tensors()[name]) for name, tensor in alone.tensors().items())


def test_a_checkpoint_saved_under_fsdp_is_refused_with_its_cure(tmp_path: Path) -> None:
    checkpoint = tmp_path / "stages/01/checkpoint-4"
    checkpoint.mkdir(parents=True)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (checkpoint / name).touch()
    check_continuable(checkpoint, sharded=False)
    cure = rf"under FSDP2 cannot be continued.*delete {checkpoint.parent}/checkpoint-\* to repeat the stage"
    with pytest.raises(ValueError, match=cure):
        check_continuable(checkpoint, sharded=True)
    (checkpoint / "optimizer.pt").rename(checkpoint / "optimizer.bin")  # as Accelerate names the optimiser of FSDP
    with pytest.raises(ValueError, match=cure):
        check_continuable(checkpoint, sharded=False)


@pytest.mark.parametrize("missing", ["optimizer.pt", "scheduler.pt", "rng_state*.pth"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_checkpoint_that_lacks_a_state_is_not_continued(tmp_path: Path, missing: str, processes: int) -> None:
    checkpoint = tmp_path / "checkpoint-4"
    checkpoint.mkdir()
    names = ["rng_state_0.pth", "rng_state_1.pth"] if processes == 2 else ["rng_state.pth"]
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", *names):
        (checkpoint / name).touch()
    check_continuable(checkpoint, sharded=False)
    for file in checkpoint.glob(missing):
        file.unlink()
    with pytest.raises(ValueError, match=rf"checkpoint-4 lacks {re.escape(missing)}, .*delete this checkpoint"):
        check_continuable(checkpoint, sharded=False)


def test_a_checkpoint_of_deepspeed_has_its_optimiser_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-4" / "global_step4").mkdir(parents=True)
    with pytest.raises(ValueError, match="lacks rng_state"):
        check_continuable(tmp_path / "checkpoint-4", sharded=False)
    (tmp_path / "checkpoint-4" / "rng_state_0.pth").touch()
    check_continuable(tmp_path / "checkpoint-4", sharded=False)


def test_a_sharded_model_has_the_adapter_the_base_and_the_teacher_of_a_whole_one(tmp_path: Path) -> None:
    """FSDP2 in this process alone; between two, see below."""
    policy = tiny_policy()
    config = InfoVLAConfig(output_dir=str(tmp_path), use_cpu=True, lora_r=4)
    model = add_adapter(policy.model, "one", config)
    rows = np.arange(5)

    def look() -> tuple[dict[str, Tensor], dict[str, str], dict[str, Tensor]]:
        anchors = compute_anchors(model, policy.dataset, policy.collator, rows=rows, batch_size=2)
        return adapter_weights(model, "one"), fingerprint(model), anchors.tensors()

    weights, base, anchors = look()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.get_base_model().language_model.model.layers:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert distributed.is_sharded(model)
        sharded_weights, sharded_base, sharded_anchors = look()
        assert distributed.is_sharded(model)
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
        whole = distributed.whole_state(model)
    finally:
        dist.destroy_process_group()
    assert whole is not None
    assert not any(isinstance(tensor, DTensor) for tensor in [*whole.values(), *sharded_weights.values()])
    assert sharded_base == base
    assert sharded_weights.keys() == weights.keys()
    assert all(torch.equal(sharded_weights[name], tensor) for name, tensor in weights.items())
    assert all(torch.equal(sharded_anchors[name], tensor) for name, tensor in anchors.items())


@pytest.mark.slow  # two more interpreters that import torch and transformers
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_processes_give_loss_gradient_and_adapter_of_one_with_twice_the_batch(engine: str, tmp_path: Path) -> None:
    """Through `accelerate launch`, with an odd batch per process and unequal numbers of replay samples."""
    cases = [case for case in CASES if engine == "ddp" or case != "vision"]  # kept vision features: tried on DDP alone
    launch_two(ROOT / "tests/two_processes.py", tmp_path / "two", *cases, engine=engine)
    for case in cases:
        one_step(case, tmp_path / "one")
        one, two = (json.loads((tmp_path / number / f"{case}.json").read_text()) for number in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-5, abs=1e-6), case
        for file in (f"{case}.safetensors", f"{case}/adapter_model.safetensors", f"{case}/model.safetensors"):
            if not (tmp_path / "one" / file).exists():
                continue
            one, two = (load_file(tmp_path / number / file) for number in ("one", "two"))
            assert one.keys() == two.keys()
            assert any(tensor.any() for tensor in one.values())
            for name, tensor in one.items():
                torch.testing.assert_close(two[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda t, n=name: f"{n}: {t}")
