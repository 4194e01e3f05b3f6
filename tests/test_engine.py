"""What FSDP and DeepSpeed cannot do is said before a stream begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from infovla_peft.config import InfoVLAConfig
from infovla_peft.engine import check_engine, is_sharded


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mir"}, "method='mir' looks at single parameters"),
        ({"method": "ewc"}, "method='ewc' looks at single parameters"),
        ({"log_gradients": True}, "log_gradients is not supported with FSDP or DeepSpeed"),
        ({"torch_compile": True}, "torch_compile is not supported with FSDP or DeepSpeed"),
        ({"method": "infovla"}, None),
    ],
)
def test_what_is_split_between_processes_is_not_looked_into(
    tmp_path: Path, options: dict[str, Any], message: str | None
) -> None:
    args = InfoVLAConfig(output_dir=str(tmp_path), use_cpu=True, **options)
    if message is None:
        check_engine(args, sharded=True)
        return
    with pytest.raises(ValueError, match=message):
        check_engine(args, sharded=True)


def test_a_launcher_says_whether_parameters_are_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = InfoVLAConfig(output_dir=str(tmp_path), use_cpu=True)
    assert not is_sharded(args)
    for name in ("FSDP", "DEEPSPEED"):
        with monkeypatch.context() as patch:
            patch.setenv(f"ACCELERATE_USE_{name}", "true")  # as `accelerate launch` sets it
            assert is_sharded(args)
    args.fsdp = ["full_shard"]
    assert is_sharded(args)
