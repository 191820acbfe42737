"""The documents of short values that are scalars, kept with the values: reading them again takes no parser.

A scalar cannot change, so all readers may share it. Objects and lists are parsed for each reader.
"""

from typing import Final

from dspex_persist.state.model import Value
from dspex_persist.state.values.json_text import RefusedError, canonical, read

SCALARS: Final = frozenset({float, int, bool, str})
_SHORT: Final = 200
"""The most characters of JSON for which memory holds the document, too."""


def keep(value: Value, document: object) -> Value:
    """Return `value`, and keep its document if it is a short scalar. `value.json` must be its canonical JSON."""
    if type(document) in SCALARS and len(value.json) <= _SHORT:
        object.__setattr__(value, "document", document)
    return value


def document_of(value: Value) -> object:
    """Return the document of `value`: the one that was kept, or else a new one, which the caller may change.

    Raises:
        RefusedError: The JSON violates a rule; see `read`.
    """
    try:
        return value.document
    except AttributeError:
        pass
    document = read(value.json)
    if type(document) in SCALARS and len(value.json) <= _SHORT and _is_canonical(value.json, document):
        keep(value, document)
    return document


def _is_canonical(text: str, document: object) -> bool:
    if isinstance(document, str):
        # Without escapes there is only one spelling.
        return text == f'"{document}"'
    try:
        return text == canonical(document)
    except RefusedError:
        return False
