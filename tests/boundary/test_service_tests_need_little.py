"""The tests of PostgreSQL and Ray are collected in a small environment: the core, psycopg, Ray and pytest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

COLLECT = """
import sys

class Absent:
    names = {"torch", "timm", "onnx", "mlflow", "albumentations", "hypothesis", "schemathesis", "openai", "httpx2", "sklearn"}
    def find_spec(self, name, path=None, target=None):
        if name in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "--services", "--disable-plugin-autoload", "-p", "pytest_timeout"]))
"""


def test_they_import_nothing_that_is_not_in_their_environment() -> None:
    root = Path(__file__).resolve().parents[2]
    ended = subprocess.run([sys.executable, "-c", COLLECT], cwd=root, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout
    collected = [line for line in ended.stdout.splitlines() if "::" in line]
    assert {line.partition("::")[0].rpartition("/")[2] for line in collected} == {
        "test_file_store.py", "test_job_keys.py", "test_job_store.py", "test_ray_executor.py",
    }  # fmt: skip
