"""What the tests of PostgreSQL need."""

from collections.abc import Iterator
from typing import Any

import pytest

from dspex_persist.state.distributed import PostgresState
from tests.addressed import run  # noqa: F401 - a fixture
from tests.engines import Databases
from tests.helped import helpers, short_ranges  # noqa: F401 - fixtures


def fill(url: str) -> None:
    """Have something in each table of the log."""
    with PostgresState(url) as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 1, metadata={"unit": "m"})
        state.register_variable("s", "large", "string", "x" * 5000)


@pytest.fixture
def url(postgres: Databases) -> Iterator[str]:
    """A new, empty database for a test."""
    url = postgres.create()
    yield url
    postgres.drop(url)


@pytest.fixture
def filled(postgres: Databases) -> Iterator[str]:
    """A database with something in it, for a test."""
    url = postgres.copy("filled", fill)
    yield url
    postgres.drop(url)


@pytest.fixture
def connection(url: str) -> Iterator[Any]:
    """A plain connection to `url`."""
    psycopg = pytest.importorskip("psycopg")
    with psycopg.connect(url, autocommit=True) as connection:
        yield connection
