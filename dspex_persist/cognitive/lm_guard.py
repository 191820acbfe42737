"""The part of LM recording that needs no DSPy, whose import takes seconds: it marks callers whose calls are recorded,
and refuses LM calls during a replay."""

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

caller_is_recorded: Final[ContextVar[bool]] = ContextVar("dspex_persist_record_lm", default=False)
"""Whether a tool called in this context inherits the recording of LM calls, for its separate execution."""


redirect: Callable[[Any], Callable[[], None] | None] | None = None
"""Called with a transaction at the beginning of its block, once LM calls have been recorded in this process. It returns
what to call at the end of the block, if the LM calls of the block go to the transaction."""

_running: list[object] = []
"""The playbacks and refusals that handle calls from unknown threads, oldest first."""
_lock: Final = threading.Lock()
_DSPY: Final = "dspy"


@dataclass(eq=False, slots=True)
class Refusal:
    """A replay without recorded LM calls: every call is refused, and reported in `divergences`."""

    divergences: list[object] = field(default_factory=list)


def running() -> Sequence[object]:
    """Return the active playbacks and refusals of this process, oldest first."""
    with _lock:
        return tuple(_running)


@contextmanager
def going_on(entry: object) -> Iterator[None]:
    """Register a playback or a refusal while the block runs."""
    with _lock:
        _running.append(entry)
    try:
        yield
    finally:
        with _lock:
            _running.remove(entry)


@contextmanager
def refusing(install: Callable[[], None]) -> Iterator[Refusal]:
    """Refuse LM calls from unknown threads while the block runs.

    Args:
        install: Hooks the LM classes. It is called if DSPy is imported while the block runs.
    """
    refusal = Refusal()
    finder = _DspyFinder(install)
    with going_on(refusal):
        sys.meta_path.insert(0, finder)
        try:
            yield refusal
        finally:
            finder.remove()


class _DspyFinder:
    """Hooks the LM classes as soon as DSPy has been imported."""

    def __init__(self, install: Callable[[], None]) -> None:
        self._install = install

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return DSPy's own spec, with a loader that also hooks the LM classes; None for other modules."""
        if name != _DSPY:
            return None
        self.remove()
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            setattr(spec.loader, "exec_module", self._and_install(spec.loader.exec_module))  # noqa: B010 -- a method
        return spec

    def remove(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def _and_install(self, load: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def load_and_install(module: ModuleType) -> None:
            load(module)
            self._install()

        return load_and_install
