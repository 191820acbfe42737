"""Executions of tools in tests, their results, and the files in which tools say how far they are."""

import json
from pathlib import Path
from typing import Any

from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.model import ToolOutcome
from tests.end_to_end.old_style import wait_until


def execute(provider: BridgedState, session: str, tool: str, /, **parameters: Any) -> ToolOutcome:
    return provider.execute_tool(session, tool, parameters)


def result_of(outcome: ToolOutcome) -> Any:
    assert outcome.success, outcome
    assert outcome.result is not None
    return json.loads(outcome.result.json)


def until_there(path: Path) -> str:
    """The text of a file as soon as it has one; of one that ends in `.at`, as soon as it is there."""
    wait_until(lambda: path.exists() and (path.suffix == ".at" or path.read_text()), f"{path} is there")
    return path.read_text()
