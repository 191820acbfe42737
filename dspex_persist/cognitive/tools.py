"""`@tool`: makes a function or method a tool, which runs in a transaction."""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from math import inf
from typing import Any, Generic, ParamSpec, TypeVar, overload

from dspex_persist.cognitive import lm_guard
from dspex_persist.cognitive.errors import DspyMissingError, ToolDefinitionError
from dspex_persist.cognitive.signatures import Signature, read_signature
from dspex_persist.cognitive.tool_context import ToolContext
from dspex_persist.state.budgets import NO_BUDGET, Budget
from dspex_persist.state.errors import InvalidArgumentError, UnsupportedError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Concurrency, Isolation, ToolSpec, Value
from dspex_persist.state.tools.ports import ToolKind
from dspex_persist.state.tools.session import ToolSession

P = ParamSpec("P")
R = TypeVar("R")

REQUIREMENTS = ("durable", "remote")
"""What a tool may require of its session."""
_UNBOUND = object()
_NAME_LENGTH = 255


class Tool(Generic[P, R]):
    """A function with its description. Calling it calls the plain function, so a test can pass any context.

    A method is a tool of its instance: `instance.method` can run, `Class.method` only has the description. Two tools
    are equal if they are the same function (of the same instance).
    """

    __name__: str
    __qualname__: str

    def __init__(
        self,
        function: Callable[P, R],
        spec: ToolSpec,
        kind: ToolKind,
        signature: Signature,
        record_lm: bool = False,
        requires: str | None = None,
        budget: Budget = NO_BUDGET,
    ) -> None:
        functools.update_wrapper(self, function)
        self.budget = budget
        self.requires = requires
        self.spec = spec
        self.kind = kind
        self.record_lm = record_lm
        self._function: Callable[..., R] = function
        self._signature = signature
        self._receiver: object = _UNBOUND

    @property
    def needs_instance(self) -> bool:
        """Whether it is a method without an instance, which cannot run."""
        return self._signature.is_method and self._receiver is _UNBOUND

    @property
    def origin(self) -> str:
        """The module and the qualified name of its function."""
        return _origin(self._function)

    @functools.cached_property
    def reads_plainly(self) -> bool:
        """Whether `bind` runs no user code, such as validators or classes of the tool's module."""
        return self._signature.is_plain

    @property
    def result_type(self) -> str:
        """ "float" if the function's annotation says that it returns or yields floats (JSON has no NaN), else ""."""
        return self._signature.result_type

    def bind(self, parameters: Mapping[str, Value], limits: Limits | None = None) -> Mapping[str, object]:
        """Return new arguments for `start`.

        Raises:
            ToolArgumentError: Arguments are wrong, missing or unknown.
            LimitExceededError: An argument exceeds `limits`.
        """
        return self._signature.bind(self.spec.name, parameters, limits)

    def start(self, session: ToolSession, arguments: Mapping[str, object]) -> Any:
        """Call the function, and return its result, coroutine, generator or async generator, by `kind`.

        Call it in a separate `contextvars.Context`.
        """
        if self.requires is not None and not session.is_durable:
            raise UnsupportedError(
                f"tool {self.spec.name!r}, which requires a {self.requires} session, on a session in memory",
                "call it from a context, which moves the session first: Context(durable_at=..., remote_at=...)",
            )
        if self.record_lm or lm_guard.caller_is_recorded.get():
            _record_lm_calls(session, self.budget)
        context = [ToolContext(session)] if self._signature.takes_context else []
        started = self._function(*self._leading(), *context, **{**self._signature.make_defaults(), **arguments})
        if self.kind is ToolKind.FUNCTION:
            self._check_result(started)
        return started

    def recording_lm(self) -> "Tool[P, R]":
        """Return the same tool, with its LM calls recorded."""
        recording = self._clone()
        recording.record_lm = True
        return recording

    def _clone(self) -> "Tool[P, R]":
        clone: Tool[P, R] = object.__new__(type(self))
        vars(clone).update(vars(self))
        return clone

    def __reduce__(self) -> str | tuple[Any, ...]:
        # By its name, as functions and methods are.
        return self.__qualname__ if self._receiver is _UNBOUND else (getattr, (self._receiver, self.__name__))

    def _leading(self) -> tuple[object, ...]:
        return () if self._receiver is _UNBOUND else (self._receiver,)

    def _check_result(self, result: object) -> None:
        """Refuse a coroutine or generator as a result: a decorator below `@tool` hid it, and it would never run."""
        if inspect.iscoroutine(result) or inspect.isgenerator(result):
            result.close()
        elif not inspect.isasyncgen(result):
            return
        kind = type(result).__name__
        reason = (
            f"called as a plain function it returned a {kind}: decorate the async def, or the def with a yield, itself"
        )
        raise ToolDefinitionError(self.origin, reason)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._function(*self._leading(), *args, **kwargs)

    def __get__(self, instance: object | None, owner: type | None = None) -> "Tool[..., R]":
        if instance is None or not self.needs_instance:
            return self
        bound = self._clone()
        bound._receiver = instance
        return bound

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tool):
            return NotImplemented
        return self._function is other._function and self._receiver is other._receiver

    def __hash__(self) -> int:
        return hash((self._function, id(self._receiver)))

    def __repr__(self) -> str:
        return f"<Tool {self.spec.name!r}, {self.kind.value} {self.origin}>"


@overload
def tool(function: Callable[P, R], /) -> Tool[P, R]: ...


@overload
def tool(
    *,
    description: str | None = None,
    name: str | None = None,
    isolation: Isolation | str = Isolation.SERIALIZABLE,
    retries: int = 0,
    concurrency: Concurrency | str | None = None,
    requires: str | None = None,
    timeout_s: float | None = None,
    exposed: bool = False,
    required_variables: Iterable[str] = (),
    metadata: Mapping[str, str] | None = None,
    record_lm: bool = False,
    max_tokens: int | None = None,
    max_cost: float | None = None,
) -> Callable[[Callable[P, R]], Tool[P, R]]: ...


def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    description: str | None = None,
    name: str | None = None,
    isolation: Isolation | str = Isolation.SERIALIZABLE,
    retries: int = 0,
    concurrency: Concurrency | str | None = None,
    requires: str | None = None,
    timeout_s: float | None = None,
    exposed: bool = False,
    required_variables: Iterable[str] = (),
    metadata: Mapping[str, str] | None = None,
    record_lm: bool = False,
    max_tokens: int | None = None,
    max_cost: float | None = None,
) -> Any:
    """Make a function, an async function, a generator or an async generator a tool. The last two stream.

    The signature and the docstring describe its parameters. A first parameter annotated `ToolContext` receives the
    transaction.

    Args:
        function: The function, if the decorator is used without arguments.
        description: What the tool does; by default the beginning of the docstring.
        name: The tool's name; by default that of the function.
        isolation: "serializable", or "snapshot": then it conflicts only if others changed what it wrote.
        retries: How often to run it again, on new values, after a conflict.
        concurrency: What to do while another execution runs in the session: run at the same time ("optimistic"), wait
            for its turn ("queue") or be refused ("reject"). The stricter of this and the session's setting applies.
        requires: What its session has to be: "durable", on a file or a server; "remote", on a server. A context moves
            its session first if it is not (see `Context`).
        timeout_s: Its timeout in seconds. The caller's timeout applies as well.
        exposed: Whether workers may call it, too, through the coordinator.
        required_variables: The variables that the session must have before it starts.
        metadata: Metadata for clients that list tools.
        record_lm: Record its LM calls, and those of the tools that it calls, in the journal. Needs DSPy.
        max_tokens: How many tokens its own LM calls may use in all its executions in a session; then the next one
            raises `BudgetExceededError`. Needs `record_lm`.
        max_cost: The same in USD, as far as the cost of the calls is known.

    Raises:
        ToolDefinitionError: The function cannot be a tool, or an argument is invalid.
    """

    def decorate(function: Callable[..., Any]) -> Tool[..., Any]:
        _check_function(function)
        where, signature, kind = _origin(function), read_signature(function, _origin(function)), _kind_of(function)
        spec = ToolSpec(
            name=_checked_name(where, function.__name__ if name is None else name),
            description=signature.summary if description is None else description,
            parameters=tuple(parameter.described for parameter in signature.parameters.values()),
            streaming=kind in (ToolKind.GENERATOR, ToolKind.ASYNC_GENERATOR),
            exposed=bool(exposed),
            required_variables=_checked_variables(where, required_variables),
            isolation=_checked_isolation(where, isolation),
            retries=_checked_retries(where, retries),
            concurrency=_checked_concurrency(where, concurrency),
            timeout_s=_checked_timeout(where, timeout_s),
            metadata=_checked_metadata(where, metadata or {}),
        )
        needs = _checked_requires(where, requires)
        recorded = _checked_record_lm(where, record_lm)
        budget = _checked_budget(where, max_tokens, max_cost, recorded)
        return Tool(function, spec, kind, signature, recorded, needs, budget)

    return decorate if function is None else decorate(function)


def _origin(function: Callable[..., Any]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _kind_of(function: Callable[..., Any]) -> ToolKind:
    if inspect.isasyncgenfunction(function):
        return ToolKind.ASYNC_GENERATOR
    if inspect.isgeneratorfunction(function):
        return ToolKind.GENERATOR
    return ToolKind.COROUTINE if inspect.iscoroutinefunction(function) else ToolKind.FUNCTION


def _check_function(function: object) -> None:
    if inspect.isfunction(function):
        return
    if isinstance(function, Tool):
        raise ToolDefinitionError(function.origin, "it is one already")
    if isinstance(function, staticmethod | classmethod):
        reason = "class methods and static methods cannot be tools: use a function, or a method with self"
        raise ToolDefinitionError(_origin(function.__func__), reason)
    reason = "@tool goes on a function or a method, and takes everything else by name: @tool(description=...)"
    raise ToolDefinitionError(repr(function), reason)


def _checked_name(where: str, name: object) -> str:
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= _NAME_LENGTH:
        reason = f"its name must be 1 to {_NAME_LENGTH} printable characters, not {name!r}"
        raise ToolDefinitionError(where, reason)
    if name == "<lambda>":
        raise ToolDefinitionError(where, "a lambda has no name: use def, or give one with name=")
    return name


def _checked_isolation(where: str, isolation: object) -> Isolation:
    levels = [level.value for level in Isolation]
    if isolation not in levels:
        raise ToolDefinitionError(where, f"its isolation must be one of {', '.join(levels)}, not {isolation!r}")
    return Isolation(isolation)


def _checked_concurrency(where: str, concurrency: object) -> Concurrency | None:
    if concurrency is None:
        return None
    known = [each.value for each in Concurrency]
    if concurrency not in known:
        raise ToolDefinitionError(where, f"its concurrency must be one of {', '.join(known)}, not {concurrency!r}")
    return Concurrency(concurrency)


def _checked_requires(where: str, requires: object) -> str | None:
    if requires is not None and requires not in REQUIREMENTS:
        known = ", ".join(REQUIREMENTS)
        raise ToolDefinitionError(where, f"what it requires must be one of {known}, not {requires!r}")
    return requires


def _checked_retries(where: str, retries: object) -> int:
    if not isinstance(retries, int) or isinstance(retries, bool) or retries < 0:
        raise ToolDefinitionError(where, f"its retries must be a whole number from 0 up, not {retries!r}")
    return retries


def _checked_timeout(where: str, timeout_s: object) -> float | None:
    if timeout_s is None:
        return None
    if not isinstance(timeout_s, int | float) or isinstance(timeout_s, bool) or not 0 < timeout_s < inf:
        raise ToolDefinitionError(where, f"its timeout_s must be seconds above 0 (None: no limit), not {timeout_s!r}")
    return float(timeout_s)


def _checked_variables(where: str, names: Iterable[str]) -> tuple[str, ...]:
    listed: tuple[object, ...] = () if isinstance(names, str) else tuple(names)
    checked = tuple(name for name in listed if isinstance(name, str) and name)
    if isinstance(names, str) or len(checked) != len(listed):
        raise ToolDefinitionError(where, f"its required_variables must be a tuple of names, not {names!r}")
    return checked


def _checked_record_lm(where: str, record_lm: object) -> bool:
    if record_lm:
        try:
            # Slow to import, so now rather than in the first execution.
            import dspex_persist.cognitive.dspy  # noqa: F401
        except DspyMissingError as error:
            raise ToolDefinitionError(where, f"record_lm: {error}") from error
    return bool(record_lm)


def _checked_budget(where: str, max_tokens: object, max_cost: object, recorded: bool) -> Budget:
    try:
        budget = Budget.of(max_tokens, max_cost)
    except InvalidArgumentError as error:
        raise ToolDefinitionError(where, f"its {error.field}: {error.reason}") from None
    if budget != NO_BUDGET and not recorded:
        raise ToolDefinitionError(where, "a budget needs record_lm=True: only recorded LM calls are counted")
    return budget


def _record_lm_calls(session: ToolSession, budget: Budget) -> None:
    from dspex_persist.cognitive.dspy import record_calls

    lm_guard.caller_is_recorded.set(True)
    record_calls(session, budget)


def _checked_metadata(where: str, metadata: Mapping[str, str]) -> dict[str, str]:
    if not all(isinstance(text, str) for entry in metadata.items() for text in entry):
        raise ToolDefinitionError(where, f"its metadata must be strings by strings, not {metadata!r}")
    return dict(metadata)
