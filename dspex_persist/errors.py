"""The root of all errors that this package raises on purpose, and access to the others by name.

`dspex_persist.errors.VersionConflictError` and the others are the same classes for every backend. docs/errors.md lists
them.
"""

import re
from functools import cache
from importlib import import_module
from typing import Any, ClassVar, Final

_WORDS: Final = re.compile(r"(?<!^)(?=[A-Z])")
# Imported on first access: the module of the root class must not import the modules that raise its subclasses.
_HOMES: Final = (
    "dspex_persist.state.errors",
    "dspex_persist.cognitive.errors",
    "dspex_persist.infra.listen",
    "dspex_persist.infra.process",
    "dspex_persist.infra.access.tls",
    "dspex_persist.infra.access.tokens",
    "dspex_persist.wiring.ending",
)


class DspexError(Exception):
    """An error that a caller can understand and act on.

    Attributes:
        retryable: Whether the same call may succeed later without any change.
        error_code: The stable name of the error for programs. By default it is derived from the name of the class:
            VERSION_CONFLICT for VersionConflictError.
    """

    retryable: ClassVar[bool] = False
    error_code: ClassVar[str] = "DSPEX"

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "error_code" not in vars(cls):
            cls.error_code = _WORDS.sub("_", cls.__name__.removesuffix("Error")).upper()


@cache
def _public() -> dict[str, type[DspexError]]:
    members = [member for home in _HOMES for member in vars(import_module(home)).values()]
    kinds = [member for member in members if isinstance(member, type) and issubclass(member, DspexError)]
    return {kind.__name__: kind for kind in kinds if not kind.__name__.startswith("_")}


def __getattr__(name: str) -> Any:
    if not name.endswith("Error") or name not in (kinds := _public()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return kinds[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *_public()})
