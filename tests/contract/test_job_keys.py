"""API keys on SQLite and on PostgreSQL."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from job_standin import wait
from sqlalchemy import select

from finetune.errors import InvalidInput, NotFound
from finetune.jobs.database import open_database
from finetune.jobs.keys import KeyStore
from finetune.jobs.schema import api_keys


@pytest.fixture
def keys(database: str | Path) -> Iterator[KeyStore]:
    engine = open_database(database)
    yield KeyStore(engine)
    engine.dispose()


def test_a_key_is_known_by_its_secret_alone(keys: KeyStore) -> None:
    secret, key = keys.create("ada", ["jobs", "predict"])
    assert re.fullmatch(r"ft_[0-9a-f]{12}_[A-Za-z0-9_-]{43}", secret)
    verified = keys.verify(secret)
    assert verified is not None
    assert (verified.id, verified.owner, verified.scopes) == (key.id, "ada", frozenset({"jobs", "predict"}))
    tampered = secret[:-1] + ("A" if secret[-1] != "A" else "B")
    for wrong in (
        "",
        "ft",
        "ft_",
        "ft__",
        key.id,
        secret[:-1],
        secret + "x",
        "xx" + secret[2:],
        tampered,
        secret.upper(),
        f" {secret}",
    ):
        assert keys.verify(wrong) is None, wrong


def test_only_a_hash_of_the_secret_is_kept(keys: KeyStore) -> None:
    secret, _ = keys.create("ada", ["admin"])
    with keys.engine.connect() as connection:
        row = connection.execute(select(api_keys)).one()
    assert secret.split("_", 2)[2] not in str(row)
    assert len(row.secret_sha256) == 32


def test_an_expired_key_and_a_revoked_key_are_refused(keys: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    expiring, key = keys.create("ada", ["jobs"], lifetime_seconds=10)
    revoked, other = keys.create("bob", ["jobs"])
    assert keys.verify(expiring) is not None
    assert keys.any_usable()
    keys.revoke(other.id)
    keys.revoke(other.id)
    assert keys.verify(revoked) is None
    monkeypatch.setattr("finetune.jobs.keys.time", SimpleNamespace(time=lambda: key.created_at + 10))
    assert keys.verify(expiring) is None
    assert not keys.any_usable()
    assert [one.owner for one in keys.list()] == ["ada", "bob"]


def test_the_last_use_is_remembered(keys: KeyStore) -> None:
    secret, _ = keys.create("ada", ["predict"])
    assert keys.list()[0].last_used_at is None
    keys.verify(secret)
    wait(lambda: keys.list()[0].last_used_at is not None)  # written in the background


def test_a_scope_is_what_is_granted_and_admin_is_every_scope(keys: KeyStore) -> None:
    _, key = keys.create("ada", ["predict"])
    _, admin = keys.create("root", ["admin"])
    assert [key.allows(scope) for scope in ("predict", "jobs", "admin")] == [True, False, False]
    assert all(admin.allows(scope) for scope in ("predict", "jobs", "admin"))


def test_an_unknown_scope_and_no_scope_are_refused(keys: KeyStore) -> None:
    with pytest.raises(
        InvalidInput, match=r"unknown scope 'job'; allowed are predict, jobs, metrics, admin\. Did you mean 'jobs'"
    ):
        keys.create("ada", ["job"])
    with pytest.raises(InvalidInput, match="at least one scope"):
        keys.create("ada", [])
    assert keys.list() == []


def test_a_key_that_is_not_there_cannot_be_revoked(keys: KeyStore) -> None:
    with pytest.raises(NotFound, match="no API key 'nobody'"):
        keys.revoke("nobody")
