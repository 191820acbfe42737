"""PostgreSQL takes each statement that the store has for both databases, also those that no other test runs there."""

import importlib
import pkgutil
import re
from collections.abc import Iterator
from itertools import count
from types import ModuleType
from typing import Any, Final

import psycopg
from sqlalchemy import TextClause

from dspex_persist.state import store
from dspex_persist.state.store.dialect import translated
from tests.architecture.test_sql import STATEMENT

# What only a file needs, and what `postgres` has in a form of its own.
_OF_FILES: Final = {
    *("engine", "guard", "inherited", "maintenance", "migrate", "names", "postgres", "recovery", "untouched"),
    "history.views",
}
_PARTS: Final = {"denials._OLD", "history.lists._REASONS", "history.versions._MAKER"}
"""Parts of statements."""
_FOR_FILES: Final = {"verify.lm_calls._RECORDED"}
"""What is for files alone, though its module is not."""


def modules() -> Iterator[tuple[str, ModuleType]]:
    for each in pkgutil.walk_packages(store.__path__, f"{store.__name__}."):
        name = each.name.removeprefix(f"{store.__name__}.")
        if not {name, name.partition(".")[0]} & _OF_FILES:
            yield name, importlib.import_module(each.name)


def statements() -> dict[str, str]:
    """Return the statements among the constants, each under its name; without those that are completed later."""
    found = dict[str, str]()
    for module_name, module in modules():
        for name, constant in vars(module).items():
            text = constant.text if isinstance(constant, TextClause) else constant
            if name != "__doc__" and isinstance(text, str) and STATEMENT.search(text) and "{" not in text:
                found[f"{module_name}.{name}"] = text
    return {name: text for name, text in found.items() if name not in _PARTS | _FOR_FILES}


def fault_of(connection: psycopg.Connection[Any], statement: str) -> str | None:
    """Return what PostgreSQL says against a statement; its parameters may have any types."""
    text, _ = translated(re.sub(r"(?<![:\w]):\w+", "?", statement))
    numbers = count(1)
    prepared = re.sub("%s", lambda _: f"${next(numbers)}", text).replace("%%", "%")
    try:
        connection.execute(f"PREPARE checked AS {prepared}")
    except psycopg.Error as error:
        return str(error)
    connection.execute("DEALLOCATE checked")
    return None


def test_postgresql_takes_each_statement(filled: str) -> None:
    every = statements()
    with psycopg.connect(filled, autocommit=True) as connection:
        faults = {name: fault for name, text in every.items() if (fault := fault_of(connection, text)) is not None}
    assert faults == {}
    assert len(every) > 100


def test_the_check_finds_what_only_sqlite_takes(filled: str) -> None:
    with psycopg.connect(filled, autocommit=True) as connection:
        for statement in (
            "INSERT OR IGNORE INTO denials (count) VALUES (?)",
            "INSERT INTO denials (count) VALUES (?) ON CONFLICT (at / 60000000) DO NOTHING",
            "SELECT sum(count > 1) FROM denials",
        ):
            assert fault_of(connection, statement) is not None
