"""Masks the values of sensitive variables in texts that quote them, such as the prompts of recorded LM calls."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from dspex_persist.state.model import Value
from dspex_persist.state.values.json_text import stored

MASK: Final = "•••"
"""Replaces a sensitive value in a text."""
_SHORT: Final = 4
_RUN: Final = re.compile(r"[A-Za-z0-9]+")
_MASKED_PARTS: Final = ("error", "lm", "request", "response")


class Secrets:
    """The values of sensitive variables.

    A text is masked wherever it is quoted: with other white space, as when a prompt is indented, or with the escapes of
    JSON or of Python's `repr`. Of lists and maps, each text and each number with three characters or more is masked by
    itself. Texts with fewer than four characters and numbers only count as whole words. `true` and `false` are never
    masked, nor is binary content.

    Args:
        values: The values.
    """

    def __init__(self, values: Iterable[Value]) -> None:
        leaves = dict.fromkeys(leaf for value in values for leaf in _leaves(value))
        self._forms = [(_probe(leaf), leaf) for leaf in leaves]

    def __bool__(self) -> bool:
        return bool(self._forms)

    def masked(self, document: Any) -> Any:
        """Return a JSON document with these values masked in its texts and numbers; unchanged if it has none."""
        text = json.dumps(document, ensure_ascii=False)
        # Few values are quoted, so that most cost one search for a word.
        patterns = [_pattern(leaf) for probe, leaf in self._forms if probe in text]
        if not patterns:
            return document
        return _replaced(document, re.compile("|".join(sorted(patterns, key=len, reverse=True))))

    def masked_call(self, call: Any) -> Any:
        """Return an entry of `recorded["lm"]` with these values masked.

        If it quotes one, it says `masked`, and its hash is that of the request as it is then.
        """
        if not isinstance(call, Mapping):
            return self.masked(call)
        masked = {name: self._part(name, part) for name, part in call.items()}
        if masked == call:
            return call
        if masked.get("request") != call.get("request") and "hash" in call:
            masked["hash"] = hash_of(str(masked.get("model", "")), masked["request"])
        return {**masked, "masked": True}

    def _part(self, name: str, part: Any) -> Any:
        if name not in _MASKED_PARTS:
            return part
        if name == "response" and isinstance(part, Mapping):
            # Counts of tokens are no quotations.
            return {key: each if key == "usage" else self.masked(each) for key, each in part.items()}
        return self.masked(part)

    def masked_recorded(self, recorded: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what an execution recorded, with these values masked in its LM calls."""
        calls = recorded.get("lm")
        if not isinstance(calls, list | tuple) or not self:
            return recorded
        return {**recorded, "lm": [self.masked_call(call) for call in calls]}


def hash_of(model: str, request: Any) -> str:
    """Return the hash of a request to an LM: SHA-256 of model and request as canonical JSON, in hexadecimal."""
    text = json.dumps({"model": model, "request": request}, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _leaves(value: Value) -> Iterator[str | float]:
    """Yield the texts and numbers in a value that are masked."""
    try:
        document = stored(value.json)
    except (ValueError, RecursionError):
        document = value.json
    if _is_number(document) and value.binary is None:
        yield document
    else:
        yield from _texts(document)


def _texts(document: Any) -> Iterator[str | float]:
    if isinstance(document, str):
        if stripped := document.strip():
            yield stripped
    elif _is_number(document):
        if len(json.dumps(document)) >= _SHORT - 1:
            yield document
    elif isinstance(document, Mapping | list):
        for each in document.values() if isinstance(document, Mapping) else document:
            yield from _texts(each)


def _is_number(document: object) -> bool:
    return isinstance(document, int | float) and not isinstance(document, bool)


def _probe(leaf: str | float) -> str:
    """Return a part of a value that every way to quote it has: its longest run of ASCII letters and digits."""
    runs = _RUN.findall(leaf) if isinstance(leaf, str) else _RUN.findall(_spellings(leaf)[-1])
    return max(runs, key=len, default="")


def _spellings(number: float) -> list[str]:
    """Return the ways in which a number is written, the one with the shortest parts last."""
    text = json.dumps(number)
    is_whole = number == number // 1 if abs(number) < 2**53 else isinstance(number, int)
    if not is_whole:
        return [text]
    whole = int(number)
    return [text, f"{whole}.0", str(whole), f"{whole:,}"]


def _pattern(leaf: str | float) -> str:
    if not isinstance(leaf, str):
        return rf"(?<![\w.])(?:{'|'.join(map(re.escape, _spellings(leaf)))})(?!\w|[.,]\d)"
    spellings = dict.fromkeys(
        (leaf, json.dumps(leaf, ensure_ascii=False)[1:-1], json.dumps(leaf)[1:-1], repr(leaf)[1:-1])
    )
    pattern = "|".join(r"\s+".join(map(re.escape, spelling.split())) for spelling in spellings)
    return rf"(?<!\w)(?:{pattern})(?!\w)" if len(leaf) < _SHORT else pattern


def _replaced(document: Any, pattern: re.Pattern[str]) -> Any:
    if isinstance(document, str):
        return pattern.sub(MASK, document)
    if _is_number(document):
        return MASK if pattern.fullmatch(json.dumps(document)) else document
    if isinstance(document, Mapping):
        return {name: _replaced(each, pattern) for name, each in document.items()}
    return [_replaced(each, pattern) for each in document] if isinstance(document, list | tuple) else document
