"""The peak memory of a process."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_peak_of_memory_is_the_process_own_and_not_that_of_the_one_that_started_it():
    large = 900_000_000  # bytes; what is imported takes 520 MB
    child = "from llmx.runs.memory import peak_bytes; print(peak_bytes())"
    parent = f"import subprocess, sys; held = b'x' * {large}; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    result = subprocess.run([sys.executable, "-c", parent, child], capture_output=True, text=True, check=True, cwd=ROOT)
    assert 10_000_000 < int(result.stdout) < large
