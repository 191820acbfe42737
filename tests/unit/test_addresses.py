"""What an address is, and that no password of it is shown."""

import re
from pathlib import Path

import pytest

from dspex_persist.addresses import DatabaseUrl, database_url, shown
from dspex_persist.extras import how_to_install
from dspex_persist.settings import SettingsError, load_settings
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.wiring import databases
from dspex_persist.wiring.connecting import connect, is_there, list_workers
from dspex_persist.wiring.places import place_of

URL = "postgresql://me:secret@host:5432/db?schema=shop"


@pytest.mark.parametrize("url", [URL, "postgres://host/db", "PostgreSQL://host/db"])
def test_a_url_of_a_database(url: str) -> None:
    place = place_of(url)
    assert place == DatabaseUrl("postgresql", url)
    assert place_of(place) is place
    assert load_settings({"db": url}).db == place
    assert is_there(url)


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        (URL, "postgresql://me:***@host:5432/db?schema=shop"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("postgresql://me:se/cr@et@host/db", "postgresql://me:***@host/db"),
        ("postgresql://:secret@/db", "postgresql://:***@/db"),
        ("postgresql://host/db?password=secret&schema=x", "postgresql://host/db?password=***&schema=x"),
        ("postgresql://host/db?sslpassword=secret", "postgresql://host/db?sslpassword=***"),
        ("mysql://me:secret@host/db", "mysql://me:***@host/db"),
        ("redis://:secret/0", "redis://:***"),
        ("postgresql://me:sec/ret?schema=x", "postgresql://me:***"),
        ("postgresql://one:5432,two:5433/db?schema=x", "postgresql://one:5432,two:5433/db?schema=x"),
        ("redis://[::1]:6379/0", "redis://[::1]:6379/0"),
        ("redis+unix:///a:b?db=1", "redis+unix:///a:b?db=1"),
        ("/a/path", "/a/path"),
    ],
)
def test_passwords_are_not_shown(url: str, safe: str) -> None:
    assert shown(url) == safe
    place = database_url(url)
    if place is not None:
        assert str(place) == safe
        assert "secret" not in repr(place)


@pytest.mark.parametrize("db", ["mysql://me:secret@host/db", "grpc://127.0.0.1:50051"])
def test_other_schemes_are_refused_as_a_setting(db: str) -> None:
    with pytest.raises(SettingsError, match=r"the path of a file, or postgresql://USER@HOST/DATABASE") as refused:
        load_settings({"db": db})
    assert "secret" not in str(refused.value)


def test_other_schemes_are_refused_as_an_address() -> None:
    with pytest.raises(InvalidArgumentError, match=r"sqlite:///PATH, postgresql://USER@HOST/DATABASE, ") as refused:
        connect("mysql://me:secret@host/db")
    assert "secret" not in str(refused.value)
    with pytest.raises(InvalidArgumentError, match="did you mean 'postgresql://host/db'"):
        connect("postgressql://host/db")


def test_a_file_may_be_named_by_a_url() -> None:
    assert load_settings({"db": "sqlite:///folder/file.db"}).db == Path("folder/file.db")


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(databases, "find_spec", lambda _: None)
    with pytest.raises(InvalidArgumentError, match=f"needs psycopg.*{re.escape(how_to_install('postgresql'))}"):
        connect(URL)


def test_a_database_has_no_workers() -> None:
    with pytest.raises(InvalidArgumentError, match=r"me:\*\*\*@host.*is a database, and only servers have workers"):
        list_workers(URL)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me:se/cret@host/db",
        "postgresql://me:sec@ret@host/db",
        "postgresql://me:secret@host:port/db",
        "postgresql://me:secret@host/db?schema=",
        "postgresql://me:secret@host/db?schema=a&schema=b",
        "postgresql://me:secret@host/db?schema=%00",
        f"postgresql://me:secret@host/db?schema={'%C3%A9' * 32}",
        "postgresql://me:sec%ZZret@host/db",
        "postgresql://me:secret@host/db?unknown=1",
    ],
)
def test_a_malformed_url_is_refused_without_its_password(url: str) -> None:
    pytest.importorskip("psycopg")
    with pytest.raises(InvalidArgumentError, match=r"me:\*\*\*@host") as refused:
        connect(url)
    assert "cret" not in str(refused.value)
