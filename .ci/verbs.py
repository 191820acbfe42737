"""The extension of griffe for verbs: the API reference shows what a verb returns, not that it is made of steps."""

from typing import Any

from griffe import ExprSubscript, Extension, Function


class Verbs(Extension):
    """Show `Steps[int]` as `int`."""

    def on_function_instance(self, *, func: Function, **_: Any) -> None:
        """Called when a function has been read."""
        returns = func.returns
        if isinstance(returns, ExprSubscript) and str(returns.left) == "Steps":
            func.returns = returns.slice
