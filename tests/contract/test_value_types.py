"""A value type is one file and a line that registers it: the example in docs/architecture.md, with every backend."""

import importlib.util
import sys
from collections.abc import Iterator
from datetime import date, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dspex_persist import Context, LocalState, connect
from dspex_persist.cognitive.variables import decode
from dspex_persist.state import commands, values
from dspex_persist.state.errors import InvalidConstraintsError, InvalidValueError, UnknownTypeError, VariableExistsError
from dspex_persist.state.model import Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.values.registry import register, unregister
from dspex_persist.testing.server import ServedDatabase
from dspex_persist.testing.tool_contract import Client
from tests.end_to_end.programs import programs_of

(DATE,) = programs_of("docs/architecture.md")
# A server process needs the same: the registered type, and a tool that uses it.
TOOLS = '''
from datetime import date, timedelta

from dspex_persist import Toolbox, tool
from dspex_persist.state.values import find_type
from dspex_persist.state.values.registry import register
from date_type import DATE

if find_type(DATE.name) is None:
    register(DATE)


@tool
def days_later(day: date, days: int = 1) -> date:
    """A later day."""
    return day + timedelta(days=days)


TOOLS = Toolbox()
TOOLS.add(days_later)
'''
FEBRUARY = {"earliest": "2026-02-01", "latest": "20260228"}
BACKENDS = ("memory", "file", "server")


def _imported(name: str, folder: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the type and the tool to files, for this process and a server."""
    folder = tmp_path_factory.mktemp("date")
    (folder / "date_type.py").write_text(DATE.text)
    (folder / "date_tools.py").write_text(TOOLS)
    return folder


@pytest.fixture(scope="module")
def tools(folder: Path) -> Iterator[Any]:
    """The tool, while the type is registered."""
    known = values.type_names()
    date_type = _imported("date_type", folder)
    yield _imported("date_tools", folder).TOOLS
    unregister(date_type.DATE)
    assert values.type_names() == known
    del sys.modules["date_type"], sys.modules["date_tools"]


@pytest.fixture(scope="module", params=BACKENDS)
def provider(request: pytest.FixtureRequest, tools: Any, folder: Path) -> Iterator[StateProvider]:
    """A backend with the type."""
    path = folder / f"{request.param}.db"
    if request.param == "memory":
        with LocalState(tools=tools) as local:
            yield local
    elif request.param == "file":
        with connect(path, tools=tools) as embedded:
            yield embedded
    else:
        settings = {"tools": "date_tools:TOOLS"}
        with ServedDatabase(path, settings, import_from=folder) as served, connect(served.url) as bridged:
            yield bridged


@pytest.fixture
def client(provider: StateProvider) -> Client:
    return Client(provider, {})


def test_values_are_returned_unchanged(client: Client) -> None:
    provider, session = client.provider, client.session
    provider.register_variable(session, "day", "date", date(2026, 2, 27))
    provider.set_variable(session, "day", date(2026, 2, 28))
    provider.submit(commands.SetVariable(session, "day", Value('"20260301"'))).result()
    variable = provider.get_variable(session, "day")
    assert (variable.type, variable.value, decode(variable)) == ("date", Value('"2026-03-01"'), date(2026, 3, 1))
    history = provider.get_variable_history(session, "day")
    assert [decode(version) for version in history] == [date(2026, 3, 1), date(2026, 2, 28), date(2026, 2, 27)]
    assert decode(provider.rollback_variable(session, "day", 0)) == date(2026, 2, 27)


@pytest.mark.parametrize(("text", "shown"), [('"soon"', '"soon"'), ("20260228", "20260228"), ("null", "null")])
def test_an_invalid_value_is_refused(client: Client, text: str, shown: str) -> None:
    client.provider.register_variable(client.session, "day", "date", date(2026, 2, 28))
    with pytest.raises(InvalidValueError) as caught:
        client.provider.submit(commands.SetVariable(client.session, "day", Value(text))).result()
    assert caught.value.reason == f'a date is a string such as "2026-02-28", not {shown}'


def test_constraints_are_enforced(client: Client) -> None:
    provider, session = client.provider, client.session
    provider.register_variable(session, "day", "date", date(2026, 2, 28), constraints=FEBRUARY)
    for day, reason in (
        (date(2026, 3, 1), "2026-03-01 is after 2026-02-28"),
        (date(2026, 1, 1), "2026-01-01 is before"),
    ):
        with pytest.raises(InvalidValueError, match=reason):
            provider.set_variable(session, "day", day)
    assert provider.get_variable(session, "day").version == 0
    for stated, reason in (
        ({"earliest": 1}, "earliest: a date is a string"),
        ({"earliest": "2026-02-02", "latest": "2026-02-01"}, "earliest .* is above latest"),
    ):
        with pytest.raises(InvalidConstraintsError, match=reason):
            provider.register_variable(session, "other", "date", date(2026, 2, 1), constraints=stated)
    with pytest.raises(VariableExistsError):
        provider.register_variable(session, "day", "string", "2026-02-28")


def test_it_is_inferred(provider: StateProvider, client: Client) -> None:
    context = Context(client.session, provider)
    context.define("day", date(2026, 2, 28))
    assert context.info("day").type == "date"
    assert context.variables["day"] == date(2026, 2, 28)
    with pytest.raises(InvalidValueError, match=r"datetime has no JSON form: use its isoformat\(\)"):
        context.define("moment", datetime(2026, 2, 28))  # noqa: DTZ001 -- it is refused


def test_parameters_of_tools_are_described_by_it(tools: Any, client: Client) -> None:
    (spec,) = tools.specs()
    assert [(parameter.name, parameter.type) for parameter in spec.parameters] == [("day", "date"), ("days", "integer")]
    assert client.get("days_later", day=date(2026, 2, 28)) == "2026-03-01"
    assert client.execute("days_later", day="soon").error_code == "INVALID_PARAMETERS"


def test_the_type_is_unknown_without_registration(tools: Any) -> None:
    date_type = values.find_type("date")
    assert date_type is not None
    with pytest.raises(ValueError, match="registered already"):
        register(date_type)
    unregister(date_type)
    try:
        with pytest.raises(ValueError, match="not registered"):
            unregister(date_type)
        with LocalState() as provider:
            provider.initialize_session("s")
            with pytest.raises(UnknownTypeError):
                provider.register_variable("s", "day", "date", "2026-02-28")
            with pytest.raises(InvalidValueError, match="date has no JSON form"):
                Context("s", provider).define("day", date(2026, 2, 28))
    finally:
        register(date_type)
