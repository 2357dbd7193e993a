"""The documents that clients send and receive, as Pydantic models."""
