"""JSON Schema as a constraint: what is refused, where errors point, and that nothing hostile takes long."""

import json
from typing import Any

import pytest

from dspex_persist.state.errors import InvalidConstraintsError, InvalidValueError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value
from dspex_persist.state.values import compile_constraints, normalise
from tests.unit.test_values import MESSAGE_LENGTH, cpu_s_below

LIMITS = Limits()


def check(schema: object, document: Any) -> None:
    type_name = "list" if isinstance(document, list) else "map"
    compiled = compile_constraints("x", type_name, json.dumps({"schema": schema}))
    normalise("x", type_name, compiled, Value(json.dumps(document)), LIMITS)


def refusal(schema: object, document: Any) -> str:
    with pytest.raises(InvalidValueError) as caught:
        check(schema, document)
    assert len(str(caught.value)) < 2 * MESSAGE_LENGTH
    return caught.value.reason


def chained(length: int, keyword: str) -> dict[str, Any]:
    """A schema in which each of `length` definitions refers to the next one twice."""
    definitions: dict[str, Any] = {
        f"d{number}": {keyword: [{"$ref": f"#/$defs/d{number + 1}"}] * 2} for number in range(length)
    }
    definitions[f"d{length}"] = {"type": "string"}
    return {"$defs": definitions, "properties": {"a": {"$ref": "#/$defs/d0"}}}


def nested(depth: int) -> Any:
    return json.loads("[" * depth + "]" * depth)


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "born": {"type": "string", "format": "date"},
        "address": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/address"}]},
        "tags": {"type": "array", "items": {"pattern": "^[a-z]+$"}, "uniqueItems": True},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"address": {"$anchor": "a", "type": "object", "properties": {"zip": {"type": "string"}}}},
}


@pytest.mark.parametrize(
    ("document", "reason"),
    [
        ({}, '"name" is a required property'),
        ({"name": ""}, 'at name: "" is shorter than 1 character'),
        ({"name": "a", "born": "today"}, 'at born: "today" is not a "date"'),
        ({"name": "a", "address": {"zip": 1}}, 'at address.zip: 1 is not of type "string"'),
        ({"name": "a", "address": 1}, "at address: 1 is not valid under any of"),
        ({"name": "a", "tags": ["x", "X" * 1000]}, f'at tags[1]: "{"X" * 60}..." does not match "^[a-z]+$"'),
        ({"name": "a", "tags": ["x", "x"]}, "at tags: a list (2 entries) has non-unique elements"),
        ({"name": "a", "so\nme": 1}, r"('so\nme' was unexpected)"),
        ({"name": [1] * 1000}, "at name: a list (1000 entries) is not of type"),
    ],
)
def test_where_a_value_does_not_fit(document: Any, reason: str) -> None:
    assert reason in refusal(PERSON, document)


def test_fitting_values() -> None:
    check(PERSON, {"name": "a", "born": "2026-02-28", "address": {"zip": "1"}, "tags": ["x"]})
    check({"items": {"$ref": "#"}}, nested(100))
    check({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"type": "object"}}}, {})
    check({"prefixItems": [{"$ref": "#n"}], "$defs": {"n": {"$anchor": "n", "type": "number"}}}, [1.5])
    check({"type": "object", "$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "urn:x"}, {})


def test_numbers() -> None:
    check({"additionalProperties": {"type": "integer"}}, {"a": 1.0, "b": 2**200, "c": -0.0})
    assert "is not of type" in refusal({"additionalProperties": {"type": "integer"}}, {"a": 1.5})
    # JSON has no NaN: in a map it is a string.
    assert '"NaN" is not of type' in refusal({"additionalProperties": {"type": "number"}}, {"a": "NaN"})
    assert "maximum" in refusal({"additionalProperties": {"maximum": 2**64}}, {"a": 2**64 + 1})


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("v1", "schema must be a JSON Schema"),
        (True, "schema must be a JSON Schema"),
        ({"type": "strin"}, 'schema at type: "strin" is not valid'),
        ({"minimum": "1"}, 'schema at minimum: "1" is not of type "number"'),
        ({"$schema": "http://json-schema.org/draft-07/schema#"}, "$schema must be https://json-schema.org/draft/2020"),
        ({"$ref": "http://example.com/a.json"}, "leaves the schema"),
        ({"$ref": "file:///etc/passwd"}, "leaves the schema"),
        ({"$ref": "other.json"}, "leaves the schema"),
        ({"$ref": "https://json-schema.org/draft/2020-12/schema"}, "leaves the schema"),
        ({"$ref": "#/$defs/none"}, "does not exist"),
        ({"$ref": "#"}, "leads back to itself"),
        ({"allOf": [{"not": {"$ref": "#"}}]}, "leads back to itself"),
        ({"multipleOf": 1e-300}, "multipleOf 1e-300 is not between"),
        ({"$dynamicRef": "#"}, "$dynamicRef is not supported"),
        ({"properties": {"a": {"$id": "b"}}}, "only the whole schema may have an $id"),
        ({"properties": {"a": {"pattern": "(?=a)"}}}, 'schema at properties.a.pattern: "(?=a)" is not a "regex"'),
        ({"properties": {"a": {"pattern": r"(a)\1"}}}, "schema at properties.a.pattern"),
        ({"properties": {"a": {"pattern": "((a{1,99}){1,99}){1,99}"}}}, "properties.a.pattern"),
        ({"properties": {str(each): {"pattern": str(each)} for each in range(101)}}, "more than 100 patterns"),
        (chained(150, "allOf"), "more than 100 references in a chain"),
        (json.loads('{"items":' * 100 + "{}" + "}" * 100), "nested deeper than 64"),
    ],
)
def test_refused_schemas(schema: object, reason: str) -> None:
    with pytest.raises(InvalidConstraintsError) as caught:
        check(schema, {})
    assert reason in caught.value.reason
    assert len(str(caught.value)) < 2 * MESSAGE_LENGTH


@pytest.mark.parametrize(
    ("schema", "document", "reason"),
    [
        (chained(40, "allOf"), {"a": 1}, "too many for its schema"),
        (
            {
                "properties": {f"{each:x}": {} for each in range(5000)},
                "items": {"anyOf": [{"$ref": "#"}, {"type": "null"}]},
            },
            nested(100),
            "",
        ),
        (
            {
                "items": {"anyOf": [{"$ref": f"#/$defs/{n}"} for n in range(900)]},
                "$defs": {str(n): {"items": {"$ref": "#"}} for n in range(900)},
            },
            nested(99),
            "too many for its schema",
        ),
        (chained(18, "anyOf"), {"a": 1}, "too many alternatives to say where"),
        (chained(8, "oneOf"), {"a": 1}, "at a: 1 is not valid under any"),
        ({"items": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}}, nested(40), "too many for its schema"),
        ({"items": {"pattern": ".{0,999}!"}}, ["a" * 1_000_000], "too long to match"),
        ({"items": {"pattern": "^(a+)+$"}}, ["a" * 500_000 + "!"], "does not match"),
    ],
)
def test_nothing_takes_long(schema: object, document: Any, reason: str) -> None:
    with cpu_s_below(5):
        if reason:
            assert reason in refusal(schema, document)
        else:
            check(schema, document)


def test_compiled_once() -> None:
    long = json.dumps({"schema": {"description": "x" * 20_000, "type": "object"}})
    assert compile_constraints("x", "map", long) is compile_constraints("y", "map", long)


@pytest.mark.parametrize("version", [0, -1, "1", 1.5, True])
def test_schema_versions(version: object) -> None:
    with pytest.raises(InvalidConstraintsError, match="schema_version must be a positive integer"):
        compile_constraints("x", "map", json.dumps({"schema_version": version}))
    assert compile_constraints("x", "list", '{"schema_version": 3}').json == '{"schema_version":3}'
