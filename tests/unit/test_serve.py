"""The address and the settings that the server is started with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from finetune.bundle.image_limits import ImageLimits
from finetune.errors import InvalidInput
from finetune.runtime.cores import available_cores
from service.server import listen_address
from service.settings import LOOPBACK_HOSTS, ServerSettings


@pytest.mark.parametrize(
    ("host", "address"), [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("::1", "::1"), ("127.0.0.5", "127.0.0.5")]
)
def test_loopback_addresses_are_listened_on(host: str, address: str) -> None:
    assert listen_address(host, has_api_key=False) == address


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "8.8.8.8"])
def test_an_address_that_others_reach_needs_an_api_key(host: str) -> None:
    with pytest.raises(InvalidInput, match="no API key"):
        listen_address(host, has_api_key=False)
    assert listen_address(host, has_api_key=True) == host


def test_a_name_is_not_an_address() -> None:
    with pytest.raises(InvalidInput, match="IP address"):
        listen_address("photos.example", has_api_key=True)


def test_the_command_line_refuses_in_one_sentence() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "service", "--host", "0.0.0.0"], check=False, capture_output=True, text=True, timeout=240
    )
    assert ran.returncode == 2
    assert ran.stderr.startswith("error: --host 0.0.0.0: others could reach this address")
    assert "Traceback" not in ran.stderr


def test_a_server_answers_to_the_address_that_it_listens_on() -> None:
    settings = ServerSettings(Path("/data"))
    assert settings.answering_to("192.168.1.7").allowed_hosts == (*LOOPBACK_HOSTS, "192.168.1.7")
    assert settings.answering_to("::1").allowed_hosts == LOOPBACK_HOSTS
    assert settings.answering_to("fd00::7").allowed_hosts == (*LOOPBACK_HOSTS, "[fd00::7]")


def test_settings_are_read_from_the_environment_with_sound_defaults() -> None:
    default = ServerSettings.from_environment({"FINETUNE_HOME": "/data"})
    web = Path("node_modules/onnxruntime-web")
    assert default == ServerSettings(Path("/data"), threads=available_cores(), onnxruntime_web=web)
    assert (default.allowed_hosts, default.image_limits) == (LOOPBACK_HOSTS, ImageLimits())
    given = ServerSettings.from_environment(
        {
            "FINETUNE_HOME": "/data",
            "FINETUNE_MODEL": "a@1",
            "FINETUNE_THREADS": "3",
            "FINETUNE_ALLOWED_HOSTS": "a.example, b.example",
        }
    )
    assert (given.model, given.threads) == ("a@1", 3)
    assert given.allowed_hosts == (*LOOPBACK_HOSTS, "a.example", "b.example")


@pytest.mark.parametrize("value", ["0", "-1", "two", "1.5"])
def test_a_setting_that_is_no_number_is_named(value: str) -> None:
    with pytest.raises(InvalidInput, match="FINETUNE_THREADS"):
        ServerSettings.from_environment({"FINETUNE_THREADS": value})


@pytest.mark.parametrize(
    ("quota", "most"), [("max 100000", 10**6), ("100000 100000", 1), ("50000 100000", 1), ("400000 100000", 4)]
)
def test_a_containers_cpu_quota_bounds_the_cores(tmp_path: Path, quota: str, most: int) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(quota + "\n")
    assert 1 <= available_cores(file) <= most
    assert available_cores(file) <= available_cores(tmp_path / "none")
