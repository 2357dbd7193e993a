"""Limits on requests, in bytes and seconds. Constants only."""

from __future__ import annotations

KIB = 1024
MIB = 1024 * KIB

MAX_CONNECTIONS = 512
MAX_HEAD_BYTES = 32 * KIB  # request line and headers
HEAD_SECONDS = 10.0  # from the first byte of a connection, or of a request on it, to the end of the headers
KEEP_ALIVE_SECONDS = 15.0  # how long an idle connection stays open after a response

MAX_JSON_BYTES = MIB  # of bodies, unless a route allows more
MULTIPART_OVERHEAD_BYTES = 64 * KIB  # boundaries, part headers and the small fields beside an image
BODY_SILENCE_SECONDS = 20.0  # longest pause of a body that was faster than the minimum rate
BODY_MIN_BYTES_PER_SECOND = 4 * KIB
MAX_BUFFERED_BYTES = 256 * MIB  # of all bodies in memory together
SEND_SECONDS = 60.0  # a client that reads nothing of its response for this long is disconnected

HEALTH_CHECKS = ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready")  # health checks of container platforms
