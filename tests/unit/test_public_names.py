"""What completion shows of the objects that programs use: no internals, and nothing that no page explains."""

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from dspex_persist import Context, ToolContext, tool

DOCS = Path(__file__).parents[2] / "docs"

VARIABLES = {
    *("define", "define_many", "delete", "dependencies", "dependents", "depends_on", "get", "get_many", "handle"),
    *("history", "info", "items", "keys", "list", "names", "optimization", "optimize", "remove_dependency", "rollback"),
    *("programs", "session_id", "set", "strict", "update", "update_many", "v", "values", "variables"),
}
CONTEXT = VARIABLES | {
    *("aclose", "aopen", "audit", "backend", "call", "close", "closed", "derive", "describe", "end", "ensure_bridged"),
    *("ensure_persistent", "execute", "fork", "move_to", "recording", "remove_rule", "resumed", "rollback_to"),
    *("rule", "rules", "transaction", "transactions", "wait_for", "watch"),
}
TOOL_CONTEXT = VARIABLES | {
    *("attempt", "call", "cancelled", "execution_id", "log", "metadata", "now", "publish", "random", "uuid"),
}
TRANSACTION = VARIABLES | {"abort", "attempt", "call", "commit", "commit_sequence", "execution_id", "status"}
VARIABLE = {"delete", "get", "history", "info", "kind", "name", "rollback", "set", "update", "value", "watch"}
BACKEND = {"capabilities", "kind", "provider", "switches", "url"}
WATCH = {
    *("aclose", "aopen", "close", "ended", "has_run_out", "interrupted", "next", "open", "position", "resumptions"),
}
OPTIMIZATION = {"history", "id", "name", "optimizer_id", "report", "status", "value"}
MAPPING = {name for name in dir(dict) if not name.startswith("_")} - {"fromkeys"}


def shown(thing: object) -> set[str]:
    return {name for name in dir(thing) if not name.startswith("_")}


@tool
def names(ctx: ToolContext) -> list[str]:
    return sorted(shown(ctx))


def test_completion_shows_only_what_programs_use() -> None:
    with Context(tools=[names]) as ctx:
        assert shown(ctx) == CONTEXT
        assert set(ctx.call(names)) == TOOL_CONTEXT
        with ctx.transaction() as tx:
            assert shown(tx) == TRANSACTION
        assert shown(ctx.handle("x", int)) == VARIABLE
        assert shown(ctx.backend) == BACKEND
        assert shown(ctx.variables) == MAPPING
        assert shown(ctx.watch()) == WATCH
        assert shown(ctx.optimize("x")) == OPTIMIZATION
        assert shown(ctx.set) == {"aio"}


@pytest.mark.parametrize(
    "expected",
    [CONTEXT, TOOL_CONTEXT, TRANSACTION, VARIABLE, BACKEND],
    ids=["Context", "ToolContext", "Transaction", "Variable", "Backend"],
)
def test_each_name_is_on_a_page(expected: Iterable[str]) -> None:
    pages = "\n".join(page.read_text() for page in DOCS.glob("*.md"))
    # As code: in backticks, or after a dot.
    assert [name for name in sorted(expected) if not re.search(rf"[`.]{name}\b", pages)] == []
