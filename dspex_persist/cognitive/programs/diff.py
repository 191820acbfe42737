"""What differs between two versions of a program: for people as text or HTML, and as data."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Final, NamedTuple, TypeVar

from dspex_persist.cognitive.programs.documents import SavedDemo, SavedField, SavedPredictor, SavedProgram
from dspex_persist.spelling import shorten

T = TypeVar("T")

_WIDTH: Final = 100
_MOST_DEMOS: Final = 5
_LONGEST_COMPARED: Final = 200_000
_MAPPINGS: Final = ("mapping", "model", "dataclass", "namedtuple", "example", "prediction")
_PALE: Final = {"+": "color:#1a7f37", "-": "color:#cf222e", "@": "color:#656d76"}


class Changed(NamedTuple):
    """A fact before and after; None where it was not there.

    Attributes:
        what: What it is, such as "config temperature".
        before: It in the first version.
        after: It in the second.
    """

    what: str
    before: Any
    after: Any

    @property
    def line(self) -> str:
        """The change in one line."""
        if self.before is None:
            return f"{self.what}: {_brief(self.after)} (new)"
        if self.after is None:
            return f"{self.what}: {_brief(self.before)} (gone)"
        return f"{self.what}: {_brief(self.before)} -> {_brief(self.after)}"


@dataclass(frozen=True)
class PredictorDiff:
    """What differs in one predictor.

    Attributes:
        path: Its path.
        kind: "added", "removed" or "changed".
        instructions: A unified diff of its instructions, line by line; empty if they are the same.
        demos_added: The demos that only the second version has, as field values by name.
        demos_removed: Those that only the first version has.
        demos_moved: Whether the same demos come in another order.
        changes: What else differs: options, fields, its LM.
    """

    path: str
    kind: str
    instructions: tuple[str, ...] = ()
    demos_added: tuple[Mapping[str, Any], ...] = ()
    demos_removed: tuple[Mapping[str, Any], ...] = ()
    demos_moved: bool = False
    changes: tuple[Changed, ...] = ()

    def __bool__(self) -> bool:
        return self.kind != "changed" or any(
            (self.instructions, self.demos_added, self.demos_removed, self.demos_moved, self.changes)
        )

    def lines(self) -> Iterator[str]:
        """Yield it as text."""
        yield f"{self.path}{'' if self.kind == 'changed' else f' ({self.kind})'}"
        if self.instructions:
            yield "  instructions"
            yield from (f"    {line}" for line in self.instructions)
        for sign, verb, demos in (("-", "gone", self.demos_removed), ("+", "added", self.demos_added)):
            if demos:
                yield f"  {len(demos)} demo{'' if len(demos) == 1 else 's'} {verb}"
                yield from (f"    {sign} {_brief(demo)}" for demo in demos[:_MOST_DEMOS])
                if len(demos) > _MOST_DEMOS:
                    yield f"    {sign} and {len(demos) - _MOST_DEMOS} more"
        if self.demos_moved:
            yield "  the same demos, in another order"
        yield from (f"  {change.line}" for change in self.changes)


@dataclass(frozen=True)
class ProgramDiff:
    """What differs between two versions of a program. False if nothing does.

    Attributes:
        name: The name of the program.
        before: The first version.
        after: The second version.
        changes: What differs in the program as a whole: its class, DSPy, modules, bindings.
        predictors: What differs in its predictors; those that are the same are not in it.
    """

    name: str
    before: int
    after: int
    changes: tuple[Changed, ...]
    predictors: tuple[PredictorDiff, ...]

    def __bool__(self) -> bool:
        return bool(self.changes or self.predictors)

    @property
    def title(self) -> str:
        """Which versions of which program are compared."""
        return f"program {self.name!r}: version {self.before} -> {self.after}"

    def lines(self) -> Iterator[str]:
        """Yield it as text, line by line."""
        if not self:
            yield f"{self.title}: no difference"
            return
        yield self.title
        yield from (change.line for change in self.changes)
        for predictor in self.predictors:
            yield from predictor.lines()

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data, for JSON."""
        return {
            "name": self.name,
            "before": self.before,
            "after": self.after,
            "same": not self,
            "changes": [change._asdict() for change in self.changes],
            "predictors": [
                {
                    "path": each.path,
                    "kind": each.kind,
                    "instructions": list(each.instructions),
                    "demos_added": [dict(demo) for demo in each.demos_added],
                    "demos_removed": [dict(demo) for demo in each.demos_removed],
                    "demos_moved": each.demos_moved,
                    "changes": [change._asdict() for change in each.changes],
                }
                for each in self.predictors
            ],
        }

    def __str__(self) -> str:
        return "\n".join(self.lines())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """Return it for a notebook. The texts come from anywhere, so all of them are escaped."""
        rows = []
        for line in self.lines():
            text = line.lstrip()
            style = _PALE.get(text[:1], "") if line.startswith("    ") else ""
            rows.append(f"<span style='{style}'>{escape(line)}</span>" if style else escape(line))
        return f"<pre>{chr(10).join(rows)}</pre>"


def compare(name: str, before: tuple[int, SavedProgram], after: tuple[int, SavedProgram]) -> ProgramDiff:
    """Return what differs between two versions of a program.

    Args:
        name: The name of the program.
        before: The first version: its number, and the program.
        after: The second version.
    """
    first, second = before[1], after[1]
    facts = (_facts(first), _facts(second))
    paths = dict.fromkeys((*first.predictors, *second.predictors))
    compared = (_compare(path, first.predictors.get(path), second.predictors.get(path)) for path in paths)
    return ProgramDiff(name, before[0], after[0], tuple(_changes(*facts)), tuple(each for each in compared if each))


def _facts(program: SavedProgram) -> dict[str, Any]:
    facts: dict[str, Any] = {"dspy": program.dspy, "adapter": program.adapter}
    for path, module in program.modules.items():
        facts |= {f"{path} class": module.kind, f"{path} source": module.source, f"{path} frozen": module.compiled}
        facts |= {f"{path} {setting}": each for setting, each in module.settings.items()}
        if module.tools is not None:
            facts |= {f"{path} tool {tool}": digest for tool, digest in module.tools.items()}
    facts |= {f"{path} k": k for path, k in program.retrievers.items()}
    facts |= {
        f"binding of {each.path}": each.model_dump(mode="json", exclude={"path"}, exclude_defaults=True)
        for each in program.bindings
    }
    return facts


def _compare(path: str, before: SavedPredictor | None, after: SavedPredictor | None) -> PredictorDiff:
    if after is None:
        assert before is not None
        gone = tuple(map(_plain_demo, before.demos))
        lines = tuple(_text_diff(before.signature.instructions, ""))
        return PredictorDiff(path, "removed", lines, (), gone, False, tuple(_changes(_predictor_facts(before), {})))
    if before is None:
        new = tuple(map(_plain_demo, after.demos))
        lines = tuple(_text_diff("", after.signature.instructions))
        return PredictorDiff(path, "added", lines, new, (), False, tuple(_changes({}, _predictor_facts(after))))
    only_before, only_after = _without_common(before.demos, after.demos)
    return PredictorDiff(
        path,
        "changed",
        tuple(_text_diff(before.signature.instructions, after.signature.instructions)),
        tuple(map(_plain_demo, only_after)),
        tuple(map(_plain_demo, only_before)),
        not only_before and not only_after and before.demos != after.demos,
        tuple(_changes(_predictor_facts(before), _predictor_facts(after))),
    )


def _predictor_facts(predictor: SavedPredictor) -> dict[str, Any]:
    facts: dict[str, Any] = {"class": predictor.kind, "frozen": predictor.frozen or None}
    facts |= {f"config {option}": each for option, each in predictor.config.items()}
    facts |= {f"decision {field}": each for field, each in predictor.decisions.items()}
    facts["fields"] = [field.name for field in predictor.signature.fields]
    for field in predictor.signature.fields:
        facts |= _field_facts(field)
    facts |= {f"type {name}": fields for name, fields in predictor.signature.types.items()}
    if predictor.lm is not None:
        facts |= {"LM": predictor.lm.name or predictor.lm.model, "LM model": predictor.lm.model}
        facts |= {f"LM {option}": each for option, each in predictor.lm.options.items()}
    return facts


def _field_facts(field: SavedField) -> dict[str, Any]:
    return {
        f"field {field.name} type": f"{field.role}: {field.type}",
        f"field {field.name} prefix": field.prefix,
        f"field {field.name} description": field.desc,
    }


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Changed]:
    for what in dict.fromkeys((*before, *after)):
        one, other = before.get(what), after.get(what)
        # True == 1, and they are not the same option.
        if json.dumps(one) != json.dumps(other):
            yield Changed(what, one, other)


def _without_common(before: Sequence[SavedDemo], after: Sequence[SavedDemo]) -> tuple[list[SavedDemo], list[SavedDemo]]:
    """Return what only the first has, and what only the second has; a demo may be there several times."""

    def key(demo: SavedDemo) -> str:
        return json.dumps(demo.model_dump(mode="json"), sort_keys=True)

    def missing(some: Sequence[SavedDemo], others: Sequence[SavedDemo]) -> list[SavedDemo]:
        left: dict[str, int] = {}
        for each in others:
            left[key(each)] = left.get(key(each), 0) + 1
        result = []
        for each in some:
            if left.get(key(each), 0):
                left[key(each)] -= 1
            else:
                result.append(each)
        return result

    return missing(before, after), missing(after, before)


def _plain_demo(demo: SavedDemo) -> dict[str, Any]:
    return {name: plain_value(value) for name, value in demo.values}


def plain_value(document: Any) -> Any:
    """Return a stored value for people: what its tags say about types and the order of keys is left out."""
    if isinstance(document, list):
        return [plain_value(each) for each in document]
    if not isinstance(document, dict):
        return document
    if "$" not in document:
        return {key: plain_value(each) for key, each in document.items()}
    value, is_mapping = document.get("value"), document["$"] in _MAPPINGS
    if is_mapping and isinstance(value, list) and all(isinstance(each, list) and len(each) == 2 for each in value):
        return {_as_key(key): plain_value(each) for key, each in value}
    return plain_value(value)


def _as_key(key: Any) -> str:
    plain = plain_value(key)
    return plain if isinstance(plain, str) else json.dumps(plain)


def _text_diff(before: str, after: str) -> Iterator[str]:
    if before != after and len(before) + len(after) > _LONGEST_COMPARED:
        # It takes quadratic time, and any client may have written it.
        return iter((f"-{len(before):,} characters", f"+{len(after):,} characters"))
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=3)
    # Without the two lines that name files.
    return (line for number, line in enumerate(lines) if number > 1)


def _brief(thing: Any) -> str:
    text = thing if isinstance(thing, str) else json.dumps(thing, ensure_ascii=False)
    text = json.dumps(text, ensure_ascii=False) if not text.isprintable() else text
    return shorten(text, _WIDTH)
