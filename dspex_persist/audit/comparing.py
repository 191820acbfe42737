"""Compares the LM calls of two executions, and two versions of a prompt: side by side, line by line.

from dspex_persist.audit import compare_calls, compare_versions, lm_calls_of

for pair in compare_calls(lm_calls_of(audit.execution("exec_12")), lm_calls_of(audit.execution("exec_34"))):
    for part in pair.parts:
        print(part.name, *part.diff(), sep="\\n")
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any, Final, TypeVar

from dspex_persist.audit.documents import value_of
from dspex_persist.state.audit import AuditSource, HistoryEntry, HistoryQuery
from dspex_persist.state.errors import NotInHistoryError
from dspex_persist.state.lm_calls import LmCall, LmMessage

T = TypeVar("T")

_MOST_LINES: Final = 2_000
"""Of longer texts, only the equal lines at the beginning and at the end are found."""
_CONTEXT: Final = 2


@dataclass(frozen=True, slots=True)
class Row:
    """A line of each text; None where only the other one has a line."""

    before: str | None
    after: str | None

    @property
    def is_same(self) -> bool:
        """Whether both texts have it."""
        return self.before == self.after


@dataclass(frozen=True, slots=True)
class PartComparison:
    """A part of two calls, with its lines side by side. `name`: the role of a message, or what part it is."""

    name: str
    rows: tuple[Row, ...]

    @property
    def is_same(self) -> bool:
        """Whether both calls have the same."""
        return all(row.is_same for row in self.rows)

    def diff(self, context: int = _CONTEXT) -> list[str]:
        """Return the lines that differ, `- ` before and `+ ` after, with some lines around them."""
        lines: list[str] = []
        for each in folded(self.rows, context):
            if isinstance(each, int):
                lines.append(f"… {each:,} equal lines")
            elif each.is_same:
                lines.append(f"  {each.before}")
            else:
                lines += [f"- {each.before}"] if each.before is not None else []
                lines += [f"+ {each.after}"] if each.after is not None else []
        return lines


@dataclass(frozen=True, slots=True)
class CallComparison:
    """Two LM calls that correspond to each other, or one without a counterpart, and their parts."""

    before: LmCall | None
    after: LmCall | None
    parts: tuple[PartComparison, ...]

    @property
    def differences(self) -> tuple[PartComparison, ...]:
        """The parts that differ."""
        return tuple(part for part in self.parts if not part.is_same)


@dataclass(frozen=True, slots=True)
class VersionComparison:
    """Two versions of a variable, with the lines of their values side by side; without lines if one is masked."""

    before: HistoryEntry
    after: HistoryEntry
    rows: tuple[Row, ...]

    @property
    def is_same(self) -> bool:
        """Whether both have the same value."""
        return self.before.value == self.after.value and not self.before.masked


def compare_calls(before: Sequence[LmCall], after: Sequence[LmCall]) -> tuple[CallComparison, ...]:
    """Pair the calls of two executions by tool and predictor, in their order, and compare each pair."""

    def key(call: LmCall) -> tuple[str, str]:
        return call.tool, call.predictor

    return tuple(
        CallComparison(one, other, tuple(_parts(one, other))) for one, other in _aligned(before, after, key=key)
    )


def compare_versions(source: AuditSource, session: str, variable: str, before: int, after: int) -> VersionComparison:
    """Compare two versions of a variable: the lines of a string, or of the indented JSON of another value.

    Args:
        source: The history.
        session: The session's id.
        variable: The variable's name or id.
        before: The number of the first version.
        after: The number of the second version.

    Raises:
        NotInHistoryError: There never was such a session or variable.
        VersionNotFoundError: The variable has no such version.
        VersionPrunedError: The version was pruned.
    """
    newest = next(source.iterate(HistoryQuery(session=session, variable=variable, limit=1)), None)
    if newest is None or session != newest.session_id or variable not in (newest.name, newest.variable_id):
        raise NotInHistoryError("variable", variable, "name one session and one variable, without patterns")
    first, last = (source.version(session, newest.variable_id, number) for number in (before, after))
    if first.masked or last.masked:
        return VersionComparison(first, last, ())
    return VersionComparison(first, last, compare_lines(_text_of(first), _text_of(last)))


def compare_lines(before: str | None, after: str | None) -> tuple[Row, ...]:
    """Return the lines of two texts side by side; None stands for a text that is not there."""
    lines, others = (() if text is None else text.split("\n") for text in (before, after))
    if max(len(lines), len(others)) > _MOST_LINES:
        return tuple(Row(*pair) for pair in _aligned_at_the_ends(lines, others))
    return tuple(Row(*pair) for pair in _aligned(lines, others))


def folded(rows: Sequence[Row], context: int = _CONTEXT) -> Iterator[Row | int]:
    """Yield the rows that differ with `context` rows around them, and instead of the others how many they are.

    All rows are shown if there are not more than `context`.
    """
    near = set(range(len(rows))) if context >= len(rows) else set[int]()
    for place, row in enumerate(rows):
        if not row.is_same:
            near.update(range(place - context, place + context + 1))
    for is_near, group in groupby(range(len(rows)), near.__contains__):
        places = list(group)
        # A note of one line would take as much space as the line.
        if is_near or len(places) == 1:
            yield from (rows[place] for place in places)
        else:
            yield len(places)


def _text_of(entry: HistoryEntry) -> str | None:
    """Return a value as text; the lines of the strings in a JSON document are lines, too."""
    if entry.value is None:
        return None
    content: Any = value_of(entry.value)
    if isinstance(content, str):
        return content
    return json.dumps(content, indent=2, ensure_ascii=False).replace("\\n", "\n")


def _aligned(
    before: Sequence[T], after: Sequence[T], key: Any = lambda each: each
) -> Iterator[tuple[T | None, T | None]]:
    """Pair the items of two lists: the equal ones, and what is between them by its place."""
    matcher = SequenceMatcher(None, list(map(key, before)), list(map(key, after)), autojunk=False)
    for _, begin, end, other_begin, other_end in matcher.get_opcodes():
        yield from _by_place(before[begin:end], after[other_begin:other_end])


def _aligned_at_the_ends(before: Sequence[T], after: Sequence[T]) -> Iterator[tuple[T | None, T | None]]:
    most = min(len(before), len(after))
    head = next((place for place in range(most) if before[place] != after[place]), most)
    tail = next((place for place in range(most - head) if before[-1 - place] != after[-1 - place]), most - head)
    yield from zip(before[:head], after[:head], strict=True)
    yield from _by_place(before[head : len(before) - tail], after[head : len(after) - tail])
    yield from zip(before[len(before) - tail :], after[len(after) - tail :], strict=True)


def _by_place(before: Sequence[T], after: Sequence[T]) -> Iterator[tuple[T | None, T | None]]:
    for place in range(max(len(before), len(after))):
        yield (before[place] if place < len(before) else None, after[place] if place < len(after) else None)


# Words

_TOKEN: Final = re.compile(r"\s+|-?\d+(?:\.\d+)?|\w+|[^\w\s]")
_MOST_TOKENS: Final = 1_500
_LEAST_ALIKE: Final = 0.3


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a compared text. `kind`: "same" (before and after), "gone" or "new"."""

    kind: str
    text: str


def compare_words(before: str, after: str) -> list[Piece]:
    """Compare two texts word by word, or as a whole if they have little in common."""
    old, new = _TOKEN.findall(before), _TOKEN.findall(after)
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    if max(len(old), len(new)) > _MOST_TOKENS or matcher.ratio() < _LEAST_ALIKE:
        return [Piece("gone", before), Piece("new", after)]
    pieces: list[Piece] = []
    for kind, old_begin, old_end, new_begin, new_end in matcher.get_opcodes():
        if kind == "equal":
            pieces.append(Piece("same", "".join(old[old_begin:old_end])))
            continue
        pieces += [Piece("gone", "".join(old[old_begin:old_end]))] if old_end > old_begin else []
        pieces += [Piece("new", "".join(new[new_begin:new_end]))] if new_end > new_begin else []
    return pieces


# The parts of a call


def _parts(before: LmCall | None, after: LmCall | None) -> Iterator[PartComparison]:
    for name, describe in _FACTS.items():
        texts = [None if call is None else describe(call) or None for call in (before, after)]
        if any(texts):
            yield PartComparison(name, compare_lines(*texts))
    messages = [() if call is None else call.messages for call in (before, after)]
    for one, other in _aligned(*messages):
        yield PartComparison(_role(one, other), compare_lines(*(each.text if each else None for each in (one, other))))
    answers = [() if call is None else call.answers for call in (before, after)]
    for pair in _by_place(*answers):
        yield PartComparison("answer", compare_lines(*pair))
    errors = [
        None if call is None or not call.failed else f"{call.error_type}: {call.error}" for call in (before, after)
    ]
    if any(errors):
        yield PartComparison("error", compare_lines(*errors))


def _role(one: LmMessage | None, other: LmMessage | None) -> str:
    roles = dict.fromkeys(each.role or "message" for each in (one, other) if each is not None)
    return " → ".join(roles)


def _options(call: LmCall) -> str:
    return "\n".join(f"{name} = {json.dumps(option, ensure_ascii=False)}" for name, option in call.options.items())


def _variables(call: LmCall) -> str:
    return "\n".join(f"{name} v{version}" for name, version in call.variables.items())


_FACTS: Final = {"model": lambda call: call.model, "options": _options, "variables": _variables}
