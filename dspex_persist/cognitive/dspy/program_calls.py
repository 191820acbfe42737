"""Calls of saved programs as tools: each is an execution in the journal, with inputs, reads, writes and outputs."""

import asyncio
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import dspy

from dspex_persist.cognitive import lm_guard
from dspex_persist.cognitive.dspy.hook import record_calls
from dspex_persist.cognitive.dspy.program_parts import Parts
from dspex_persist.cognitive.dspy.program_state import annotations_of
from dspex_persist.cognitive.dspy.program_types import Classes
from dspex_persist.cognitive.dspy.program_values import UnreadableError, UnstorableError, decode, encode
from dspex_persist.cognitive.dspy.requests import plain
from dspex_persist.cognitive.joining import InExecution
from dspex_persist.cognitive.programs.documents import variable_of
from dspex_persist.state import values
from dspex_persist.state.errors import InvalidArgumentError, ToolArgumentError
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ToolParameter, ToolSpec, Value
from dspex_persist.state.tools.ports import ToolKind
from dspex_persist.state.tools.session import ToolSession

CONTEXT: Final = "ctx"
INPUTS: Final = "inputs"
VERSION: Final = "version"


class Signatures:
    """What a program takes and returns, as JSON.

    Args:
        program: The module, whose predictors say which classes occur.
    """

    def __init__(self, program: dspy.Module) -> None:
        signatures = [each.signature for each in Parts(program).predictors.values()]
        self._fields = {name: field.annotation for each in signatures for name, field in each.fields.items()}
        self._classes = Classes(annotation for each in signatures for annotation in annotations_of(each))

    def inputs_as_json(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return inputs as JSON.

        Raises:
            InvalidArgumentError: One of them is no data.
        """
        try:
            return {name: encode(value, self._classes, self._fields.get(name)) for name, value in inputs.items()}
        except UnstorableError as error:
            raise InvalidArgumentError(INPUTS, f"the journal has them, and one is {error}") from error

    def inputs_of(self, tool: str, document: Mapping[str, Any]) -> dict[str, Any]:
        """Return the inputs in JSON.

        Raises:
            ToolArgumentError: They cannot be read.
        """
        try:
            return {name: decode(each, self._classes, self._fields.get(name)) for name, each in document.items()}
        except UnreadableError as error:
            raise ToolArgumentError(tool, INPUTS, str(error)) from error

    def result_as_json(self, result: Any) -> Any:
        """Return what a program has returned as JSON; objects that are no data become the names of their types."""
        if isinstance(result, dspy.Example):
            pairs: Iterable[tuple[str, Any]] = result.items(include_dspy=True)
            return {name: self._output(each, self._fields.get(name)) for name, each in pairs}
        return self._output(result, None)

    def _output(self, value: Any, annotation: Any) -> Any:
        try:
            return encode(value, self._classes, annotation)
        except UnstorableError:
            return plain(value)

    def prediction_of(self, document: Any) -> Any:
        """Return what `result_as_json` has made JSON of, as a prediction if it was one."""
        if not isinstance(document, dict) or "$" in document:
            return decode(document, self._classes)
        return dspy.Prediction(
            **{name: decode(each, self._classes, self._fields.get(name)) for name, each in document.items()}
        )


def takes_context(make: Any) -> bool:
    """Whether a function that makes a module takes the context whose variables it uses."""
    # The signature of a module's class is that of its metaclass.
    function = inspect.getattr_static(make, "__init__") if isinstance(make, type) else make
    try:
        return CONTEXT in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def run_program(program: dspy.Module, inputs: Mapping[str, Any]) -> Any:
    """Run a program on this thread, also one that has only `aforward`."""
    if hasattr(type(program), "forward"):
        return program(**inputs)
    return asyncio.run(program.acall(**inputs))


class ProgramCode:
    """The code of a tool that loads a program, and runs it.

    Args:
        name: The name of the program.
        load: Takes the variables of an execution and the version, and returns the program, loaded.
        record_lm: Whether its LM calls are recorded.
        options: Options of its `ToolSpec`.

    Attributes:
        result: What the program has returned.
        error: What it has raised.
    """

    kind = ToolKind.FUNCTION
    reads_plainly = True
    result_type = ""

    def __init__(
        self, name: str, load: Callable[[InExecution, Any], dspy.Module], record_lm: bool, **options: Any
    ) -> None:
        parameters = (
            ToolParameter(INPUTS, "map", "The inputs of the program by name."),
            ToolParameter(VERSION, "any", "The number of its version, or a tag.", required=False),
        )
        self.spec = ToolSpec(variable_of(name), f"Run the program {name!r}.", parameters, **options)
        self.result: Any = None
        self.error: BaseException | None = None
        self._load = load
        self._record_lm = record_lm

    def bind(self, parameters: Mapping[str, Value], limits: Limits) -> Mapping[str, object]:
        """See `ToolCode`."""
        return {name: values.decode_loosely(value) for name, value in parameters.items()}

    def start(self, session: ToolSession, arguments: Mapping[str, object]) -> Any:
        """See `ToolCode`."""
        if self._record_lm:
            lm_guard.caller_is_recorded.set(True)
            record_calls(session)
        try:
            program = self._load(InExecution(session), arguments.get(VERSION))
            document, self.result = answer(self.spec.name, program, arguments[INPUTS])
        except BaseException as error:
            self.error = error
            raise
        return document


def answer(tool: str, program: dspy.Module, inputs: Any) -> tuple[Any, Any]:
    """Run a program with inputs in JSON, and return the result in JSON, and as it is."""
    signatures = Signatures(program)
    result = run_program(program, signatures.inputs_of(tool, inputs))
    return signatures.result_as_json(result), result
