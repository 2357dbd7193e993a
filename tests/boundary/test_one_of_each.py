"""ONNX Runtime sessions, ONNX exports and the number of cores each come from one module, where their options are chosen."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("call", "module"),
    [
        ("InferenceSession(", "finetune/runtime/session.py"),
        ("torch.onnx.export(", "finetune/model/onnx_program.py"),
        ("sched_getaffinity(", "finetune/runtime/cores.py"),
        ("os.cpu_count()", "finetune/runtime/cores.py"),
    ],
)
def test_one_module_makes_the_call(call: str, module: str) -> None:
    sources = [path for package in ("finetune", "service") for path in (ROOT / package).rglob("*.py")]
    assert len(sources) > 400
    found = [path.relative_to(ROOT).as_posix() for path in sources if call in path.read_text(encoding="utf-8")]
    assert found == [module]
