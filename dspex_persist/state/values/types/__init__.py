"""The value types of the protocol, one in each file. Importing this package registers them."""

from typing import Final

from dspex_persist.state.values.registry import ValueType, register
from dspex_persist.state.values.types.boolean import BOOLEAN
from dspex_persist.state.values.types.choice import CHOICE
from dspex_persist.state.values.types.embedding import EMBEDDING
from dspex_persist.state.values.types.float import FLOAT
from dspex_persist.state.values.types.integer import INTEGER
from dspex_persist.state.values.types.list import LIST
from dspex_persist.state.values.types.map import MAP
from dspex_persist.state.values.types.module import MODULE
from dspex_persist.state.values.types.string import STRING
from dspex_persist.state.values.types.tensor import TENSOR

PROTOCOL_TYPES: Final[tuple[ValueType, ...]] = (
    FLOAT,
    INTEGER,
    STRING,
    BOOLEAN,
    CHOICE,
    MODULE,
    EMBEDDING,
    TENSOR,
    MAP,
    LIST,
)

for _each in PROTOCOL_TYPES:
    register(_each)
