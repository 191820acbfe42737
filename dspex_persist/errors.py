"""Every error that this package raises on purpose: the root of them, and the way to all others by name.

`dspex_persist.errors.VersionConflictError` and its like are the same classes whether state is kept in a file of this
process or by a server. docs/errors.md lists them.
"""

import re
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, Final

_WORDS: Final = re.compile(r"(?<!^)(?=[A-Z])")
# By name, and when one is asked for: the root of all errors must not import what raises them.
_HOMES: Final = (
    "dspex_persist.state.errors",
    "dspex_persist.cognitive.errors",
    "dspex_persist.infra.listen",
    "dspex_persist.infra.process",
    "dspex_persist.wiring",
)


class DspexError(Exception):
    """Something that a caller can understand and act on.

    `retryable` says whether the same call can succeed later without any change. `error_code` is the error's stable
    name for programs: the class's own, VERSION_CONFLICT for VersionConflictError, unless the class says another.
    """

    retryable: ClassVar[bool] = False
    error_code: ClassVar[str] = "DSPEX"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "error_code" not in vars(cls):
            cls.error_code = _WORDS.sub("_", cls.__name__.removesuffix("Error")).upper()


@cache
def _public() -> dict[str, type[DspexError]]:
    found = [item for home in _HOMES for item in vars(import_module(home)).values()]
    kinds = [item for item in found if isinstance(item, type) and issubclass(item, DspexError)]
    return {kind.__name__: kind for kind in kinds if not kind.__name__.startswith("_")}


def __getattr__(name: str) -> Any:
    if not name.endswith("Error") or name not in (kinds := _public()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return kinds[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_public()})
