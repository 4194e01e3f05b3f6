"""What an adapter of 100 MB costs to load beyond its base, on a local disk: `python tests/adapter_loading.py`.

A base of 24 layers of width 512 and an adapter on all its linear layers are written to a temporary folder. Then the
base alone and the policy (the same base, its fingerprint, the adapter, its checksums) are loaded in turns, each once
unmeasured.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from tiny_run import STATISTICS

from infovla_peft import load_policy
from infovla_peft.adapter_files import WEIGHTS, AdapterInfo
from infovla_peft.adapters import add_adapter, fingerprint, save_adapter
from infovla_peft.config import InfoVLAConfig
from infovla_peft.models.openvla import build_tiny_openvla, load_openvla
from infovla_peft.progress import quiet_libraries

ROUNDS = 5


def write(folder: Path) -> Path:
    """Base and adapter; the adapter's folder."""
    model, processor = build_tiny_openvla(
        instructions=["open the drawer"], hidden_size=512, layers=24, heads=8, norm_stats=STATISTICS
    )
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    info = AdapterInfo("../base", fingerprint(model), "libero_10", task="open_the_drawer", stage=1)
    config = InfoVLAConfig(output_dir=str(folder), lora_r=112, use_cpu=True, report_to="none")
    return save_adapter(add_adapter(model, "one", config), "one", folder / "adapter", info, STATISTICS)


def main() -> None:
    quiet_libraries(loading_bars=False)
    with tempfile.TemporaryDirectory() as temporary:
        adapter = write(Path(temporary))
        base, policy = [], []
        for _ in range(ROUNDS + 1):
            for times, load in (
                (base, lambda: load_openvla(Path(temporary) / "base")),
                (policy, lambda: load_policy(adapter)),
            ):
                start = time.perf_counter()
                load()
                times.append(time.perf_counter() - start)
        size = (adapter / WEIGHTS).stat().st_size / 1e6
        alone, whole = statistics.median(base[1:]), statistics.median(policy[1:])
        print(f"adapter of {size:.0f} MB: base {alone:.2f} s, policy {whole:.2f} s, the adapter {whole - alone:.2f} s")


if __name__ == "__main__":
    sys.exit(main())
