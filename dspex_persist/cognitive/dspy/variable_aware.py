"""DSPy's modules by the names that DSPex users know: `bind`, as methods of the module."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Final

import dspy

from dspex_persist.cognitive.dspy import checks, choosing
from dspex_persist.cognitive.dspy.binding import bind, checked_module
from dspex_persist.cognitive.dspy.options import OPTIONS
from dspex_persist.cognitive.dspy.paths import SELF, modules_in, predictors_in
from dspex_persist.cognitive.dspy.snapshots import ATTRIBUTE, Binding, around, binding_of, reading
from dspex_persist.cognitive.errors import BindingError
from dspex_persist.cognitive.joining import joined
from dspex_persist.cognitive.steps import Steps, ask, run
from dspex_persist.cognitive.variables import Variables
from dspex_persist.spelling import closest, did_you_mean, quote
from dspex_persist.state import commands

_PREFIX: Final = "VariableAware"
_COMMON: Final = ("temperature", "max_tokens", "top_p", "frequency_penalty", "presence_penalty")
_CHOSEN_BY_NAME: Final = ("model", "adapter", "module_type")
_OTHER_WORDS: Final = {"max_iterations": "max_iters"}
"""What options were called in DSPex, where no spelling leads from one to the other."""


class _Kept:
    """The context of a module. Copies of the module have the same one; pickles have None instead."""

    __slots__ = ("ctx",)

    def __init__(self, ctx: Variables) -> None:
        self.ctx = ctx

    def __copy__(self) -> "_Kept":
        return self

    def __deepcopy__(self, memo: object) -> "_Kept":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class VariableAware:
    """What the variable-aware modules have besides what DSPy's own have.

    `attr` is the name of an option, such as "temperature", or a path in the module and an option, such as
    "extract.predict.temperature".
    """

    COMMON: ClassVar[Mapping[str, str]] = {}
    """By the name of an option, the variable that `auto_bind_common` binds it to, if there is such a variable."""

    _dspex_persist_context: _Kept | None = None

    def _begin(self, session_context: Variables | None, auto_bind_common: bool) -> None:
        if session_context is None:
            return
        if not isinstance(session_context, Variables):
            raise BindingError(f"session_context must be a context, not {type(session_context).__name__}")
        self._dspex_persist_context = _Kept(session_context)
        if auto_bind_common:
            there = run(session_context, _existing(session_context, tuple(self.COMMON.values())))
            common: dict[str, Any] = {option: variable for option, variable in self.COMMON.items() if variable in there}
            if common:
                bind(self, session_context, **common)

    @property
    def session_context(self) -> Variables | None:
        """The context whose variables set the options; None without one."""
        return _context_of(self)

    def bind_variable(
        self,
        attr: str,
        variable: str,
        *,
        precedence: str | None = None,
        live: bool | None = None,
        lms: Mapping[str, Any] | None = None,
        adapters: Mapping[str, Any] | None = None,
    ) -> None:
        """Have a variable set an option, besides those that variables set already.

        Args:
            attr: The option.
            variable: The name of the variable.
            precedence: For all options of this module, see `bind`; None to leave it as it is.
            live: See `precedence`.
            lms: See `precedence`.
            adapters: See `precedence`.

        Raises:
            BindingError: There is no such option, or the module has no context.
            BoundValueError: The value of the variable cannot be what it is to set.
            VariableNotFoundError: There is no such variable.
        """
        ctx = _context_of(self)
        if ctx is None:
            raise BindingError("the module has no context: make it with session_context=")
        changes = {"precedence": precedence, "live": live, "lms": lms, "adapters": adapters}
        _bind_more(self, ctx, {attr: variable}, **{name: each for name, each in changes.items() if each is not None})

    def unbind_variable(self, attr: str) -> None:
        """Have no variable set an option any more.

        Args:
            attr: The option.

        Raises:
            BindingError: No variable sets it.
        """
        binding, bound = binding_of(self), self.get_bindings()
        if binding is None or attr not in bound:
            meant = did_you_mean(closest(str(attr), bound))
            raise BindingError(f"no variable sets {quote(attr)}{meant and f': {meant}'}")
        del bound[attr]
        options, per = _split(bound)
        if bound:
            setattr(self, ATTRIBUTE, binding.replace(options, per))
        else:
            delattr(self, ATTRIBUTE)

    def get_bindings(self) -> dict[str, str]:
        """Return by option which variable sets it. `bindings` of `dspex_persist.dspy` says more."""
        return _listed(binding_of(self))

    def sync_variables(self) -> dict[str, Any]:
        """Return by option the value that its variable has now, and see that each can be what it sets.

        Calls of the module need no `sync_variables`: each reads the variables itself. In a tool, or in a transaction,
        this reads as part of that.

        Raises:
            BoundValueError: A value cannot be what it sets.
            VariableNotFoundError: A variable is not there any more.
        """
        binding = binding_of(self)
        if binding is None:
            return {}
        where = joined(binding.ctx, around())
        readings = run(where, reading(where, binding.names))
        checks.check_values(self, binding, readings)
        return {attr: readings[variable].value for attr, variable in _listed(binding).items()}


class VariableAwarePredict(VariableAware, dspy.Predict):  # type: ignore[misc]
    """A `dspy.Predict` whose options variables set.

        predict = VariableAwarePredict("question -> answer", session_context=ctx)
        predict.bind_variable("temperature", "creativity")

    Args:
        signature: See `dspy.Predict`.
        session_context: The context that has the variables; None for none.
        auto_bind_common: Whether to bind what `COMMON` lists, as far as these variables are there.
        arguments: See `dspy.Predict`.
    """

    COMMON: ClassVar[Mapping[str, str]] = {option: option for option in _COMMON}

    def __init__(
        self,
        signature: Any,
        *,
        session_context: Variables | None = None,
        auto_bind_common: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(signature, **arguments)
        self._begin(session_context, auto_bind_common)


class VariableAwareChainOfThought(VariableAware, dspy.ChainOfThought):  # type: ignore[misc]
    """A `dspy.ChainOfThought` whose options variables set.

    Args:
        signature: See `dspy.ChainOfThought`.
        session_context: The context that has the variables; None for none.
        auto_bind_common: Whether to bind what `COMMON` lists, as far as these variables are there.
        arguments: See `dspy.ChainOfThought`.
    """

    COMMON: ClassVar[Mapping[str, str]] = {option: f"reasoning_{option}" for option in _COMMON}

    def __init__(
        self,
        signature: Any,
        *,
        session_context: Variables | None = None,
        auto_bind_common: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(signature, **arguments)
        self._begin(session_context, auto_bind_common)


class VariableAwareReAct(VariableAware, dspy.ReAct):  # type: ignore[misc]
    """A `dspy.ReAct` whose options variables set.

    Args:
        signature: See `dspy.ReAct`.
        tools: See `dspy.ReAct`.
        max_iters: See `dspy.ReAct`.
        session_context: The context that has the variables; None for none.
        auto_bind_common: Whether to bind what `COMMON` lists, as far as these variables are there.
    """

    COMMON: ClassVar[Mapping[str, str]] = {
        "temperature": "react_temperature",
        "max_tokens": "react_max_tokens",
        "max_iters": "max_react_iterations",
        "tools": "available_tools",
    }

    def __init__(
        self,
        signature: Any,
        tools: Iterable[Callable[..., Any]] = (),
        max_iters: int = 20,
        *,
        session_context: Variables | None = None,
        auto_bind_common: bool = True,
    ) -> None:
        super().__init__(signature, list(tools), max_iters)
        self._begin(session_context, auto_bind_common)


class VariableAwareProgramOfThought(VariableAware, dspy.ProgramOfThought):  # type: ignore[misc]
    """A `dspy.ProgramOfThought` whose options variables set.

    Args:
        signature: See `dspy.ProgramOfThought`.
        session_context: The context that has the variables; None for none.
        auto_bind_common: Whether to bind what `COMMON` lists, as far as these variables are there.
        arguments: See `dspy.ProgramOfThought`.
    """

    COMMON: ClassVar[Mapping[str, str]] = {"temperature": "pot_temperature", "max_tokens": "pot_max_tokens"}

    def __init__(
        self,
        signature: Any,
        *,
        session_context: Variables | None = None,
        auto_bind_common: bool = True,
        **arguments: Any,
    ) -> None:
        super().__init__(signature, **arguments)
        self._begin(session_context, auto_bind_common)


_KINDS: Final[dict[str, Callable[..., Any]]] = {
    "Predict": VariableAwarePredict,
    "ChainOfThought": VariableAwareChainOfThought,
    "ReAct": VariableAwareReAct,
    "ProgramOfThought": VariableAwareProgramOfThought,
}


def create_variable_aware_program(
    module_type: str,
    signature: Any,
    context: Variables | None,
    variable_bindings: Mapping[str, str] | None = None,
    *,
    auto_bind_common: bool = True,
    **arguments: Any,
) -> Any:
    """Make a variable-aware module.

    Args:
        module_type: "Predict", "ChainOfThought", "ReAct" or "ProgramOfThought", or what the class is called here.
        signature: Its signature.
        context: The context that has the variables; None for none.
        variable_bindings: By option, the variable that is to set it; they count more than what is common.
        auto_bind_common: See the class.
        arguments: See the class.

    Returns:
        The module.

    Raises:
        BindingError: There is no such type, or no such option.
        BoundValueError: The value of a variable cannot be what it is to set.
        VariableNotFoundError: There is no such variable.
    """
    name = str(module_type).removeprefix("dspy.").removeprefix(_PREFIX)
    kind = _KINDS.get(name)
    if kind is None:
        meant = did_you_mean(closest(name, _KINDS))
        raise BindingError(
            f"there is no variable-aware {quote(name)}, only {', '.join(_KINDS)}{meant and f': {meant}'}; "
            "bind works with every module"
        )
    program = kind(signature, session_context=context, auto_bind_common=auto_bind_common, **arguments)
    if variable_bindings:
        if context is None:
            raise BindingError("there are variable_bindings, and no context that has the variables")
        _bind_more(program, context, variable_bindings)
    return program


def sync_dspy_parameters(module: Any, prefix: str = "", context: Variables | None = None) -> dict[str, str]:
    """Bind the options of a program for which there are variables, by their names.

    The variable `prefix` + option sets an option of the whole program, and `prefix` + path + "." + option that of the
    predictor at a path: with the prefix "qa_", `qa_temperature`, and `qa_extract.predict.temperature`. Options that
    variables set already stay bound. It does not bind `model`, `adapter` and `module_type`, which choose among what
    this process has.

    Args:
        module: The program.
        prefix: What the names of the variables begin with.
        context: The context that has the variables; by default that of the module.

    Returns:
        By option, the variables that it has found.

    Raises:
        BindingError: No context is known, or it is not a DSPy module.
        BoundValueError: The value of a variable cannot be what it is to set.
    """
    ctx = _context_of(checked_module(module)) if context is None else context
    if ctx is None:
        raise BindingError("no context is known that has the variables: context=")
    if not isinstance(ctx, Variables):
        raise BindingError(f"context must be a context, not {type(ctx).__name__}")
    wanted = {attr: f"{prefix}{attr}" for attr in _attrs_of(module)}
    there = run(ctx, _existing(ctx, tuple(wanted.values())))
    found = {attr: variable for attr, variable in wanted.items() if variable in there}
    if found:
        _bind_more(module, ctx, found)
    return found


def _attrs_of(program: Any) -> Iterable[str]:
    """Yield the options that a program, and each of its predictors, can have."""
    modules, predictors = [each for _, each in modules_in(program)], list(predictors_in(program))
    for option in OPTIONS:
        if option in _CHOSEN_BY_NAME:
            continue
        if option in choosing.ATTRIBUTES:
            if any(choosing.can_set(each, option) for each in modules):
                yield option
            continue
        if (
            option not in checks.OF_PREDICTORS
            or len(predictors) == 1
            or (option == "instructions" and isinstance(program, dspy.ReAct))
        ):
            yield option
        for path, _ in predictors:
            if path != SELF:
                yield f"{path}.{option}"


def _existing(ctx: Variables, names: tuple[str, ...]) -> Steps[frozenset[str]]:
    found = yield from ask(commands.GetVariables(ctx.session_id, names))
    return frozenset(found.variables)


def _context_of(module: Any) -> Variables | None:
    """Return the context whose variables set options of a module, or are to."""
    binding = binding_of(module)
    if binding is not None:
        return binding.ctx
    kept: _Kept | None = getattr(module, "_dspex_persist_context", None)
    return None if kept is None else kept.ctx


def _listed(binding: Binding | None) -> dict[str, str]:
    """Return by option, with its path, which variable sets it."""
    if binding is None:
        return {}
    there = {f"{path}.{option}": each for path, options in binding.per.items() for option, each in options.items()}
    return {**binding.options, **there}


def _split(bound: Mapping[str, str]) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Return options without a path, and by path those with one."""
    options: dict[str, str] = {}
    per: dict[str, dict[str, str]] = {}
    for attr, variable in bound.items():
        path, _, option = attr.rpartition(".")
        (per.setdefault(path, {}) if path else options)[option] = variable
    return options, per


def _bind_more(module: Any, ctx: Variables, more: Mapping[str, str], **changes: Any) -> None:
    """Bind options besides those that are bound; options with a path count as those of `per`."""
    before = binding_of(module)
    for attr in more:
        option = str(attr).rpartition(".")[2]
        if option not in OPTIONS:
            meant = did_you_mean(_OTHER_WORDS.get(option) or closest(option, OPTIONS))
            raise BindingError(f"there is no option {quote(option)}{meant and f': {meant}'}")
    options, per = _split({**_listed(before), **more})
    terms: dict[str, Any] = {**options}
    if before is not None:
        precedence = "default" if before.is_default else "variable"
        terms |= {"precedence": precedence, "live": before.live, "lms": before.lms, "adapters": before.adapters}
    bind(module, ctx, per=per, **{**terms, **changes})
