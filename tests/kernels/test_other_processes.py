"""Run the Triton kernels in the interpreter, and compile them: each in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.mark.skipif(sys.platform != "linux", reason="triton exists for Linux only")
@pytest.mark.parametrize(
    ("cases", "extra"),
    [
        ("interpreter/cases_triton.py", {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}),
        ("interpreter/cases_estimates.py", {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}),
        ("interpreter/cases_patterns.py", {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}),
        ("ahead/cases_ahead.py", {"TRITON_INTERPRET": "0"}),
        ("ahead/cases_estimates_ahead.py", {"TRITON_INTERPRET": "0"}),
    ],
    ids=["interpreter", "interpreter_estimates", "interpreter_patterns", "ahead_of_time", "ahead_of_time_estimates"],
)
def test_in_its_own_process(cases: str, extra: dict[str, str]) -> None:
    path = os.pathsep.join([str(ROOT), str(HERE / "ahead"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE / cases)]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **extra, "PYTHONPATH": path}, capture_output=True, text=True
    )
    # 0 means that tests ran and passed: pytest exits with 5 where it collected none.
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
