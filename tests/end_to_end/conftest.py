"""What tests of tools begin with. A module says itself what its `server` and the `path` of its database are."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from dspex_persist.infra.process import ServerProcess
from tests.end_to_end.old_style import Gate, Journal, OldClient, target_of

_get_command = typer.main.get_command


@cache
def whole_tree(app: typer.Typer) -> Any:
    """Return the tree of all commands, in which each knows the names of the option for help.

    A command takes them from its first context, and keeps them: that may be one without those around it.
    """
    command = _get_command(app)
    _ask_for_help(command, None)
    return command


def _ask_for_help(command: Any, parent: Any) -> None:
    context = command.context_class(command, info_name=command.name, parent=parent, **command.context_settings)
    command.get_help_option(context)
    for each in getattr(command, "commands", {}).values():
        _ask_for_help(each, context)


@pytest.fixture(scope="session", autouse=True)
def one_command_line() -> Iterator[None]:
    """Have commands that run in this process share the tree of all commands, as making it takes as long as they do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", whole_tree)
        yield


@pytest.fixture
def client(server: ServerProcess, request: pytest.FixtureRequest) -> Iterator[OldClient]:
    """A session of the test's own."""
    opened = OldClient(target_of(server), request.node.name)
    yield opened
    opened.close()


@pytest.fixture
def journal(path: Path) -> Journal:
    return Journal(path)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    made = Gate(tmp_path / "gate")
    yield made
    # A test that failed half-way must not keep a thread of the server.
    made.open()
