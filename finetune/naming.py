"""Names of models: one place makes them from folders and files."""

from __future__ import annotations


def as_model_name(text: str) -> str:
    """Return a folder's name as a model's name: lower case, anything but letters and digits a dash."""
    kept = "".join(character if character.isascii() and character.isalnum() else "-" for character in text.lower())
    return kept.strip("-")[:63] or "model"
