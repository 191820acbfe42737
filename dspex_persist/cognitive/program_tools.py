"""Saved programs as tools of a toolbox, for servers and replays."""

from collections.abc import Mapping
from typing import Any

from dspex_persist.cognitive.dspy.program_calls import answer
from dspex_persist.cognitive.dspy.programs import Into
from dspex_persist.cognitive.programs.documents import variable_of
from dspex_persist.cognitive.tool_context import ToolContext
from dspex_persist.cognitive.tools import Tool, tool
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.model import Isolation


def program_tool(
    name: str,
    into: Into,
    *,
    tool_name: str | None = None,
    lms: Mapping[str, Any] | None = None,
    adapters: Mapping[str, Any] | None = None,
    record_lm: bool = True,
    isolation: Isolation | str = Isolation.SNAPSHOT,
    retries: int = 0,
) -> Tool[..., Any]:
    """Return a tool that loads a program of its session, and runs it: what `ctx.programs.call` executes.

    Put it into a module of tools, so that a server has it, or a replay of such calls:

        answer = program_tool("answer", Answer)

    Args:
        name: The name of the program.
        into: The class of the module, or a function that makes one; see `Programs.load`.
        tool_name: The name of the tool; by default `programs/NAME`, as of the calls by `ctx.programs.call`.
        lms: See `Programs.load`.
        adapters: See `Programs.load`.
        record_lm: Whether the journal has its LM calls.
        isolation: See `Programs.execute`.
        retries: How often to run it again after a conflict.

    Returns:
        The tool. Its parameters are `inputs`, a map, and `version`, the number of a version or a tag.

    Raises:
        InvalidArgumentError: `into` is none of these.
    """
    if not callable(into):
        reason = f"it must be a module, its class, or a function that makes one, not a {type(into).__name__}"
        raise InvalidArgumentError("into", reason)

    @tool(
        name=variable_of(name) if tool_name is None else tool_name,
        description=f"Run the program {name!r}.",
        isolation=isolation,
        retries=retries,
        record_lm=record_lm,
    )
    def run_program(ctx: ToolContext, inputs: dict[str, Any], version: int | str | None = None) -> Any:
        program = ctx.programs.load(name, into, version, lms=lms, adapters=adapters)
        return answer(variable_of(name), program, inputs)[0]

    return run_program
