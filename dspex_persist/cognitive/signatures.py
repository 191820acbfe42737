"""Signatures of tools: reads the parameters of a function, and binds arguments to them."""

import copy
import inspect
import types
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Collection,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import docstring_parser

from dspex_persist.cognitive.errors import ToolDefinitionError
from dspex_persist.cognitive.parameters import Parameter, one_line, read_parameter
from dspex_persist.cognitive.tool_context import ToolContext
from dspex_persist.spelling import closest, did_you_mean
from dspex_persist.state.errors import ToolArgumentError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value
from dspex_persist.state.values.json_text import RefusedError, shorten

_CONTEXT_NAMES = ("ctx", "context")
_NAMES_SHOWN = 10
_STREAMS = (AsyncGenerator, AsyncIterable, AsyncIterator, Generator, Iterable, Iterator)


@dataclass(frozen=True, slots=True)
class Signature:
    """The signature of a tool's function.

    Attributes:
        parameters: Its parameters by name, without the context and `self`.
        takes_context: Whether its first parameter is a ToolContext.
        is_method: Whether it is a method.
        summary: The first paragraph of its docstring.
        result_type: "float" if the annotation says that it returns, or yields, floats; else "".
    """

    parameters: Mapping[str, Parameter]
    takes_context: bool
    is_method: bool
    summary: str
    result_type: str = ""

    @property
    def is_plain(self) -> bool:
        """Whether reading its arguments runs no user code."""
        return all(parameter.is_plain for parameter in self.parameters.values())

    def make_defaults(self) -> dict[str, object]:
        """Return copies of the defaults that the function could modify, so that each call has its own."""
        return {
            name: copy.deepcopy(parameter.default)
            for name, parameter in self.parameters.items()
            if parameter.default is not None
        }

    def bind(self, tool: str, parameters: Mapping[str, Value], limits: Limits | None = None) -> dict[str, object]:
        """Return the arguments by name.

        Raises:
            ToolArgumentError: Arguments are wrong, missing or unknown. It explains the first and names the others.
            LimitExceededError: An argument exceeds `limits`.
        """
        arguments: dict[str, object] = {}
        wrong = {name: self._unknown(name) for name in parameters if name not in self.parameters}
        for name, parameter in self.parameters.items():
            if name not in parameters:
                if parameter.described.required:
                    wrong[name] = f"it is required ({parameter.described.type})"
                continue
            try:
                arguments[name] = parameter.read(parameters[name], limits)
            except RefusedError as error:
                wrong[name] = error.reason
        if wrong:
            first, *others = wrong
            more = f" (also wrong: {_listed(others)})" if others else ""
            raise ToolArgumentError(tool, first, wrong[first] + more)
        return arguments

    def _unknown(self, name: str) -> str:
        if not self.parameters:
            return "the tool takes no parameters"
        hint = did_you_mean(closest(name, self.parameters)) or f"the tool takes {_listed(self.parameters)}"
        return f"there is no such parameter; {hint}"


def read_signature(function: Callable[..., Any], named: str) -> Signature:
    """Read the signature and the docstring of a function, which errors call `named`.

    Raises:
        ToolDefinitionError: The function cannot be a tool.
    """
    listed = list(inspect.signature(function).parameters.values())
    is_method = _is_method(function)
    if is_method:
        _check_receiver(named, listed)
        listed = listed[1:]
    annotations = {parameter.name: _annotation_of(function, parameter, named) for parameter in listed}
    takes_context = bool(listed) and _is_context(listed[0], annotations[listed[0].name])
    if takes_context:
        listed = listed[1:]
    for parameter in listed:
        _check_parameter(named, parameter, annotations[parameter.name])
    if listed and not takes_context:
        _check_not_meant_as_context(named, listed[0])
    summary, descriptions = _read_docstring(function)
    parameters = {
        parameter.name: read_parameter(
            named, parameter, annotations[parameter.name], descriptions.get(parameter.name, "")
        )
        for parameter in listed
    }
    return Signature(parameters, takes_context, is_method, summary, _result_type(function))


def _is_method(function: Callable[..., Any]) -> bool:
    """Return whether it is defined in a class, by its name: the class does not exist yet when methods are decorated."""
    _, _, scope = function.__qualname__.rpartition(".")[0].rpartition(".")
    return bool(scope) and scope != "<locals>"


def _is_context(first: inspect.Parameter, annotation: Any) -> bool:
    return annotation is ToolContext and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)


def _check_receiver(named: str, listed: Sequence[inspect.Parameter]) -> None:
    if not listed or listed[0].name != "self":
        reason = "a method's first parameter must be self: class methods and static methods cannot be tools"
        raise ToolDefinitionError(named, reason)


def _check_parameter(named: str, parameter: inspect.Parameter, annotation: Any) -> None:
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        reason = f"a schema has no place for its {str(parameter).partition(':')[0]}: name each parameter"
        raise ToolDefinitionError(named, reason)
    if parameter.kind is parameter.POSITIONAL_ONLY:
        reason = f"its parameter {parameter.name} is positional-only, and arguments come by name: move or remove the /"
        raise ToolDefinitionError(named, reason)
    if _mentions_context(annotation):
        reason = f"its parameter {parameter.name} is a ToolContext: only the first can be, with exactly this annotation"
        raise ToolDefinitionError(named, reason)


def _check_not_meant_as_context(named: str, first: inspect.Parameter) -> None:
    if first.name in _CONTEXT_NAMES and first.annotation is first.empty:
        reason = f"annotate its first parameter: {first.name}: ToolContext (or Any, if it is an argument)"
        raise ToolDefinitionError(named, reason)


def _annotation_of(function: Callable[..., Any], parameter: inspect.Parameter, named: str) -> Any:
    """Return the annotation, with quoted names resolved; ToolContext need not be imported for that."""
    if parameter.annotation is parameter.empty:
        return Any
    names = {"ToolContext": ToolContext, **getattr(inspect.unwrap(function), "__globals__", {})}
    holder: Any = types.SimpleNamespace(__annotations__={"it": parameter.annotation})
    try:
        return get_type_hints(holder, names, include_extras=True)["it"]
    except (AttributeError, NameError, SyntaxError, TypeError) as error:
        reason = f"the annotation of its parameter {parameter.name} cannot be looked up in its module: {error}"
        raise ToolDefinitionError(named, reason) from error


def _result_type(function: Callable[..., Any]) -> str:
    names = {"ToolContext": ToolContext, **getattr(inspect.unwrap(function), "__globals__", {})}
    holder: Any = types.SimpleNamespace(__annotations__={"it": inspect.signature(function).return_annotation})
    try:
        annotation = get_type_hints(holder, names)["it"]
    except Exception:  # noqa: BLE001 -- names in it need not exist at run time, and nothing else depends on it
        return ""
    if get_origin(annotation) in _STREAMS:
        annotation = get_args(annotation)[0]
    alternatives = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    return "float" if float in alternatives and set(alternatives) <= {float, int, types.NoneType} else ""


def _mentions_context(annotation: Any) -> bool:
    """Return whether the annotation is, or contains, ToolContext."""
    if isinstance(annotation, type) and get_origin(annotation) is None:
        return issubclass(annotation, ToolContext)
    return any(_mentions_context(argument) for argument in get_args(annotation))


def _read_docstring(function: Callable[..., Any]) -> tuple[str, Mapping[str, str]]:
    """Return the first paragraph, and the descriptions of the parameters (Google, NumPy and Sphinx styles)."""
    try:
        parsed = docstring_parser.parse(inspect.getdoc(function) or "")
    except docstring_parser.ParseError:
        return "", {}
    descriptions = {
        name.strip(): one_line(entry.description or "") for entry in parsed.params for name in entry.arg_name.split(",")
    }
    return one_line((parsed.description or "").partition("\n\n")[0]), descriptions


def _listed(names: Collection[str]) -> str:
    """Return names for a message, at most a few."""
    shown_names = [shorten(name) for name in list(names)[:_NAMES_SHOWN]]
    if len(names) > _NAMES_SHOWN:
        shown_names.append("...")
    return ", ".join(shown_names)
