"""Value types: validation, coercion, constraints, encoding.

A value is transmitted and stored as the protocol's JSON text (`Value.json`), or as bytes with a JSON description.
`normalise` checks every value before it is stored; `encode` and `decode` convert from and to Python objects.
"""

from dspex_persist.state.values.ahead import LONG_JSON, SHORT_JSON, Described, Find, FindType, ReadAhead, Spell
from dspex_persist.state.values.binary import check_content
from dspex_persist.state.values.constraints import (
    Constraints,
    check_keywords,
    compile_constraints,
    constraints_json,
    schema_version,
)
from dspex_persist.state.values.documents import BinaryValue
from dspex_persist.state.values.json_schema import is_linear
from dspex_persist.state.values.json_text import check_binary_size, depth_if_above, parse_json
from dspex_persist.state.values.normalisation import normalise, spell
from dspex_persist.state.values.python_objects import (
    decode,
    decode_argument,
    decode_loosely,
    encode,
    encode_arguments,
    encode_for,
    encode_loosely,
    infer_type,
)
from dspex_persist.state.values.registry import (
    ValueType,
    find_type,
    get_type,
    is_number,
    schema_keywords,
    type_names,
    type_of_schema,
)
from dspex_persist.state.values.types import PROTOCOL_TYPES

__all__ = [
    "LONG_JSON",
    "PROTOCOL_TYPES",
    "SHORT_JSON",
    "BinaryValue",
    "Constraints",
    "Described",
    "Find",
    "FindType",
    "ReadAhead",
    "Spell",
    "ValueType",
    "check_binary_size",
    "check_content",
    "check_keywords",
    "compile_constraints",
    "constraints_json",
    "decode",
    "decode_argument",
    "decode_loosely",
    "depth_if_above",
    "encode",
    "encode_arguments",
    "encode_for",
    "encode_loosely",
    "find_type",
    "get_type",
    "infer_type",
    "is_linear",
    "is_number",
    "normalise",
    "parse_json",
    "schema_keywords",
    "schema_version",
    "spell",
    "type_names",
    "type_of_schema",
]
