"""The seam between synchronous and asynchronous code: verbs, which are written once, as generators of steps.

A verb's function yields steps, mostly commands, and gets their results; its `return` value is the verb's result:

    @verb
    def get(self, name: str) -> Steps[Any]:
        found = yield from ask(commands.GetVariables(self.session_id, (name,)))
        return decode(found.variables[name])

`ctx.get("x")` runs the steps here and now. `await ctx.get.aio("x")` runs the same steps from asyncio, without blocking
the event loop. A verb uses another one by its steps: `yield from self.get._steps("x")`.
"""

import asyncio
import inspect
import time
from abc import abstractmethod
from collections.abc import Callable, Coroutine, Generator, Mapping
from functools import update_wrapper
from typing import Any, Concatenate, Final, Generic, NamedTuple, ParamSpec, Protocol, TypeAlias, TypeVar, overload

from dspex_persist.state.commands import Command
from dspex_persist.state.errors import InvalidArgumentError

P = ParamSpec("P")
R = TypeVar("R")


class Terms(NamedTuple):
    """On whose behalf, and why, a command runs. None stands for the default.

    Attributes:
        actor: Terms makes the request, such as `user:alice`.
        reason: Why a change is made.
        idempotency_key: With the same key, a request takes effect only once.
        optimizer_id: The optimizer that makes the request, which may write variables that it has locked.
    """

    actor: str | None = None
    reason: str | None = None
    idempotency_key: str | None = None
    optimizer_id: str | None = None


DEFAULT: Final = Terms()


class Asked(NamedTuple):
    """A step: a command, with its terms."""

    command: Command[Any]
    terms: Terms


class Work(NamedTuple):
    """A step: a function that may block, or is a user's. From asyncio it runs in a thread; a coroutine is awaited."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


Step: TypeAlias = Command[Any] | Asked | Work
Steps: TypeAlias = Generator[Step, Any, R]
"""What a verb's function returns: it yields steps, and returns the verb's result."""


def ask(command: Command[R], terms: Terms | None = None) -> Steps[R]:
    """Run a command, and return its result."""
    result: R = yield command if terms is None else Asked(command, terms)
    return result


def work(function: Callable[..., R], *arguments: Any) -> Steps[R]:
    """Run a function that may block or is a user's, and return its result."""
    result: R = yield Work(function, arguments)
    return result


def pause(seconds: float) -> Steps[None]:
    """Wait; from asyncio without a thread."""
    yield Work(time.sleep, (seconds,))


class Runs(Protocol):
    """An object with verbs: it runs single steps."""

    @abstractmethod
    def _run_step(self, step: Step) -> Any:
        """Carry out a step here and now, and return its result."""

    @abstractmethod
    async def _run_step_aio(self, step: Step) -> Any:
        """Carry out a step without blocking the event loop, and return its result."""


_ARGUMENTS: Final[Mapping[str, str]] = {
    "after_sequence": "after",
    "from_variable": "name",
    "identifier": "name",
    "identifiers": "names",
    "new_session_id": "session_id",
    "target_version": "version",
    "to_variable": "other",
    "updates": "changes",
}
"""What verbs call the fields of commands that have another name."""


def as_argument(error: BaseException) -> BaseException:
    """Have an error about a field of a command name the argument of the verb; return it."""
    if isinstance(error, InvalidArgumentError):
        error.field = _ARGUMENTS.get(error.field, error.field)
    return error


def run_work(work: Work) -> Any:
    """Carry out work on this thread."""
    result = work.function(*work.arguments)
    if inspect.iscoroutine(result):
        result.close()
        raise TypeError(f"{work.function!r} is asynchronous: await the verb, for example ctx.update.aio(...)")
    return result


async def run_work_aio(work: Work) -> Any:
    """Carry out work in a thread, or on this loop if it is a coroutine function."""
    if work.function is time.sleep:
        return await asyncio.sleep(*work.arguments)
    if inspect.iscoroutinefunction(work.function):
        return await work.function(*work.arguments)
    return await asyncio.to_thread(work.function, *work.arguments)


def run(owner: Runs, steps: Steps[R]) -> R:
    """Run steps here and now, and return their result."""
    run_step = owner._run_step
    try:
        step = steps.send(None)
        while True:
            try:
                result = run_step(step)
            except BaseException as error:  # noqa: BLE001 - the steps decide about it
                step = steps.throw(as_argument(error))
            else:
                step = steps.send(result)
    except StopIteration as end:
        final: R = end.value
        return final


async def run_aio(owner: Runs, steps: Steps[R]) -> R:
    """Run steps from a coroutine, and return their result."""
    run_step = owner._run_step_aio
    try:
        step = steps.send(None)
        while True:
            try:
                result = await run_step(step)
            except BaseException as error:  # noqa: BLE001 - the steps decide about it
                step = steps.throw(as_argument(error))
            else:
                step = steps.send(result)
    except StopIteration as end:
        final: R = end.value
        return final


class BoundVerb(Generic[P, R]):
    """A verb of an object. Call it, or await `aio`; both take the same arguments and have the same result."""

    __slots__ = ("__wrapped__", "_owner")

    def __init__(self, owner: Runs, function: Callable[..., Steps[R]]) -> None:
        self._owner = owner
        self.__wrapped__ = function

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        owner = self._owner
        return run(owner, self.__wrapped__(owner, *args, **kwargs))

    def aio(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Return a coroutine that does the same without blocking the event loop."""
        owner = self._owner
        return run_aio(owner, self.__wrapped__(owner, *args, **kwargs))

    def _steps(self, *args: P.args, **kwargs: P.kwargs) -> Steps[R]:
        """Return the steps, for another verb of the same object."""
        return self.__wrapped__(self._owner, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        # Its object decides whether it can be copied or pickled, or says why not.
        return getattr, (self._owner, self.__wrapped__.__name__)

    def __repr__(self) -> str:
        return f"<verb {self.__wrapped__.__name__} of {self._owner!r}>"


# What `help` and notebooks show of `ctx.set` is about `set`.
BoundVerb.__doc__ = property(lambda self: self.__wrapped__.__doc__)  # type: ignore[assignment]


class verb(Generic[P, R]):
    """Makes a method of a function that returns steps."""

    def __init__(self, function: Callable[Concatenate[Any, P], Steps[R]]) -> None:
        self._function = function
        update_wrapper(self, function)  # type: ignore[arg-type]

    @overload
    def __get__(self, owner: None, kind: type) -> "verb[P, R]": ...

    @overload
    def __get__(self, owner: Runs, kind: type | None = None) -> BoundVerb[P, R]: ...

    def __get__(self, owner: Runs | None, kind: type | None = None) -> "verb[P, R] | BoundVerb[P, R]":
        return self if owner is None else BoundVerb(owner, self._function)
