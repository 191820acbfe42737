"""Strict JSON: one parser, one canonical writer, and short descriptions of values for messages.

Most functions here do not know the variable: they raise `RefusedError` with a reason, which their callers convert to
an `InvalidValueError` or `InvalidConstraintsError` with its name.
"""

import json
import re
from collections import Counter
from itertools import accumulate
from math import inf, isfinite
from typing import Any, Final

import re2

from dspex_persist.state.errors import InvalidValueError, LimitExceededError, quote
from dspex_persist.state.limits import Limits

_SHOWN_LENGTH = 60
_WHITESPACE = " \t\n\r"
# Python's default limit for converting digits to an int. Enforced here as well, because conversions take quadratic
# time and a host may lift the interpreter's limit.
INTEGER_DIGITS = 4300
_INTEGER_BITS: Final = 14_000
"""An integer with fewer bits has at most `INTEGER_DIGITS` digits."""
# A number with so few characters and no exponent is below 1e308, so it cannot overflow a double.
_SURELY_FINITE_LENGTH = 308

# Possessive, and with an optional closing quote: takes linear time for every input, even for unterminated strings.
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_DEPTH_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in _DEPTH_STEPS)
_LONG_NUMBER = re2.compile(f"[0-9]{{{_SURELY_FINITE_LENGTH + 1}}}")
_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")


class RefusedError(Exception):
    """A document, value or constraint is refused for `reason`. Callers add the name of the variable."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def parse_json(text: str | bytes, *, name: str, limits: Limits) -> object:
    """Parse JSON under stricter rules than the standard library's.

    Args:
        text: The JSON, as str or UTF-8.
        name: The variable's name, for errors.
        limits: Bounds on size and depth.

    Raises:
        InvalidValueError: The text is not UTF-8 or not JSON, or has NaN or Infinity without quotes, numbers that
            overflow a double, integers of more than 4,300 digits, duplicate keys, or lone surrogates.
        LimitExceededError: It has more than `limits.value_size_bytes` bytes, or is nested deeper than
            `limits.json_depth`.
    """
    try:
        if isinstance(text, bytes):
            check_size(name, len(text), limits)
            text = _decoded(text)
        check_limits(name, text, limits)
        return read(text)
    except RefusedError as error:
        raise InvalidValueError(name, error.reason) from error


def container_in(text: str, *, name: str, limits: Limits) -> object:
    """Parse `text` if it is the JSON of an object or array; otherwise return `text`.

    Some clients can send objects and arrays only in a string.
    """
    if not text.lstrip(_WHITESPACE).startswith(("[", "{")):
        return text
    try:
        return parse_json(text, name=name, limits=limits)
    except InvalidValueError:
        return text


def check_limits(name: str, text: str, limits: Limits) -> None:
    """Raise `LimitExceededError` if JSON is too large or nested too deep, `RefusedError` if it has lone surrogates."""
    # A text this short cannot exceed a limit. Most texts are, and this is the hot path.
    if len(text) <= limits.json_depth and len(text) <= limits.value_size_bytes and text.isascii():
        return
    check_size(name, utf8_size_bytes(text), limits)
    depth = depth_if_above(text, limits.json_depth)
    if depth:
        raise LimitExceededError(f"JSON nesting of {quote(name)}", depth, limits.json_depth, "json_depth")


def check_size(name: str, size_bytes: int, limits: Limits) -> None:
    """Raise `LimitExceededError` if JSON of `size_bytes` is too large."""
    if size_bytes > limits.value_size_bytes:
        what = f"size of {quote(name)} in bytes"
        raise LimitExceededError(what, size_bytes, limits.value_size_bytes, "value_size_bytes")


def check_binary_size(name: str, size_bytes: int, limits: Limits) -> None:
    """Raise `LimitExceededError` if the binary content of a value is too large."""
    if size_bytes > limits.binary_size_bytes:
        what = f"size of the binary content of {quote(name)} in bytes"
        raise LimitExceededError(what, size_bytes, limits.binary_size_bytes, "binary_size_bytes")


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise RefusedError(f"not UTF-8: byte {error.start} is {content[error.start]:#04x}") from None


def utf8_size_bytes(text: str) -> int:
    """Return the size of `text` in UTF-8, in bytes; raise `RefusedError` for a lone surrogate."""
    if text.isascii():
        return len(text)
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise RefusedError(f"a lone surrogate (U+{ord(text[error.start]):04X}) is not a character") from None


def depth_if_above(text: str, limit: int) -> int:
    """Return the nesting depth of `text` if it is above `limit`, else 0. A scalar has depth 0, `[]` depth 1."""
    if text.count("[") + text.count("{") <= limit:
        return 0
    outside_strings = _STRING.sub("", text) if '"' in text else text
    brackets = outside_strings.encode(errors="surrogatepass").translate(None, delete=_NO_BRACKETS)
    deepest = max(accumulate(map(_DEPTH_STEPS.__getitem__, brackets)), default=0)
    return deepest if deepest > limit else 0


def read(text: str) -> object:
    """Parse `text`, whose size and depth the caller has checked; raise `RefusedError` if it violates a rule."""
    text = text.strip(_WHITESPACE)
    decoder = _CAREFUL if _may_overflow(text) else _QUICK
    try:
        document, end = decoder.raw_decode(text)
        if end != len(text):
            raise RefusedError(f"not JSON: more text after the document (character {end})")
    except json.JSONDecodeError as error:
        raise RefusedError(f"not JSON: {error.msg} (character {error.pos})") from None
    except RecursionError:
        raise RefusedError("nested deeper than this interpreter can read") from None
    except ValueError as error:
        # The host has lowered the interpreter's limit for digits.
        raise RefusedError(f"a number has too many digits: {error}") from None
    # Characters above U+FFFF may be written as two escapes. Encoding the document reveals single ones.
    if "\\u" in text and _SURROGATE_ESCAPE.search(text):
        utf8_size_bytes(canonical(document))
    return document


def read_line(text: str) -> object:
    """Parse a line of a recording: like `read`, but with lone surrogates, which old logs may contain.

    Raises:
        json.JSONDecodeError: It is not JSON.
        RefusedError: It violates another rule.
    """
    return _CAREFUL.decode(text)


def _may_overflow(text: str) -> bool:
    """Whether a number in `text` may overflow a double, or have too many digits for an integer.

    Parsing is twice as fast without a hook for each number, which is safe if no exponent is positive and no number is
    long.
    """
    if ("e" in text or "E" in text) and (text.count("e") != text.count("e-") or text.count("E") != text.count("E-")):
        return True
    if len(text) <= _SURELY_FINITE_LENGTH:
        return False
    return _LONG_NUMBER.search(text.encode(errors="surrogatepass")) is not None


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise RefusedError(f"the key {shown(twice)} appears more than once")
    return entries


def _no_constant(token: str) -> object:
    raise RefusedError(f'the bare token {token} is not JSON; floats write the string "{token}"')


def _finite(token: str) -> float:
    number = float(token)
    if number in (inf, -inf):
        raise RefusedError(f"the number {shorten(token)} is beyond the range of a double")
    return number


def _bounded(token: str) -> int:
    if len(token) > INTEGER_DIGITS and len(token.lstrip("-")) > INTEGER_DIGITS:
        raise RefusedError(f"an integer has more than {INTEGER_DIGITS} digits")
    return int(token)


_QUICK = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
_CAREFUL = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite, parse_int=_bounded
)
# No check for cycles: parsed documents have none, and Python objects with one raise a RecursionError.
_ENCODER = json.JSONEncoder(
    ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"), check_circular=False
)


def canonical(document: object) -> str:
    """Return the canonical JSON of `document`: with sorted keys, without spaces, and without escapes where possible.

    Raises:
        RefusedError: JSON cannot represent it: non-finite floats, other objects, integers of too many digits, or keys
            that cannot be sorted.
    """
    try:
        # The encoder takes microseconds to set up, and most values are plain numbers.
        if type(document) is int or (type(document) is float and -inf < document < inf):
            return repr(document)
        if type(document) is bool:
            return "true" if document else "false"
        return _ENCODER.encode(document)
    except RecursionError:
        raise RefusedError("nested too deep, or contains itself") from None
    except (TypeError, ValueError) as error:
        if "integer string conversion" in str(error):
            raise RefusedError(f"an integer of more than {INTEGER_DIGITS} digits has no JSON form") from None
        raise RefusedError(f"has no JSON form: {shorten(str(error))}") from None


# JSON in the columns of a file

DAMAGED: Final = "damaged JSON"
"""The key under which `stored_object` returns text that is not a JSON object."""
_STORED_DEPTH: Final = 200
"""The largest depth of documents in a file: more than any value has, less than SQLite and Python can parse."""
# Created once: `json.loads` creates a decoder for each text, which takes longer than parsing a short one.
_STORED = json.JSONDecoder(parse_constant=str)
_STORING = json.JSONEncoder(allow_nan=False, sort_keys=True, separators=(",", ":"))


def storable(document: object) -> str:
    """Return any document as strict ASCII JSON, which SQLite's JSON functions can parse.

    This never fails, because the event that it records has already happened. NaN and the infinities become the
    protocol's strings ("NaN", "Infinity", "-Infinity"), lone surrogates become text (\\ud800), and so do integers with
    too many digits and parts that are nested too deep for SQLite.
    """
    try:
        text = _STORING.encode(document)
        if depth_if_above(text, _STORED_DEPTH):
            raise RefusedError("nested too deep")
        if _SURROGATE_ESCAPE.search(text):
            utf8_size_bytes(json.dumps(document, ensure_ascii=False))
    except (RefusedError, RecursionError, TypeError, ValueError):
        return _STORING.encode(_plain(document, 0))
    return text


def _plain(document: object, depth: int) -> object:
    """Return `document` in a form that JSON can represent and SQLite can parse."""
    if depth >= _STORED_DEPTH and isinstance(document, dict | list | tuple):
        return f"(nested deeper than {_STORED_DEPTH} levels)"
    if isinstance(document, str):
        return document.encode(errors="backslashreplace").decode()
    if isinstance(document, dict):
        return {str(_plain(str(key), depth)): _plain(entry, depth + 1) for key, entry in document.items()}
    if isinstance(document, list | tuple):
        return [_plain(entry, depth + 1) for entry in document]
    if isinstance(document, float) and not isfinite(document):
        return "NaN" if document != document else "Infinity" if document > 0 else "-Infinity"
    if document is None or isinstance(document, bool | float):
        return document
    if isinstance(document, int):
        return document if document.bit_length() < _INTEGER_BITS else hex(document)
    return repr(document)


def stored(text: str) -> Any:
    """Parse the document in a column, even if an old release wrote it less strictly than `storable` does."""
    document = _STORED.decode(text)
    if "\\u" not in text or _SURROGATE_ESCAPE.search(text) is None:
        return document
    try:
        utf8_size_bytes(json.dumps(document, ensure_ascii=False))
    except RefusedError:
        return _plain(document, 0)
    return document


def stored_object(text: str | None) -> dict[str, Any]:
    """Parse the object in a column. In a damaged file, return other text under the key `DAMAGED`."""
    if text is None:
        return {}
    try:
        document = stored(text)
    except (ValueError, RecursionError):
        return {DAMAGED: text}
    return document if isinstance(document, dict) else {DAMAGED: text}


def stored_texts(text: str | None) -> dict[str, str]:
    """Parse the mapping of strings in a column. In a damaged file, return other entries as their JSON."""
    document = stored_object(text)
    return {key: each if isinstance(each, str) else storable(each) for key, each in document.items()}


def mended(text: str) -> str:
    """Return the object in a column in a form that SQLite can parse."""
    return storable(stored_object(text))


def shorten(text: str) -> str:
    """Cut `text` to about 60 characters."""
    return text if len(text) <= _SHOWN_LENGTH else f"{text[:_SHOWN_LENGTH]}..."


def shown(document: object) -> str:
    """Describe `document` on one line for a message: scalars as JSON, shortened; lists and objects by their size."""
    if isinstance(document, str):
        text = json.dumps(shorten(document), ensure_ascii=False)
        return text.encode(errors="backslashreplace").decode()
    if isinstance(document, list | tuple):
        return f"a list ({len(document)} entries)"
    if isinstance(document, dict):
        return f"an object ({len(document)} entries)"
    if isinstance(document, bool) or document is None:
        return json.dumps(document)
    if isinstance(document, int) and not -(10**_SHOWN_LENGTH) < document < 10**_SHOWN_LENGTH:
        return f"an integer of {document.bit_length()} bits"
    if isinstance(document, int | float):
        return repr(document)
    return f"an object of type {shorten(type(document).__name__)}"
