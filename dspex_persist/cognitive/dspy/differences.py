"""What differs between recorded LM calls and new ones: as text, message by message and line by line."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, unified_diff
from typing import Any, Final, Generic, TypeVar

from dspex_persist.state.lm_calls import lm_call_of

T = TypeVar("T")

_CONTEXT: Final = 2
_Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Difference:
    """A difference between two texts.

    Attributes:
        lines: It, with titles and some context: recorded lines begin with `-`, new ones with `+`.
        changed: The lines that differ, with their signs.
        pairs: Recorded lines, and the new ones in their places.
    """

    lines: tuple[str, ...] = ()
    changed: frozenset[str] = frozenset()
    pairs: tuple[_Pair, ...] = ()


class Told(Generic[T]):
    """What has been told, and by what, so that it is not told again."""

    def __init__(self) -> None:
        self._tellers: list[T] = []
        # By what is told, the place of the first that does.
        self._lines: dict[str, int] = {}
        self._pairs: dict[_Pair, int] = {}

    def add(self, difference: Difference, teller: T) -> None:
        """Note a difference that is told."""
        place = len(self._tellers)
        self._tellers.append(teller)
        for line in difference.changed:
            self._lines.setdefault(line, place)
        for pair in difference.pairs:
            self._pairs.setdefault(pair, place)

    def teller(self, difference: Difference) -> T | None:
        """Return what has told a difference already: all its lines were told, or quote lines that were."""
        places = {line: self._lines[line] for line in difference.changed if line in self._lines}
        for old, new in difference.pairs:
            quoted = self._quoted(old, new)
            if quoted is not None:
                places.setdefault(f"-{old}", quoted)
                places.setdefault(f"+{new}", quoted)
        is_told = bool(places) and len(places) == len(difference.changed)
        return self._tellers[min(places.values())] if is_told else None

    def _quoted(self, old: str, new: str) -> int | None:
        """Return the place of what has told a change that turns one line into the other."""
        place, line = None, old
        for (before, after), each in self._pairs.items():
            if before and before in line:
                place, line = each, line.replace(before, after)
        return place if line == new else None


def of_questions(model: str, request: Mapping[str, Any], new_model: str, new_request: Mapping[str, Any]) -> Difference:
    """Return what differs between a recorded question and a new one."""
    recorded, new = (
        lm_call_of({"model": name, "request": asked}) for name, asked in ((model, request), (new_model, new_request))
    )
    parts = [
        ("model", [recorded.model], [new.model]),
        ("model type", [recorded.model_type], [new.model_type]),
        ("options", _options(recorded.options), _options(new.options)),
    ]
    documents, new_documents = (_documents(asked) for asked in (request, new_request))
    for place, (before, after) in enumerate(_aligned(documents, new_documents)):
        texts = [
            None if each is None else lm_call_of({"request": {"messages": [each]}}).messages[0]
            for each in (before, after)
        ]
        roles = dict.fromkeys(each.role or "message" for each in texts if each is not None)
        lines, new_lines = ([] if each is None else each.text.split("\n") for each in texts)
        if lines == new_lines and before != after:
            # What differs is no text.
            lines, new_lines = _json(before), _json(after)
        parts.append((f"message {place} ({' → '.join(roles)})", lines, new_lines))
    return _of(parts)


def of_answers(recorded: Mapping[str, Any], new: Mapping[str, Any]) -> Difference:
    """Return what differs between a recorded outcome (`response` or `error`) and a new one."""
    lines, new_lines = (_said(outcome) for outcome in (recorded, new))
    if lines == new_lines:
        lines, new_lines = (_json(outcome) for outcome in (recorded, new))
    return _of([("", lines, new_lines)])


def _said(outcome: Mapping[str, Any]) -> list[str]:
    call = lm_call_of({"response": outcome.get("response"), "error": outcome.get("error")})
    error = [f"{call.error_type}: {call.error}"] if call.error_type else []
    return [line for text in (*call.answers, *error) for line in text.split("\n")]


def _of(parts: Iterable[tuple[str, Sequence[str], Sequence[str]]]) -> Difference:
    lines: list[str] = []
    changed: set[str] = set()
    pairs: list[_Pair] = []
    for title, before, after in parts:
        if before == after:
            continue
        lines += [f"{title}:"] if title else []
        body = list(unified_diff(before, after, lineterm="", n=_CONTEXT))[3:]
        # Between two places.
        lines += ("…" if line.startswith("@@ ") else line for line in body)
        changed.update(line for line in body if line[0] in "+-")
        pairs += _pairs(before, after)
    return Difference(tuple(lines), frozenset(changed), tuple(pairs))


def _pairs(before: Sequence[str], after: Sequence[str]) -> Iterator[_Pair]:
    for kind, begin, end, new_begin, new_end in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "replace":
            yield from zip(before[begin:end], after[new_begin:new_end], strict=False)


def _options(options: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {json.dumps(options[name], ensure_ascii=False, sort_keys=True)}" for name in sorted(options)]


def _documents(request: Mapping[str, Any]) -> list[Any]:
    messages = request.get("messages")
    return list(messages) if isinstance(messages, list) else [messages]


def _aligned(before: Sequence[Any], after: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
    """Pair the messages: the equal ones, and what is between them by its place."""
    keys, others = (["\n".join(_json(each)) for each in messages] for messages in (before, after))
    for _, begin, end, new_begin, new_end in SequenceMatcher(None, keys, others, autojunk=False).get_opcodes():
        for place in range(max(end - begin, new_end - new_begin)):
            yield (
                before[begin + place] if begin + place < end else None,
                after[new_begin + place] if new_begin + place < new_end else None,
            )


def _json(document: Any) -> list[str]:
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
    return text.replace("\\n", "\n").splitlines()
