"""JSON Schema (2020-12) as a constraint: compiled once, and bounded whatever a client writes into it.

Patterns run in linear time, nothing outside the schema is ever fetched, and the work that a value can cause is
estimated before it is validated, because schemas may multiply it with each level of a value: `anyOf` of two references
to the schema itself examines a list nested 30 deep a billion times.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import jsonschema_rs

from dspex_persist.state.values.json_text import RefusedError, shown
from dspex_persist.state.values.keywords import PATTERN_WORK, Keyword, Rule, compile_pattern, read_integer

DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"
SCHEMA_DEPTH: Final = 64
"""The deepest nesting of constraints with a schema."""
_MOST_PATTERNS: Final = 100
_PATTERN_BYTES: Final = 256 * 1024
_MOST_STEPS: Final = 100_000_000
"""The most steps of one validation: the subschemas on a path into the value, times its entries. About half a second."""
_MOST_ERRORS: Final = 20_000
"""The most errors that the alternatives of a schema may collect: each takes some 20 µs, and memory."""
_LONGEST_CHAIN: Final = 100
_MOST_COMPUTED: Final = 50_000
"""For how many subschemas times levels the steps are estimated: each takes some 5 µs, once."""
_DIVISION: Final = 1000
"""Steps of `multipleOf`, which divides fractions."""
_DIVISORS: Final = (1e-15, 1e15)
_BEYOND: Final = 10**12
_SHOWN_PATH: Final = 120
_SHOWN_MESSAGE: Final = 240
_MASK: Final = "\0"
_LISTS: Final = ("allOf", "anyOf", "oneOf")
_SINGLE: Final = ("not", "if", "then", "else")
_REFUSED: Final = ("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "$vocabulary")
_PATTERNS: Final = jsonschema_rs.RegexOptions(size_limit=_PATTERN_BYTES, dfa_size_limit=_PATTERN_BYTES)


class _Node:
    """A subschema: what else examines the same value, and what examines the entries of that."""

    __slots__ = (
        "alternatives",
        "costs",
        "errors",
        "in_place",
        "is_leaf",
        "of_items",
        "of_values",
        "own_errors",
        "weight",
    )

    def __init__(self, schema: object) -> None:
        entries = schema if isinstance(schema, dict) else {}
        self.weight = 1 + sum(len(entries[key]) for key in ("enum", "required") if isinstance(entries.get(key), list))
        self.weight += _DIVISION * ("multipleOf" in entries)
        self.in_place: list[_Node] = []
        self.alternatives: list[_Node] = []
        # Each a group of subschemas of which one examines an entry; an entry is examined by all groups.
        self.of_items: list[list[_Node]] = []
        self.of_values: list[list[_Node]] = []
        self.own_errors = 0
        self.is_leaf = True
        # By the depth of the value.
        self.costs: list[int] = []
        self.errors: list[int] = []

    def simplify(self) -> None:
        """Keep one leaf of each group, which costs most: there may be thousands of properties."""
        for groups in (self.of_values, self.of_items):
            for place, group in enumerate(groups):
                leaves = [node for node in group if node.is_leaf]
                heaviest = sorted(leaves, key=lambda node: node.weight)[-1:]
                groups[place] = [node for node in group if not node.is_leaf] + heaviest
        leaves = [node for node in self.in_place if node.is_leaf]
        alternatives = [node for node in self.alternatives if node.is_leaf]
        self.weight += sum(node.weight for node in leaves)
        self.own_errors = sum(node.weight for node in alternatives)
        self.in_place = [node for node in self.in_place if not node.is_leaf]
        self.alternatives = [node for node in self.alternatives if not node.is_leaf]


class _Plan:
    """Estimates what validating a value by a schema may cost, from the schema and the depth of the value."""

    def __init__(self, schema: Any) -> None:
        self._root = schema
        self._nodes: dict[int, _Node] = {}
        self._unread: list[tuple[_Node, dict[str, Any]]] = []
        self._anchors: dict[str, Any] | None = None
        self._lock = threading.Lock()
        self.patterns: list[str] = []
        self._top = self._node(schema)
        while self._unread:
            self._read(*self._unread.pop())
        for node in self._nodes.values():
            # It refers to no other subschemas.
            node.is_leaf = not (node.in_place or any(node.of_values) or any(node.of_items))
        self._all = [node for node in self._nodes.values() if not node.is_leaf]
        for node in self._all:
            node.simplify()
        self._levels = max(1, _MOST_COMPUTED // max(1, len(self._all)))
        self._extend()

    def costs(self, depth: int) -> tuple[int, int]:
        """Return how many steps each entry of a value of this depth may take, and how many errors it may collect."""
        top = self._top
        if len(top.errors) <= depth:
            with self._lock:
                while len(top.errors) <= depth and len(top.errors) < self._levels and top.costs[-1] < _BEYOND:
                    self._extend()
        if len(top.errors) <= depth:
            # It only grows with the depth. A large schema is not computed for all depths that a value may have.
            return _BEYOND, _BEYOND
        return top.costs[depth], top.errors[depth]

    def _node(self, schema: Any) -> _Node:
        node = self._nodes.get(id(schema))
        if node is None:
            node = self._nodes[id(schema)] = _Node(schema)
            if isinstance(schema, dict):
                self._unread.append((node, schema))
        return node

    def _read(self, node: _Node, schema: dict[str, Any]) -> None:
        for key in _REFUSED:
            if key in schema:
                raise RefusedError(f"schema: {key} is not supported")
        if "$id" in schema and schema is not self._root:
            raise RefusedError("schema: only the whole schema may have an $id")
        if "pattern" in schema:
            self.patterns.append(schema["pattern"])
        self.patterns += schema.get("patternProperties", {})
        divisor = schema.get("multipleOf", 1)
        if not _DIVISORS[0] <= divisor <= _DIVISORS[1]:
            raise RefusedError(f"schema: multipleOf {shown(divisor)} is not between 1e-15 and 1e15")
        self._read_in_place(node, schema)
        of_names = self._listed(schema.get("properties", {}).values())
        of_patterns = [[each] for each in self._listed(schema.get("patternProperties", {}).values())]
        rest = self._stated(schema, "additionalProperties", "unevaluatedProperties", "propertyNames")
        node.of_values = [of_names, *of_patterns, *rest]
        of_places = self._listed(schema.get("prefixItems", ()))
        node.of_items = [of_places, *self._stated(schema, "items", "contains", "unevaluatedItems")]

    def _read_in_place(self, node: _Node, schema: dict[str, Any]) -> None:
        if "$ref" in schema:
            node.in_place.append(self._node(self._target(schema["$ref"])))
        for key in _LISTS:
            entries = self._listed(schema.get(key, ()))
            node.in_place += entries
            if key != "allOf":
                node.alternatives += entries
        node.in_place += self._listed(schema[key] for key in _SINGLE if key in schema)
        node.in_place += self._listed(schema.get("dependentSchemas", {}).values())
        if "unevaluatedProperties" in schema or "unevaluatedItems" in schema:
            # They examine once more what the others do.
            node.in_place += node.in_place

    def _listed(self, schemas: Iterable[Any]) -> "list[_Node]":
        return [self._node(each) for each in schemas]

    def _stated(self, schema: dict[str, Any], *keys: str) -> "list[list[_Node]]":
        return [[self._node(schema[key])] for key in keys if key in schema]

    def _target(self, reference: str) -> Any:
        if not reference.startswith("#"):
            reason = f'schema: $ref {shown(reference)} leaves the schema; use "#/$defs/..." and nothing else'
            raise RefusedError(reason)
        target = self._root
        if reference.startswith("#/"):
            for part in reference[2:].split("/"):
                key = _unquoted(part)
                if isinstance(target, list) and key.isascii() and key.isdecimal() and int(key) < len(target):
                    target = target[int(key)]
                elif isinstance(target, dict) and key in target:
                    target = target[key]
                else:
                    raise RefusedError(f"schema: $ref {shown(reference)} refers to nothing in the schema")
        elif reference != "#":
            target = self._anchored(reference)
        return target

    def _anchored(self, reference: str) -> Any:
        if self._anchors is None:
            self._anchors = {
                each["$anchor"]: each for each in _objects(self._root) if isinstance(each.get("$anchor"), str)
            }
        if reference[1:] not in self._anchors:
            raise RefusedError(f"schema: $ref {shown(reference)} refers to nothing in the schema")
        return self._anchors[reference[1:]]

    def _extend(self) -> None:
        """Compute the costs for values that are one level deeper."""
        depth = len(self._top.errors)
        for node in self._all or [self._top]:
            self._compute(node, depth, 0)

    def _compute(self, node: _Node, depth: int, chain: int) -> None:
        if len(node.costs) > depth:
            if node.costs[depth] < 0:
                raise RefusedError("schema: a $ref leads back to itself without going into the value")
            return
        if chain > _LONGEST_CHAIN:
            raise RefusedError(f"schema: more than {_LONGEST_CHAIN} references in a chain")
        node.costs.append(-1)
        cost, errors = node.weight, node.own_errors
        for each in node.in_place:
            self._compute(each, depth, chain + 1)
            cost += each.costs[depth]
            errors += each.errors[depth]
        errors += sum(each.costs[depth] for each in node.alternatives)
        if depth:
            below = depth - 1
            sides = (node.of_values, node.of_items)
            cost += max(sum(_most_steps(group, below) for group in side) for side in sides)
            errors += max(sum(_most_errors(group, below) for group in side) for side in sides)
        node.costs[depth] = min(cost, _BEYOND)
        node.errors.append(min(errors, _BEYOND))


def _most_steps(group: list[_Node], depth: int) -> int:
    return max((each.weight if each.is_leaf else each.costs[depth] for each in group), default=0)


def _most_errors(group: list[_Node], depth: int) -> int:
    return max((0 if each.is_leaf else each.errors[depth] for each in group), default=0)


def _unquoted(part: str) -> str:
    pieces = part.split("%")
    try:
        quoted = b"".join(bytes.fromhex(each[:2]) + each[2:].encode() for each in pieces[1:])
        part = pieces[0] + quoted.decode()
    except ValueError:
        raise RefusedError(f"schema: $ref with {shown(part)} is not a JSON pointer") from None
    return part.replace("~1", "/").replace("~0", "~")


def _objects(document: object) -> Iterator[dict[str, Any]]:
    level = [document]
    while level:
        each = level.pop()
        if isinstance(each, dict):
            yield each
            level += each.values()
        elif isinstance(each, list):
            level += each


def _measure(document: object) -> tuple[int, int]:
    """Return the depth of a document, and how many values it contains, itself included."""
    depth, count, level = -1, 0, [document]
    while level:
        depth, count = depth + 1, count + len(level)
        below: list[object] = []
        for each in level:
            if isinstance(each, dict):
                below += each.values()
            elif isinstance(each, list):
                below += each
        level = below
    return depth, count


def _characters(document: object) -> int:
    """Return the length of all texts in a document together."""
    total, level = 0, [document]
    while level:
        each = level.pop()
        if isinstance(each, str):
            total += len(each)
        elif isinstance(each, dict):
            total += sum(map(len, each))
            level += each.values()
        elif isinstance(each, list):
            level += each
    return total


def _schema(stated: object) -> Rule:
    if not isinstance(stated, dict):
        raise RefusedError(f'schema must be a JSON Schema such as {{"type": "object"}}, not {shown(stated)}')
    dialect = stated.get("$schema", DIALECT)
    if dialect != DIALECT:
        raise RefusedError(f"schema: $schema must be {DIALECT}, not {shown(dialect)}")
    validator = _compiled(stated)
    plan = _Plan(stated)
    program_size = _program_size(plan.patterns)

    def check(document: Any) -> str | None:
        depth, count = _measure(document)
        steps, errors = plan.costs(depth)
        if steps * count > _MOST_STEPS:
            return (
                f"{count} entries nested {depth} deep are too many for its schema, whose alternatives and references "
                f"multiply to {steps} steps for an entry"
            )
        if program_size and program_size * _characters(document) > PATTERN_WORK:
            return "its texts are too long to match patterns of this complexity"
        if validator.is_valid(document):
            return None
        if errors * count > _MOST_ERRORS:
            return "it does not fit its schema, which has too many alternatives to say where"
        return _reason(validator, document)

    return Rule(check, program_size=program_size)


def _compiled(schema: dict[str, Any]) -> jsonschema_rs.Draft202012Validator:
    try:
        return jsonschema_rs.Draft202012Validator(
            schema,
            mask=_MASK,
            validate_formats=True,
            offline=True,
            pattern_options=_PATTERNS,
        )
    except jsonschema_rs.ValidationError as error:
        where = _path(error.instance_path)
        message = error.message.replace(_MASK, shown(_at(schema, error.instance_path)))
        if "$ref" in where or "Retrieval" in message or "retriev" in message:
            message = 'a $ref leaves the schema, or refers to nothing in it; use "#/$defs/..."'
        raise RefusedError(f"schema{where and f' at {where}'}: {_cut(message)}") from None
    except (ValueError, jsonschema_rs.ReferencingError) as error:
        raise RefusedError(f"schema: {_cut(str(error))}") from None


def _program_size(patterns: list[str]) -> int:
    """Return the instructions of all patterns together, which bound the work for each byte of a value."""
    if len(patterns) > _MOST_PATTERNS:
        raise RefusedError(f"schema: more than {_MOST_PATTERNS} patterns")
    return sum(compile_pattern(pattern).programsize for pattern in patterns)


def _reason(validator: jsonschema_rs.Draft202012Validator, document: Any) -> str:
    error = next(iter(validator.iter_errors(document)))
    path = error.instance_path
    while (chosen := _likeliest(error)) is not None:
        error, path = chosen, [*path, *chosen.instance_path[len(path) :]]
    where, found = _path(error.instance_path), shown(_at(document, error.instance_path))
    message = error.message
    if error.kind.name == "falseSchema":
        message = f"{_MASK} is not allowed here"
    message = _cut(message).replace(_MASK, found)
    return f"at {where}: {message}" if where else message


def _likeliest(error: jsonschema_rs.ValidationError) -> Any:
    """Return the error of the alternative that fits best: the one that fails deepest in the value, if any goes in."""
    context = getattr(error.kind, "context", None)
    if not context:
        return None
    firsts = [errors[0] for errors in context if errors]
    deepest = max(firsts, key=lambda each: len(each.instance_path), default=None)
    if deepest is None or len(deepest.instance_path) <= len(error.instance_path):
        return None
    return deepest


def _at(document: Any, path: Any) -> Any:
    for key in path:
        document = document[key]
    return document


def _path(path: Any) -> str:
    """Return a path such as `address.lines[2]`, shortened."""
    text = ""
    for key in path:
        if isinstance(key, int):
            text += f"[{key}]"
        else:
            text += ("." if text else "") + (key if key.isidentifier() else shown(key))
    return text if len(text) <= _SHOWN_PATH else f"{text[:_SHOWN_PATH]}..."


def _cut(message: str) -> str:
    if not message.isprintable():
        message = "".join(each if each.isprintable() or each == _MASK else repr(each)[1:-1] for each in message)
    return message if len(message) <= _SHOWN_MESSAGE else f"{message[:_SHOWN_MESSAGE]}..."


def is_linear(pattern: str) -> bool:
    """Whether a schema can have this pattern, which has to take linear time."""
    try:
        compile_pattern(pattern)
        _compiled({"pattern": pattern})
    except RefusedError:
        return False
    return True


def _schema_version(stated: object) -> Rule:
    read_integer("schema_version", stated, at_least=1)
    return Rule(lambda _: None)


SCHEMA: Final[Mapping[str, Keyword]] = {
    "schema": Keyword(_schema),
    "schema_version": Keyword(_schema_version),
}
"""A JSON Schema that values have to fit, and the number of its version, which their users give it."""
