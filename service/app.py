"""The BentoML service, for `bentoml serve` and `bentoml build`. Settings come from environment variables, as in a container; a
bento serves the model that it was built with.

All requests go to the ASGI application of `service.asgi`. BentoML's own routes would parse bodies themselves (and fetch a URL
that is given instead of a file), return errors in three other forms, and stop an upload after a minute. Therefore BentoML's app
handles only start-up and shut-down; it also provides the description of `Service.predict` for its client in ``/schema.json``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from finetune.bento import models_in_bento
from service.asgi import create_api, with_middleware
from service.bento import build_service
from service.settings import ServerSettings

_settings = ServerSettings.from_environment()
if _settings.model is None:
    _settings = replace(_settings, models=models_in_bento(Path(__file__).resolve().parents[1]))

_api = create_api(_settings, supervised=True)

Service = build_service(with_middleware(_api, _settings), _api, threads=_settings.threads)
