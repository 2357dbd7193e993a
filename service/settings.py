"""The server's settings: environment variables, read once at start.

`finetune serve` sets them from its options; in a container the operator sets them.
"""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from finetune.bundle.image_limits import ImageLimits
from finetune.bundle.predictor import PROVIDERS, Provider
from finetune.errors import InvalidInput
from finetune.jobs.sending import Network
from finetune.monitoring.samples import SamplingPolicy
from finetune.runtime.cores import available_cores
from finetune.runtime.logs import wants_json

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class ServerSettings:
    """One server's settings.

    Args:
        home: the workspace.
        models: the registry's folder, if it is not ``home/models``; in a bento, the folder inside it.
        model: the model for ``POST /predict``: a registered ``name``, ``name@version`` or ``name@alias``, or a bundle folder;
            None: the default of the registry, which promotions change.
        threads: number of concurrent predictions, each on one core.
        allowed_hosts: accepted values of the ``Host`` header, against DNS rebinding.
        cors_origins: origins (``https://app.example``) whose pages may use this server from a browser; by default none.
        image_limits: limits on the size of images, as in training.
        watch_seconds: interval of checking the registry for changes.
        max_loaded_models: number of models in memory besides the default one; the least recently used is evicted.
        max_loaded_bytes: limit on the total size of their ``model.onnx`` files.
        data_roots: folders in which jobs may name datasets and weights by path; without any, datasets must be uploaded.
        max_upload_bytes: largest size of an uploaded archive.
        max_files_bytes: limit on the disk space of one owner's uploads, finished jobs and models.
        max_unfinished_jobs: limit on one owner's queued and running jobs.
        hub_models: allow models on the Hugging Face hub (``hf-hub:OWNER/NAME``), which are then downloaded.
        worker: also run a worker, which executes jobs.
        provider: ONNX Runtime's execution provider; each model's outputs are compared with the CPU's when it is loaded.
        json_logs: write the log as JSON lines.
        webhook_networks: networks to which webhooks may be sent, besides public addresses.
        onnxruntime_web: the folder of the npm package, for exports as a page; need not exist.
        sampling: which images of prediction requests are stored for monitoring; by default none.
    """

    home: Path
    models: Path | None = None
    model: str | None = None
    threads: int = 1
    allowed_hosts: tuple[str, ...] = LOOPBACK_HOSTS
    cors_origins: tuple[str, ...] = ()
    image_limits: ImageLimits = field(default_factory=ImageLimits)
    watch_seconds: float = 1.0
    max_loaded_models: int = 8
    max_loaded_bytes: int = 2 << 30
    data_roots: tuple[Path, ...] = ()
    max_upload_bytes: int = 2 << 30
    max_files_bytes: int = 20 << 30
    max_unfinished_jobs: int = 100
    hub_models: bool = False
    worker: bool = False
    provider: Provider = "cpu"
    json_logs: bool = False
    webhook_networks: tuple[Network, ...] = ()
    onnxruntime_web: Path = Path("node_modules/onnxruntime-web")
    sampling: SamplingPolicy = field(default_factory=SamplingPolicy)

    @property
    def models_folder(self) -> Path:
        return self.models or self.home / "models"

    @property
    def files_folder(self) -> Path:
        return self.home / "files"

    def answering_to(self, address: str) -> ServerSettings:
        """Return the settings with an IP address added to the allowed hosts."""
        name = f"[{address}]" if ":" in address else address
        return self if name in self.allowed_hosts else replace(self, allowed_hosts=(*self.allowed_hosts, name))

    @staticmethod
    def from_environment(environment: Mapping[str, str] = os.environ) -> ServerSettings:
        """Read the settings from environment variables. Raises InvalidInput for an invalid value."""
        names = _names(environment, "FINETUNE_ALLOWED_HOSTS")
        return ServerSettings(
            home=Path(environment.get("FINETUNE_HOME", ".finetune")).absolute(),
            model=environment.get("FINETUNE_MODEL") or None,
            threads=_positive(environment, "FINETUNE_THREADS", default=available_cores()),
            allowed_hosts=(*LOOPBACK_HOSTS, *names),
            cors_origins=_names(environment, "FINETUNE_CORS_ORIGINS"),
            max_loaded_models=_positive(environment, "FINETUNE_MAX_LOADED_MODELS", default=8),
            max_loaded_bytes=_positive(environment, "FINETUNE_MAX_LOADED_BYTES", default=2 << 30),
            data_roots=tuple(
                Path(root).absolute() for root in environment.get("FINETUNE_DATA_ROOTS", "").split(os.pathsep) if root
            ),
            max_upload_bytes=_positive(environment, "FINETUNE_MAX_UPLOAD_BYTES", default=2 << 30),
            max_files_bytes=_positive(environment, "FINETUNE_MAX_FILES_BYTES", default=20 << 30),
            max_unfinished_jobs=_positive(environment, "FINETUNE_MAX_UNFINISHED_JOBS", default=100),
            hub_models=_one_of(environment, "FINETUNE_HUB_MODELS", ("0", "1"), default="0") == "1",
            worker=environment.get("FINETUNE_WORKER", "") == "1",
            provider=_one_of(environment, "FINETUNE_PROVIDER", tuple(PROVIDERS), default="cpu"),  # type: ignore[arg-type]
            webhook_networks=_networks(environment, "FINETUNE_WEBHOOK_NETWORKS"),
            onnxruntime_web=Path(environment.get("FINETUNE_ONNXRUNTIME_WEB") or "node_modules/onnxruntime-web"),
            sampling=SamplingPolicy(
                fraction=_share(environment, "FINETUNE_SAMPLE_INPUTS"),
                max_bytes=_positive(environment, "FINETUNE_SAMPLE_BYTES", default=1 << 30),
                max_age_seconds=86400.0 * _positive(environment, "FINETUNE_SAMPLE_DAYS", default=30),
            ),
            json_logs=wants_json(environment),
        )


def _names(environment: Mapping[str, str], variable: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in environment.get(variable, "").split(",") if name.strip())


def _networks(environment: Mapping[str, str], name: str) -> tuple[Network, ...]:
    try:
        return tuple(ipaddress.ip_network(text) for text in _names(environment, name))
    except ValueError as error:
        raise InvalidInput(f"{name}: {error}; give networks such as 10.0.0.0/8, separated by commas") from None


def _one_of(environment: Mapping[str, str], name: str, allowed: tuple[str, ...], default: str) -> str:
    value = environment.get(name, "") or default
    if value not in allowed:
        raise InvalidInput(f"{name}={value!r}: must be one of {', '.join(allowed)}")
    return value


def _share(environment: Mapping[str, str], name: str) -> float:
    text = environment.get(name, "") or "0"
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise InvalidInput(f"{name}={text!r}: must be a share between 0 and 1, as in 0.01 for one image of a hundred")
    return value


def _positive(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "")
    if not text:
        return default
    if not text.isdecimal() or int(text) < 1:
        raise InvalidInput(f"{name}={text!r}: a whole number of at least 1 is needed")
    return int(text)
