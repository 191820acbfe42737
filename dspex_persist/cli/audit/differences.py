"""The differences between two points, for people: - before, + after."""

import json
from collections.abc import Iterator, Sequence
from difflib import unified_diff
from typing import Any, Final

from dspex_persist.audit import Difference, DifferenceKind, VariableState, value_of
from dspex_persist.cli.audit.rendering import Renderer, value_text
from dspex_persist.cli.audit.tables import author_and_client, why
from dspex_persist.cli.output import plain

_LONG: Final = 60
_MOST_LINES: Final = 2_000
_STYLES: Final = {"-": "red", "+": "green", "@": "cyan"}


def show_differences(differences: Sequence[Difference], look: Renderer) -> None:
    """Print one block per variable."""
    from rich.text import Text

    for difference in differences:
        look.print(Text(_title(difference), "bold"))
        for line in _lines(difference):
            look.print(Text(line, _STYLES.get(line[0], "")))


def _title(difference: Difference) -> str:
    name = plain(difference.name)
    before, after = difference.before, difference.after
    match difference.kind:
        case DifferenceKind.ADDED:
            return f"{name} (added, {_author(after)})"
        case DifferenceKind.REMOVED:
            return f"{name} (removed, was {_version(before)})"
        case DifferenceKind.REPLACED:
            return f"{name} (another one under this name, {_author(after)})"
    return f"{name} ({_version(before)} → {_author(after)})"


def _version(state: VariableState | None) -> str:
    assert state is not None, "implied by the kind of the difference"
    return f"v{state.version}"


def _author(state: VariableState | None) -> str:
    assert state is not None, "implied by the kind of the difference"
    return f"v{state.version} by {author_and_client(state)}, commit {state.sequence}{why(state)}"


def _lines(difference: Difference) -> Iterator[str]:
    before, after = _text_lines(difference.before), _text_lines(difference.after)
    if len(before) <= 1 and len(after) <= 1:
        yield from (f"- {line}" for line in before)
        yield from (f"+ {line}" for line in after)
        return
    # Without the two lines that name the files.
    compared = list(unified_diff(before, after, n=2, lineterm=""))[2:]
    for line in compared:
        yield line if line.startswith("@") else f"{line[0]} {line[1:]}"


def _text_lines(state: VariableState | None) -> list[str]:
    """Return a value as lines to compare: the lines of a string, or of indented JSON if it is long."""
    if state is None:
        return []
    if state.value is None or state.value.binary is not None or len(state.value.json) <= _LONG:
        return [value_text(state.value, state.masked)]
    content: Any = value_of(state.value)
    if isinstance(content, str) and "\n" not in content:
        return [value_text(state.value)]
    text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False)
    lines = text.split("\n")
    if len(lines) > _MOST_LINES:
        return [value_text(state.value)]
    return [plain(line[:_MOST_LINES]) for line in lines]
