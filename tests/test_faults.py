"""Faults injected into whole runs, see `fault_harness.py`: a few of each here, by the hundred with `-m slow`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.libero  # task names and instructions come from LIBERO's package
KINDS = 16


def inject(output: Path, *options: str) -> list[dict[str, object]]:
    """Run the harness and give its table."""
    repository = Path(__file__).parents[1]
    paths = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("fault_harness.py")), str(output), *options],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert output.exists(), done.stdout + done.stderr
    rows: list[dict[str, object]] = json.loads(output.read_text())
    assert [row["problems"] for row in rows] == [[] for _ in rows], done.stdout
    assert done.returncode == 0
    print(done.stdout)
    return rows


def test_a_few_faults_lose_nothing(tmp_path: Path) -> None:
    rows = inject(tmp_path / "faults.json", "--short")
    assert rows
    assert all(row["injected"] == row["planned"] for row in rows)
    assert not list(tmp_path.glob("*.cases"))  # nothing is left to go on with


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_faults_by_the_hundred_lose_nothing(tmp_path: Path) -> None:
    rows = {str(row["fault"]): row for row in inject(tmp_path / "faults.json")}
    kills = sum(int(str(row["injected"])) for fault, row in rows.items() if fault.startswith("SIGKILL"))
    assert len(rows) == KINDS
    assert kills >= 100
