"""What variables set besides the options of LM calls: models, adapters, instructions, demos, tools, iterations."""

import inspect
import operator
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Final, Literal

from dspy import LM, ChatAdapter, JSONAdapter, ReAct, XMLAdapter, settings
from dspy.signatures.signature import ensure_signature
from dspy.utils.constants import IS_TYPE_UNDEFINED
from pydantic import TypeAdapter, ValidationError

from dspex_persist.cognitive.dspy.options import check
from dspex_persist.cognitive.dspy.paths import predictors_in
from dspex_persist.cognitive.dspy.snapshots import Binding, Scope, current
from dspex_persist.cognitive.errors import BoundValueError
from dspex_persist.spelling import closest, did_you_mean, quote

ATTRIBUTES: Final = ("max_iters", "tools")
"""The options that are attributes of modules."""
_FINISH: Final = "finish"
"""The tool of every ReAct with which it ends its loop."""
_DEFAULT_INSTRUCTIONS: Final = re.compile(r"Given the fields (`\w+`(, )?)*, produce the fields (`\w+`(, )?)*\.")
_OWN_ADAPTERS: Final = {"chat": ChatAdapter(), "json": JSONAdapter(), "xml": XMLAdapter()}
_SCALARS: Final = (str, int, float, bool, type(None))


def _unknown(option: str, variable: str, value: object, name: str, names: Mapping[str, Any]) -> BoundValueError:
    listed = f"there is no {quote(name)}; known are {', '.join(map(quote, names))}"
    meant = did_you_mean(closest(name, names))
    return BoundValueError(option, variable, value, f"{listed}; {meant}" if meant else listed)


def _value(scope: Scope, option: str) -> Any:
    choice = scope.choices[option]
    value = scope.reading(choice).value
    check(option, choice.variable, value)
    return value


# Models and adapters


def named(option: str, variable: str, value: Any, known: Mapping[str, Any]) -> Any:
    """Return the LM, or the adapter, that the value of a variable names."""
    if value not in known:
        raise _unknown(option, variable, value, value, known)
    return known[value]


def settings_in(scope: Scope) -> dict[str, Any]:
    """Return the settings of DSPy that variables set in a scope: the LM and the adapter."""
    changes: dict[str, Any] = {}
    if "model" in scope.choices:
        lm, before = _model(scope), settings.lm
        if before is None or not (scope.choices["model"].binding.is_default or _is_copy(before, lm)):
            changes["lm"] = lm
    if "adapter" in scope.choices:
        choice = scope.choices["adapter"]
        if not choice.binding.is_default or settings.adapter is None:
            value = _value(scope, "adapter")
            changes["adapter"] = named("adapter", choice.variable, value, adapters_of(choice.binding))
    return changes


def adapters_of(binding: Binding) -> Mapping[str, Any]:
    """Return the adapters that a variable can name."""
    return binding.adapters or _OWN_ADAPTERS


def _model(scope: Scope) -> Any:
    choice = scope.choices["model"]
    return named("model", choice.variable, _value(scope, "model"), choice.binding.lms)


def _is_copy(lm: Any, original: Any) -> bool:
    """Whether an LM was made by `copy` of another one, as DSPy does for other rollouts of the same model."""
    if type(lm) is not type(original) or lm.model != original.model:
        return False
    if isinstance(lm, LM):
        return lm._engine_store is original._engine_store
    own = {"history", "callbacks", "kwargs"}
    shared = [
        getattr(lm, name, None) is each
        for name, each in vars(original).items()
        if not isinstance(each, _SCALARS) and name not in own and not name.endswith("engine_spec")
    ]
    return bool(shared) and all(shared)


# Attributes


class _Overridable:
    """An attribute of modules that variables set while the module is called, for that call only."""

    def __init__(self, name: str, before: Any) -> None:
        self._name, self._before = name, before

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickle of a class, such as cloudpickle makes of those of a script, has what was there before.
        return operator.getitem, ((*self._before, None), 0)

    def __get__(self, module: Any, kind: type) -> Any:
        if module is not None:
            scope = current()
            if scope is not None and scope.module is module and self._name in scope.attributes:
                return scope.attributes[self._name]
            if self._name in vars(module):
                return vars(module)[self._name]
        if self._before:
            return self._before[0]
        raise AttributeError(f"type object {kind.__name__!r} has no attribute {self._name!r}")

    def __set__(self, module: Any, value: Any) -> None:
        vars(module)[self._name] = value

    def __delete__(self, module: Any) -> None:
        if self._name not in vars(module):
            raise AttributeError(self._name)
        del vars(module)[self._name]


_overriding: Final = threading.Lock()


def _make_overridable(kind: type[Any], name: str) -> None:
    with _overriding:
        if not any(isinstance(vars(each).get(name), _Overridable) for each in kind.__mro__):
            before = [vars(each)[name] for each in kind.__mro__ if name in vars(each)]
            setattr(kind, name, _Overridable(name, before))


def can_set(module: Any, option: str) -> bool:
    """Return whether a module has the attribute that an option sets."""
    return option in vars(module) and (option != "tools" or isinstance(module, ReAct))


def attributes_in(scope: Scope) -> dict[str, Any]:
    """Return the attributes that variables set in the call of the scope's module."""
    attributes: dict[str, Any] = {}
    for option in ATTRIBUTES:
        choice = scope.choices.get(option)
        if choice is None or not can_set(scope.module, option):
            continue
        own = vars(scope.module)[option]
        if choice.binding.is_default and not _is_unsaid(scope.module, option, own):
            continue
        value = _value(scope, option)
        attributes[option] = tools_named(choice.variable, value, own) if option == "tools" else value
        _make_overridable(type(scope.module), option)
    return attributes


def _is_unsaid(module: Any, option: str, own: Any) -> bool:
    """Whether an attribute is what the constructor of a DSPy module sets by default."""
    parameter = inspect.signature(type(module).__init__).parameters.get(option)
    return parameter is not None and parameter.default == own


def tools_named(variable: str, names: list[str], tools: Mapping[str, Any]) -> dict[str, Any]:
    """Return those tools of an agent that a variable names, and the one that ends its loop."""
    public = {name: each for name, each in tools.items() if name != _FINISH}
    for name in names:
        if name not in tools:
            raise _unknown("tools", variable, names, name, public)
    return {name: each for name, each in tools.items() if name in names or name == _FINISH}


# Predictors


def prepared(scope: Scope, predict: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a predictor's call, with the LM, signature and demos that variables set."""
    choices = scope.choices
    changes: dict[str, Any] = {}
    own = kwargs.get("lm") or predict.lm
    if "model" in choices and own is not None and not choices["model"].binding.is_default:
        lm = _model(scope)
        if not _is_copy(own, lm):
            changes["lm"] = lm
    signature = ensure_signature(kwargs.get("signature", predict.signature))
    changed = _with_tools(scope, predict, signature)
    if "instructions" in choices:
        changed = _with_instructions(scope, predict, changed, is_said="signature" in kwargs)
    if changed is not signature:
        changes["signature"] = changed
    if "demos" in choices and is_of(choices["demos"].target, predict):
        choice = choices["demos"]
        if not (choice.binding.is_default and (kwargs.get("demos") or predict.demos)):
            demos = _value(scope, "demos")
            check_demos(choice.variable, demos, signature)
            changes["demos"] = demos
    return {**kwargs, **changes} if changes else kwargs


def is_of(target: Any, predict: Any) -> bool:
    """Return whether a predictor is a module, or the only predictor in it."""
    return target is predict or [each for _, each in predictors_in(target)] == [predict]


def _with_instructions(scope: Scope, predict: Any, signature: Any, *, is_said: bool) -> Any:
    choice = scope.choices["instructions"]
    target = choice.target
    is_react = isinstance(target, ReAct)
    if is_react and predict is vars(target).get("react"):
        said = ensure_signature(target.signature).instructions
    elif is_of(target, predict) or (is_react and is_of(vars(target).get("extract"), predict)):
        said = signature.instructions
    else:
        return signature
    if choice.binding.is_default and (is_said or not _DEFAULT_INSTRUCTIONS.fullmatch(said)):
        return signature
    instructions = _value(scope, "instructions")
    if is_react and predict is vars(target)["react"]:
        instructions = _step_instructions(target.signature, instructions, _Tools.of(_tools_of(scope, target)))
    return _instructed(signature, instructions)


@lru_cache(maxsize=64)
def _instructed(signature: Any, instructions: str) -> Any:
    return signature.with_instructions(instructions)


@dataclass(frozen=True)
class _Tools:
    """The tools of an agent, which are the same if the model is told the same about them."""

    names: tuple[str, ...]
    text: str
    tools: tuple[Any, ...] = field(compare=False)

    @classmethod
    def of(cls, tools: Mapping[str, Any]) -> "_Tools":
        text = "\n".join(f"({number}) {tool}" for number, tool in enumerate(tools.values(), 1))
        return cls(tuple(tools), text, tuple(tools.values()))


def _tools_of(scope: Scope, agent: Any) -> dict[str, Any]:
    """Return the tools that an agent has while it calls the predictor of a scope."""
    outer = scope.outer
    attributes = outer.attributes if outer is not None and outer.module is agent else {}
    tools: dict[str, Any] = attributes.get("tools", vars(agent)["tools"])
    return tools


@lru_cache(maxsize=64)
def _step_instructions(signature: Any, instructions: str, tools: _Tools) -> str:
    """Return the instructions with which a ReAct that has these instructions and tools asks for its next step."""
    others = [tool for name, tool in zip(tools.names, tools.tools, strict=True) if name != _FINISH]
    agent = ReAct(ensure_signature(signature).with_instructions(instructions), others)
    return str(agent.react.signature.instructions)


def _with_tools(scope: Scope, predict: Any, signature: Any) -> Any:
    """Return the signature with which a ReAct asks for its next step, for those of its tools that it has now."""
    agent = scope.outer.module if scope.outer is not None else None
    if not isinstance(agent, ReAct) or vars(agent).get("react") is not predict:
        return signature
    own, tools = vars(agent)["tools"], _tools_of(scope, agent)
    return signature if tools is own else _restricted(signature, _Tools.of(own), _Tools.of(tools))


@lru_cache(maxsize=64)
def _restricted(signature: Any, own: _Tools, tools: _Tools) -> Any:
    """Return the signature of a ReAct that knows only some of its tools; optimizers may have changed the rest."""
    instructions = signature.instructions
    if own.text in instructions:
        instructions = instructions.replace(own.text, tools.text)
    else:
        instructions = f"{instructions}\nUse only these tools:\n{tools.text}"
    if "next_tool_name" in signature.fields:
        signature = signature.with_updated_fields("next_tool_name", type_=Literal[tools.names])
    return signature.with_instructions(instructions)


def check_demos(variable: str, demos: list[dict[str, Any]], signature: Any) -> None:
    """Raise `BoundValueError` unless the demos have fields of the signature, with values of their types."""
    for number, demo in enumerate(demos):
        problem = _problem_with(demo, signature)
        if problem:
            raise BoundValueError("demos", variable, demos, f"demo {number} {problem}")


def _problem_with(demo: Mapping[str, Any], signature: Any) -> str:
    for name in demo:
        if name not in signature.fields and name != "augmented":
            meant = did_you_mean(closest(name, signature.fields))
            listed = f"has {quote(name)}, which is no field of {signature.signature}"
            return f"{listed}; {meant}" if meant else listed
    for side, fields in (("input", signature.input_fields), ("output", signature.output_fields)):
        if not any(name in demo for name in fields):
            return f"has no {side} field: {', '.join(map(quote, fields))}"
    for name, kind in _types_of(signature).items():
        if name in demo:
            try:
                kind.validate_python(demo[name])
            except ValidationError as error:
                return f"has a wrong {quote(name)}: {error.errors()[0]['msg']}"
    return ""


@lru_cache(maxsize=64)
def _types_of(signature: Any) -> dict[str, TypeAdapter[Any]]:
    """Return the types of the fields that have one."""
    return {
        name: TypeAdapter(each.annotation)
        for name, each in signature.fields.items()
        if not each.json_schema_extra.get(IS_TYPE_UNDEFINED, False)
    }
