"""What is known of LM calls without DSPy, whose import takes seconds: whose calls are recorded, and that none is to be
made while a replay runs."""

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Final

caller_is_recorded: Final[ContextVar[bool]] = ContextVar("dspex_persist_record_lm", default=False)
"""Whether the LM calls of a tool that is called from here are to be recorded: it has an execution of its own."""

_running: list[object] = []
"""What answers, or refuses, calls of which nobody can say whose they are. The last one came last."""
_lock: Final = threading.Lock()
_DSPY: Final = "dspy"


@dataclass(eq=False, slots=True)
class Refusal:
    """Something that runs again of which no LM call was recorded: whatever is asked is refused, and told here."""

    divergences: list[object] = field(default_factory=list)


def running() -> Sequence[object]:
    """Playbacks and refusals that go on in this process."""
    with _lock:
        return tuple(_running)


@contextmanager
def going_on(entry: object) -> Iterator[None]:
    """While a playback or a refusal goes on."""
    with _lock:
        _running.append(entry)
    try:
        yield
    finally:
        with _lock:
            _running.remove(entry)


@contextmanager
def refusing(install: Callable[[], None]) -> Iterator[Refusal]:
    """Have LM calls refused of which nobody can say whose they are.

    `install` has calls seen; it is called where DSPy is imported only on the way.
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
    """Has LM calls seen from the moment on in which DSPy has been imported."""

    def __init__(self, install: Callable[[], None]) -> None:
        self._install = install

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """DSPy's own, with a loader that does more; of all other modules nothing is known here."""
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
