"""Renders the templates of pages, with their values and times. All material is escaped."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any, Final

from jinja2 import Environment, PackageLoader, StrictUndefined

from dspex_persist.audit.comparing import compare_words, folded
from dspex_persist.audit.documents import cost_text
from dspex_persist.audit.pictures import duration_text
from dspex_persist.state.lm_calls import lm_calls_of
from dspex_persist.state.model import Value

MASKED: Final = "••••••"
"""Shown instead of a sensitive value."""
_MOST_LETTERS: Final = 4_000
_MOST_READ: Final = 100_000
_LINE_LETTERS: Final = 80
_CONTROLS: Final = {*range(0x20), *range(0x7F, 0xA0)} - {ord("\t"), ord("\n")}
_DIRECTIONS: Final = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_INVISIBLE: Final = {code: chr(code).encode("unicode_escape").decode() for code in _CONTROLS | _DIRECTIONS}
"""Characters that pages escape: those not allowed in HTML, terminal controls, and those that reverse nearby text."""


@dataclass(frozen=True, slots=True)
class Links:
    """The links of a page; "" for none. Those of comparisons take two executions, or two versions of a variable."""

    session: Callable[[str], str]
    variable: Callable[[str, str], str]
    execution: Callable[[str], str]
    comparison: Callable[[str, str], str]
    versions: Callable[[str, str, int, int], str]


NOWHERE: Final = Links(
    lambda _: "", lambda _session, _name: "", lambda _: "", lambda *_: "", lambda _session, _name, _before, _after: ""
)


def render_template(name: str, /, links: Links = NOWHERE, **material: Any) -> str:
    """Render one of this package's templates."""
    page = _environment().get_template(name).render(links=links, **material)
    # JSON can contain lone surrogates, UTF-8 cannot.
    return page.translate(_INVISIBLE).encode("utf-8", "replace").decode("utf-8")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dspex_persist.audit"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "cost": cost_text,
        "folded": folded,
        "lm_calls": lm_calls_of,
        "words": compare_words,
        "value": value_text,
        "clip": clip,
        "short": lambda text, most: text if len(text) <= most else f"{text[: most - 1]}…",
        "when": when,
        "micros": lambda micros: "" if micros is None else duration_text(micros / 1e6),
        "plain": lambda value: json.dumps(value, ensure_ascii=False, default=str),
    }
    environment.globals["masked"] = MASKED
    return environment


def value_text(value: Value | None) -> str:
    """Return a value for people: a string without its quotes, long JSON on several lines."""
    if value is None:
        return ""
    text = value.json
    if len(text) <= _MOST_READ:
        # JSON that Python cannot parse, such as a number of 5,000 digits, is shown unchanged.
        with suppress(ValueError, RecursionError):
            content = json.loads(text)
            if isinstance(content, str):
                text = content
            elif len(text) > _LINE_LETTERS:
                text = json.dumps(content, ensure_ascii=False, indent=1)
    return text if value.binary is None else f"{text} and {len(value.binary):,} bytes"


def clip(text: str, most: int = _MOST_LETTERS) -> str:
    """Return the text, or its beginning and how much is missing."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} more characters)"


def when(moment: datetime | None, form: str = "%Y-%m-%d %H:%M:%S.%f") -> str:
    """Return a time in UTC, to the millisecond."""
    if moment is None:
        return ""
    text = moment.astimezone(UTC).strftime(form)
    return text[:-3] if form.endswith("%f") else text
