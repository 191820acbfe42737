"""`ModuleVariableResolver`: the module type of a program as a variable."""

from collections.abc import Callable, Mapping
from typing import Any

from dspy.signatures.signature import ensure_signature

from dspex_persist.cognitive.dspy.binding import bind
from dspex_persist.cognitive.dspy.module_types import OPTION, ModuleTypes, VariableModule
from dspex_persist.cognitive.dspy.snapshots import around, reading
from dspex_persist.cognitive.errors import BindingError
from dspex_persist.cognitive.joining import joined
from dspex_persist.cognitive.steps import run
from dspex_persist.cognitive.variables import Variables


class ModuleVariableResolver:
    """Finds module types by the names that variables have, among those that this process has registered.

        resolver = ModuleVariableResolver(ctx)
        resolver.register_module("ReAct", dspy.ReAct, tools=[search])
        program = resolver.create_module("strategy", "question -> answer")

    "Predict", "ChainOfThought" and "ProgramOfThought" are there from the beginning. A variable may also have "dspy."
    before a name. Nothing is imported because a variable names it.

    Args:
        context: The context that has the variables; also that of a tool, or a transaction.
        modules: Types to register, by name.
    """

    def __init__(self, context: Variables, modules: Mapping[str, Callable[..., Any]] | None = None) -> None:
        given: object = context
        if not isinstance(given, Variables):
            raise BindingError(f"context must be a context, not {type(given).__name__}")
        self._ctx = context
        self._types = ModuleTypes()
        for name, factory in (modules or {}).items():
            self.register_module(name, factory)

    @property
    def modules(self) -> tuple[str, ...]:
        """The names that variables may have."""
        return self._types.names

    def register_module(self, name: str, factory: Callable[..., Any], /, **arguments: Any) -> None:
        """Add a type, or replace one.

        Args:
            name: What variables call it.
            factory: A module class, or a function that makes a module: it takes a signature.
            arguments: Further arguments for it, such as the `tools` of a `dspy.ReAct`.

        Raises:
            InvalidArgumentError: The factory cannot be called.
        """
        self._types.register(name, factory, arguments)

    def resolve(self, variable_name: str) -> Callable[..., Any]:
        """Return the class, or the function, that makes modules of the type that a variable has now.

        Args:
            variable_name: The name of the variable.

        Raises:
            BoundValueError: No type of this name is registered.
            VariableNotFoundError: There is no such variable.
        """
        return self._types.factory(self._name_in(variable_name))

    def create_module(self, variable_name: str, signature: Any) -> VariableModule:
        """Return a module whose type follows a variable.

        Args:
            variable_name: The name of the variable.
            signature: The signature, whatever the type.

        Raises:
            BoundValueError: No type of this name is registered.
            VariableNotFoundError: There is no such variable.
        """
        # Here, since DSPy looks for the types that a text names in the frames of the callers.
        module = VariableModule(self._types, ensure_signature(signature), self._name_in(variable_name))
        options: dict[str, Any] = {OPTION: variable_name}
        return bind(module, self._ctx, **options)

    def _name_in(self, variable: str) -> str:
        where = joined(self._ctx, around())
        return self._types.name_of(variable, run(where, reading(where, (variable,)))[variable].value)
