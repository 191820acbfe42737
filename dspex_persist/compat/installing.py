"""`install`: the names under which adapters import what is here."""

import logging
import sys
from collections.abc import Mapping, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

from dspex_persist.compat import base_adapter, session_context
from dspex_persist.state.bridge.stubs import MODULES
from dspex_persist.state.errors import VariableNotFoundError

PACKAGE: Final = "snakepit_bridge"
_SESSIONS: Final[Mapping[str, Any]] = {
    "SessionContext": session_context.SessionContext,
    "VariableNotFoundError": VariableNotFoundError,
    "VariableProxy": session_context.VariableProxy,
}
_TYPES: Final[Mapping[str, Any]] = {"VariableType": session_context.VariableType}
_ADAPTERS: Final[Mapping[str, Any]] = {
    "BaseAdapter": base_adapter.BaseAdapter,
    "ToolMetadata": base_adapter.ToolMetadata,
    "tool": base_adapter.tool,
}
_THREADED: Final[Mapping[str, Any]] = {
    **_ADAPTERS,
    "ThreadSafeAdapter": base_adapter.ThreadSafeAdapter,
    "thread_safe_method": base_adapter.thread_safe_method,
}


def _configure_logging(*_: object, **__: object) -> None:
    """Leave the logs as the program has configured them."""


_LOGGING: Final[Mapping[str, Any]] = {"get_logger": logging.getLogger, "configure_logging": _configure_logging}
_CONTENTS: Final[Mapping[str, Mapping[str, Any]]] = {
    PACKAGE: {**_SESSIONS, **_TYPES, **_ADAPTERS, **_LOGGING, **MODULES},
    f"{PACKAGE}.base_adapter": _ADAPTERS,
    f"{PACKAGE}.base_adapter_threaded": _THREADED,
    f"{PACKAGE}.grpc": MODULES,
    f"{PACKAGE}.logging_config": _LOGGING,
    f"{PACKAGE}.session_context": _SESSIONS,
    f"{PACKAGE}.types": _TYPES,
}
_PACKAGES: Final = (PACKAGE, f"{PACKAGE}.grpc")


def install() -> None:
    """Have adapters find here what they import from the package of existing workers, which need not be installed.

    Call it before the adapter is imported. Afterwards `import snakepit_bridge`, its modules that are listed in the
    documentation, and the generated modules `snakepit_bridge_pb2` and `snakepit_bridge_pb2_grpc` are those of
    `dspex_persist.compat`. Calling it again is harmless.

    Raises:
        ImportError: The other package is imported already.
    """
    known = sys.modules.get(PACKAGE)
    if known is not None:
        if known.__spec__ is None or not isinstance(known.__spec__.loader, _Loader):
            raise ImportError(f"{PACKAGE} is imported already: call dspex_persist.compat.install() before that")
        return
    for name, contents in _CONTENTS.items():
        sys.modules[name] = _module(name, contents)
    for name in _CONTENTS:
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, sys.modules[name])
    for name, module in MODULES.items():
        sys.modules.setdefault(name, module)
        for package in _PACKAGES:
            sys.modules[f"{package}.{name}"] = module
    sys.meta_path.insert(0, _Finder())


def _module(name: str, contents: Mapping[str, Any]) -> ModuleType:
    module = ModuleType(name, "What dspex_persist.compat has of it.")
    module.__spec__ = ModuleSpec(name, _Loader(), is_package=name in _PACKAGES)
    if name in _PACKAGES:
        module.__path__ = []
    vars(module).update(contents)

    def missing(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        raise ImportError(f"{name} has no {attribute} here; dspex_persist.compat has {', '.join(sorted(contents))}")

    vars(module)["__getattr__"] = missing
    return module


class _Loader(Loader):
    """Marks the modules that are made here."""

    def create_module(self, _: ModuleSpec) -> None:
        """Leave it to Python."""

    def exec_module(self, _: ModuleType) -> None:
        """Do nothing: it has its contents."""


class _Finder:
    """Says which modules there are, when another one is imported."""

    def find_spec(self, name: str, _: Sequence[str] | None = None, __: ModuleType | None = None) -> None:
        """Refuse what is not there; leave everything else to others."""
        if name.startswith(f"{PACKAGE}."):
            there = ", ".join(sorted(name for name in _CONTENTS if name != PACKAGE))
            raise ModuleNotFoundError(f"dspex_persist.compat has no {name}; it has {there}", name=name)
