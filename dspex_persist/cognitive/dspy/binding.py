"""`bind` and `unbind`: options of DSPy programs that variables set."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from dspy import Adapter, BaseLM, Module

from dspex_persist.cognitive.dspy import checks, enforcing, hook
from dspex_persist.cognitive.dspy.module_types import OPTION
from dspex_persist.cognitive.dspy.options import OPTIONS
from dspex_persist.cognitive.dspy.paths import SELF, modules_in, predictors_in
from dspex_persist.cognitive.dspy.snapshots import ATTRIBUTE, Binding, binding_of, reading
from dspex_persist.cognitive.errors import BindingError
from dspex_persist.cognitive.steps import run
from dspex_persist.cognitive.variables import Variables
from dspex_persist.spelling import closest, did_you_mean, quote

M = TypeVar("M")

_PRECEDENCES: Final = ("variable", "default")


def bind(
    module: M,
    ctx: Variables,
    *,
    per: Mapping[str, Mapping[str, str]] | None = None,
    precedence: str = "variable",
    live: bool = False,
    lms: Mapping[str, Any] | None = None,
    adapters: Mapping[str, Any] | None = None,
    **options: str,
) -> M:
    """Have variables set options of a DSPy program, whoever changes them meanwhile.

        bind(program, ctx, temperature="temperature", per={"draft.predict": {"max_tokens": "draft_tokens"}})

    The module stays what it is, with its names, its state and its identity; its copies have the same binding. It takes
    effect where the LM is called, after DSPy has merged all options. One outermost call of a bound module, or one
    `batch`, uses the values of one moment. If the module was bound, this binding replaces the old one; only a variable
    that says its `module_type` stays.

    Args:
        module: A DSPy module, such as a predictor or a whole program.
        ctx: The context that has the variables; also that of a tool, or a transaction.
        per: By the path of a predictor, or of a module in the program, options that apply there only. The longest path
            counts most, and each counts more than `options`. A binding of a module in the program counts more still.
        precedence: "variable": variables beat what the LM, the predictor and the call say; "default": they set only
            what none of these says.
        live: Read the variables for each call of an LM, instead of once for each outermost call.
        lms: The LMs among which the option `model` chooses, by the names that its variable has.
        adapters: The adapters among which the option `adapter` chooses, by name; by default DSPy's own: "chat", "json"
            and "xml".
        options: By the name of an option, the variable that sets it.

    Returns:
        The module.

    Raises:
        BindingError: There is no such option, or nothing at a path, or the module cannot have the option.
        BoundValueError: The value of a variable cannot be what it is to set.
        VariableNotFoundError: There is no such variable.
    """
    program = checked_module(module)
    if not isinstance(ctx, Variables):
        raise BindingError(f"ctx must be a context, not {type(ctx).__name__}")
    if precedence not in _PRECEDENCES:
        raise BindingError(f"precedence must be one of {', '.join(_PRECEDENCES)}, not {precedence!r}")
    said: object = live
    if not isinstance(said, bool):
        raise BindingError(f"live must be True or False, not {live!r}")
    before = binding_of(program)
    if before is not None and OPTION in before.options:
        options.setdefault(OPTION, before.options[OPTION])
    there = _checked_per(program, {} if per is None else per)
    binding = Binding(
        ctx,
        _checked_options(options, ""),
        there,
        is_default=precedence == "default",
        live=live,
        lms=_checked_choice("lms", lms, is_lm, "an LM"),
        adapters=_checked_choice("adapters", adapters, lambda each: isinstance(each, Adapter), "an adapter"),
    )
    if not binding.names:
        raise BindingError('it names no variable: say which one sets what, such as temperature="temperature"')
    checks.check_places(program, binding)
    checks.check_values(program, binding, run(ctx, reading(ctx, binding.names)))
    hook.install()
    enforcing.install()
    setattr(program, ATTRIBUTE, binding)
    return module


def checked_module(module: object) -> Any:
    """Return what is a DSPy module; raise `BindingError` for anything else."""
    if not isinstance(module, Module):
        what = f"the class {module.__name__}" if isinstance(module, type) else type(module).__name__
        raise BindingError(f"it is not a DSPy module, but {what}")
    return module


def is_lm(lm: Any) -> bool:
    """Return whether DSPy can call an object as an LM."""
    return isinstance(lm, BaseLM) or getattr(lm, "supports_decision_requests", False) is True


def _checked_choice(
    name: str, choice: Mapping[str, Any] | None, fits: Callable[[Any], bool], what: str
) -> dict[str, Any]:
    given: Any = {} if choice is None else choice
    if not isinstance(given, Mapping):
        raise BindingError(f"{name} must be a dict of names, not {type(given).__name__}: {name}={{name: {what}}}")
    for key, each in given.items():
        if not isinstance(key, str) or not fits(each):
            raise BindingError(f"{name} must have {what} for each name, not {type(each).__name__} for {key!r}")
    return dict(given)


def unbind(module: M, *options: str) -> M:
    """Undo a binding of a module, in all of the program's copies that are made afterwards as well.

    Args:
        module: The module that was bound. If it was not, nothing happens.
        options: The options that variables no longer set, anywhere in the module; without any, all of them.

    Returns:
        The module.

    Raises:
        BindingError: No variable sets such an option, or it is not a DSPy module.
    """
    program = checked_module(module)
    binding = binding_of(program)
    if binding is None:
        return module
    bound = dict.fromkeys(option for option, _ in _pairs(binding))
    for option in options:
        if option not in bound:
            raise BindingError(f"no variable sets {quote(option)}{_suggestion(option, bound)}")
    kept = _without(binding.options, options) if options else {}
    per = {path: rest for path, each in binding.per.items() if (rest := _without(each, options))} if options else {}
    if kept or per:
        setattr(program, ATTRIBUTE, binding.replace(kept, per))
    else:
        delattr(program, ATTRIBUTE)
    return module


@dataclass(frozen=True, slots=True)
class BoundOption:
    """An option of a program that a variable sets.

    Attributes:
        path: Where in the program: "self" for all of it.
        option: The option, such as `temperature`.
        variable: The name of the variable.
        session_id: The session of the variable.
        precedence: "variable" if it beats what else says the option, "default" if it only fills in.
        live: Whether it is read for each call of an LM.
    """

    path: str
    option: str
    variable: str
    session_id: str
    precedence: str
    live: bool


def bindings(module: Any) -> tuple[BoundOption, ...]:
    """Return which options of a program variables set, including the bindings of modules inside it.

    Args:
        module: The program, or a module.

    Raises:
        BindingError: It is not a DSPy module.
    """
    checked_module(module)
    return tuple(
        BoundOption(
            _joined(place, path),
            option,
            variable,
            binding.ctx.session_id,
            "default" if binding.is_default else "variable",
            binding.live,
        )
        for place, each in modules_in(module)
        if (binding := binding_of(each)) is not None
        for path, options in ((SELF, binding.options), *binding.per.items())
        for option, variable in options.items()
    )


def _joined(place: str, path: str) -> str:
    """Return the path in a program of what is at a path in the module at a place."""
    if SELF in (place, path):
        return path if place == SELF else place
    return f"{place}.{path}"


def _without(options: Mapping[str, str], gone: Iterable[str]) -> dict[str, str]:
    return {option: variable for option, variable in options.items() if option not in gone}


def _pairs(binding: Binding) -> list[tuple[str, str]]:
    """Return all pairs of an option and its variable."""
    return [pair for options in (binding.options, *binding.per.values()) for pair in options.items()]


def _checked_options(options: Mapping[str, str], path: str) -> dict[str, str]:
    where = f" of {quote(path)}" if path else ""
    for option, variable in options.items():
        if option not in OPTIONS:
            raise BindingError(f"there is no option {quote(option)}{where}{_suggestion(option, OPTIONS)}")
        given: object = variable
        if not isinstance(given, str) or not given:
            raise BindingError(f"{option}{where} takes the name of a variable, not {variable!r}")
    return dict(options)


def _checked_per(program: Any, per: Any) -> dict[str, dict[str, str]]:
    if not isinstance(per, Mapping):
        raise BindingError(f"per must be a dict, not {type(per).__name__}: per={{path: {{option: variable}}}}")
    paths = dict(modules_in(program)) if per else {}
    for path in per:
        if path not in paths:
            names = [name for name, _ in predictors_in(program)]
            listed = f"its predictors are {', '.join(map(quote, names))}" if names else "it has no predictors"
            raise BindingError(f"the program has no predictor {quote(path)}{_suggestion(path, paths)}; {listed}")
        if not isinstance(per[path], Mapping):
            kind = type(per[path]).__name__
            raise BindingError(f"per must have a dict for {quote(path)}, not {kind}: {{option: variable}}")
    return {path: _checked_options(options, path) for path, options in per.items()}


def _suggestion(name: str, names: Iterable[str]) -> str:
    meant = did_you_mean(closest(str(name), names))
    return f": {meant}" if meant else ""
