"""Value types: validate, coerce, constrain, encode.

A value travels and is kept as the protocol's own JSON text (`Value.json`), or as bytes beside a JSON
description of them. `normalise` is the only way in; `encode` and `decode` translate to and from Python
objects.
"""

from dspex_persist.state.values.ahead import LITTLE, MUCH, Described, Find, FindType, ReadAhead, Spell
from dspex_persist.state.values.binary import check_content
from dspex_persist.state.values.coercion import TYPE_NAMES
from dspex_persist.state.values.constraints import Constraints, compile_constraints, constraints_json
from dspex_persist.state.values.json_text import check_binary_size, depth_if_above, parse_json
from dspex_persist.state.values.normalisation import normalise, spell
from dspex_persist.state.values.python_objects import (
    BinaryValue,
    decode,
    decode_loosely,
    encode,
    encode_arguments,
    encode_for,
    encode_loosely,
    infer_type,
)

__all__ = [
    "LITTLE",
    "MUCH",
    "TYPE_NAMES",
    "BinaryValue",
    "Constraints",
    "Described",
    "Find",
    "FindType",
    "ReadAhead",
    "Spell",
    "check_binary_size",
    "check_content",
    "compile_constraints",
    "constraints_json",
    "decode",
    "decode_loosely",
    "depth_if_above",
    "encode",
    "encode_arguments",
    "encode_for",
    "encode_loosely",
    "infer_type",
    "normalise",
    "parse_json",
    "spell",
]
