"""What is built for a request."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_bundle import write_tiny_bundle
from tiny_runs import shared_at, tiny_spec

from finetune.bundle.registry import Registry
from finetune.errors import UnknownBackbone
from finetune.runs.build import seeded_backbone


def test_the_name_of_ones_own_model_is_no_backbone_and_says_which_version_would_be(tmp_path: Path) -> None:
    shared = shared_at(tmp_path / "home")
    write_tiny_bundle(tmp_path / "bundle")
    Registry(shared.workspace.models).register(tmp_path / "bundle", "trees")
    with pytest.raises(UnknownBackbone, match=r"trees is a model of your own.*: trees@1 is the newest"):
        seeded_backbone(tiny_spec(tmp_path, model="trees"), shared)
    with pytest.raises(UnknownBackbone, match="no architecture 'treez'"):
        seeded_backbone(tiny_spec(tmp_path, model="treez"), shared)
