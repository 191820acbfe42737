"""Modules that take long to import, for tests: the first of them that runs imports them, and collecting does not."""

from importlib import import_module
from typing import Any


class Late:
    """A module by its name; whatever public name is asked of it imports it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("_") or attribute == "is_hypothesis_test":
            # Collecting looks at everything in a test's module, for the marks of fixtures and tests.
            raise AttributeError(attribute)
        return getattr(import_module(self._name), attribute)
