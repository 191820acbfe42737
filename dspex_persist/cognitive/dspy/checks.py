"""Whether a binding suits its program: the places where options can be, and the first values of the variables."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from dspy import ReAct

from dspex_persist.cognitive.dspy import choosing, module_types
from dspex_persist.cognitive.dspy.options import check
from dspex_persist.cognitive.dspy.paths import SELF, modules_in, predictors_in
from dspex_persist.cognitive.dspy.snapshots import Binding, Reading, hide
from dspex_persist.cognitive.errors import BindingError, BoundValueError
from dspex_persist.spelling import quote

OF_PREDICTORS: Final = ("demos", "instructions")


def _places(program: Any, binding: Binding) -> Iterator[tuple[str, Any, str, str]]:
    """Yield path, module, option and variable of everything that a binding sets."""
    modules = dict(modules_in(program))
    for path, options in ((SELF, binding.options), *binding.per.items()):
        for option, variable in options.items():
            yield path, modules[path], option, variable


def check_places(program: Any, binding: Binding) -> None:
    """Raise `BindingError` if options are bound where they mean nothing, or nothing certain."""
    used = set()
    for path, module, option, _ in _places(program, binding):
        used.add(option)
        if option in OF_PREDICTORS:
            _check_predictor(path, module, option)
        elif option in choosing.ATTRIBUTES and not any(_agents(module, option)):
            kind = "a ReAct" if option == "tools" else "a module with max_iters, such as a ReAct"
            raise BindingError(f"{option} is an option of {kind}, which {_at(path)} has not")
        elif option == module_types.OPTION and not any(module_types.variable_modules(module)):
            kind = "a module made by ModuleVariableResolver.create_module"
            raise BindingError(f"{option} is an option of {kind}, which {_at(path)} has not")
    if "model" in used and not binding.lms:
        raise BindingError("model chooses among LMs by name: say which, lms={name: lm}")
    for name, option, given in (("lms", "model", binding.lms), ("adapters", "adapter", binding.adapters)):
        if given and option not in used:
            raise BindingError(f'{name}= is for the option {option}, which no variable sets: {option}="a variable"')


def _check_predictor(path: str, module: Any, option: str) -> None:
    predictors = [name for name, _ in predictors_in(module)]
    if len(predictors) == 1 or (option == "instructions" and isinstance(module, ReAct)):
        return
    prefix = "" if path == SELF else f"{path}."
    listed = ", ".join(quote(f"{prefix}{name}") for name in predictors) or "none"
    raise BindingError(
        f"{option} are those of one predictor, and {_at(path)} has {len(predictors)}; say which, "
        f"per={{path: {{{option!r}: variable}}}}: {listed}"
    )


def _at(path: str) -> str:
    return "the program" if path == SELF else quote(path)


def _agents(module: Any, option: str) -> Iterator[Any]:
    return (each for _, each in modules_in(module) if choosing.can_set(each, option))


def check_values(program: Any, binding: Binding, readings: Mapping[str, Reading]) -> None:
    """Raise `BoundValueError` if the value of a variable cannot be what it is to set."""
    try:
        _check_values(program, binding, readings)
    except BoundValueError as error:
        hide(error, readings.items())
        raise


def _check_values(program: Any, binding: Binding, readings: Mapping[str, Reading]) -> None:
    for _, module, option, variable in _places(program, binding):
        value = readings[variable].value
        check(option, variable, value)
        if option == "model":
            choosing.named(option, variable, value, binding.lms)
        elif option == "adapter":
            choosing.named(option, variable, value, choosing.adapters_of(binding))
        elif option == module_types.OPTION:
            for _, each in module_types.variable_modules(module):
                module_types.check_type(each, variable, value)
        elif option == "tools":
            for agent in _agents(module, option):
                choosing.tools_named(variable, value, vars(agent)["tools"])
        elif option == "demos":
            ((_, predict),) = predictors_in(module)
            choosing.check_demos(variable, value, predict.signature)
