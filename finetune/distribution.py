"""The project's name on the package index, and the command that installs one of its extras.

The import name and the command are ``finetune``, but the distribution of that name on the package index is another project.
"""

from __future__ import annotations

DISTRIBUTION = "finetune-images"


def install_command(extra: str) -> str:
    """Return the shell command that installs the optional dependencies called `extra`, for use in error messages."""
    return f"pip install '{DISTRIBUTION}[{extra}]'"
