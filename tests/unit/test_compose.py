"""docker/compose.yaml: every container is confined, and nothing is published beyond this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

DOCKER = Path(__file__).resolve().parents[2] / "docker"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


@pytest.mark.parametrize("name", SERVICES)
def test_every_container_is_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["user"] not in ("", "root", "0", "0:0")
    assert {"pids_limit", "mem_limit", "tmpfs"} <= service.keys()
    assert not service.keys() & {"privileged", "cap_add", "devices", "network_mode", "pid"}
    assert not [volume for volume in service["volumes"] if "docker.sock" in volume or volume.startswith("/")]


def test_ports_are_published_on_loopback_alone() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_images_end_as_a_user_without_rights() -> None:
    files = sorted(DOCKER.glob("*.Dockerfile"))
    assert len(files) == 2
    for file in files:
        users = [line.split()[1] for line in file.read_text().splitlines() if line.startswith("USER ")]
        assert users[-1:] == ["finetune"], file.name
