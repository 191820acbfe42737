"""`ctx.programs`: DSPy programs as versioned state of a session."""

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import dspy

from dspex_persist.cognitive.dspy.program_calls import (
    CONTEXT,
    INPUTS,
    VERSION,
    ProgramCode,
    Signatures,
    run_program,
    takes_context,
)
from dspex_persist.cognitive.dspy.program_loading import Choices, Loading, LoadReport
from dspex_persist.cognitive.dspy.program_state import Saving
from dspex_persist.cognitive.joining import InExecution, joined, surroundings
from dspex_persist.cognitive.programs.catalog import At, Catalog, checked_tag
from dspex_persist.cognitive.programs.documents import SavedProgram, size_of, variable_of
from dspex_persist.cognitive.programs.errors import ProgramError, ProgramMismatchError, ProgramNotSavedError
from dspex_persist.cognitive.records import result_of
from dspex_persist.cognitive.steps import Steps, Terms, verb, work
from dspex_persist.cognitive.variables import Variables
from dspex_persist.infra.logs import get_logger
from dspex_persist.state import arguments, values
from dspex_persist.state.commands import ExecuteTool
from dspex_persist.state.errors import (
    InvalidArgumentError,
    LimitExceededError,
    VariableNotFoundError,
    VersionConflictError,
)
from dspex_persist.state.model import Isolation
from dspex_persist.state.provider import TOOL_TIMEOUT_S

_logger = get_logger(__name__)

_LARGEST_PARTS: Final = 3
_ATTEMPTS: Final = 100
Into: TypeAlias = Any
"""A module, or what makes one: its class, or a function, which may take `ctx`."""


class Programs(Catalog):
    """The DSPy programs of a session: each is a variable, so it has versions, who and why, and forks and moves along.

    Each verb can be called, or awaited by its `aio`: `ctx.programs.save("qa", module)`,
    `await ctx.programs.save.aio("qa", module)`.

    A program is stored as JSON: instructions, demos with the types of their values, configuration and settings, those
    of frozen modules included; never code, keys, or addresses. It is loaded into a module that you make.
    """

    _owner: Variables

    @verb
    def save(
        self,
        name: str,
        module: dspy.Module,
        *,
        tag: str | None = None,
        lms: Mapping[str, Any] | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> Steps[int]:
        """Save a program as a new version.

        Args:
            name: The name of the program: 1 to 200 printable characters.
            module: The program.
            tag: A tag to put on the version, such as "production".
            lms: Names for LMs that predictors have of their own, under which `load` is to find them. An LM without a
                name is found by its model.
            reason: Why it is saved. The history keeps it.
            actor: Who saves it; by default the actor of the context.

        Returns:
            The number of the version.

        Raises:
            ProgramNotSavedError: Something in it cannot be stored as data, or it is larger than a variable may be.
        """
        variable = variable_of(name)
        if not isinstance(module, dspy.Module):
            raise InvalidArgumentError("module", f"it must be a dspy.Module, not a {type(module).__name__}")
        if tag is not None:
            checked_tag(tag)
        saved: SavedProgram = yield from work(_saved, name, module, Choices.of(lms).lms)
        terms = None if actor is None and reason is None else Terms(actor, reason)
        try:
            version = yield from self._write_newest(name, variable, saved.document(), terms)
        except LimitExceededError as error:
            raise ProgramNotSavedError(name, f"{error.sentence}{_how_to_shrink(saved)}") from error
        if tag is not None:
            yield from self.tag._steps(name, tag, version, reason=reason, actor=actor)
        return version

    def _write_newest(self, name: str, variable: str, document: object, terms: Terms | None) -> Steps[int]:
        for attempt in range(_ATTEMPTS + 1):
            try:
                current = yield from self._current_or_none(name)
                return (yield from self._write(variable, document, current, terms))
            except (VersionConflictError, VariableNotFoundError):
                # Another client saved it, or deleted it, in the meantime.
                if attempt == _ATTEMPTS:
                    raise
        raise AssertionError

    def register(self, name: str, into: Into) -> None:
        """Say which module a program is loaded into, in this process, where `into` is left out.

        Args:
            name: The name of the program.
            into: The class of the module, or a function that makes one; see `load`.
        """
        variable_of(name)
        if isinstance(into, dspy.Module) or not callable(into):
            reason = f"it must be a class, or a function that makes a module, not a {type(into).__name__}"
            raise InvalidArgumentError("into", reason)
        _registered[name] = into

    @verb
    def load(
        self,
        name: str,
        into: Into = None,
        version: At = None,
        *,
        strict: bool = True,
        lms: Mapping[str, Any] | None = None,
        adapters: Mapping[str, Any] | None = None,
        bindings: bool = True,
    ) -> Steps[Any]:
        """Load a program into a module.

        Predictors and their fields are found by name. If anything fails, the module is unchanged.

        Args:
            name: The name of the program.
            into: A module like the saved one; or its class, or a function, which makes one. A parameter `ctx` receives
                this context. By default what was registered for the name.
            version: The number of the version, or a tag; None for the newest.
            strict: Whether everything has to fit. Otherwise what fits is loaded, and a warning is logged for each
                thing that does not.
            lms: LMs by the names with which the program was saved, or by their models. What is stored never says where
                requests go, so an LM that a predictor has of its own has to be given here, unless the module, or
                `dspy.configure`, has one of its model.
            adapters: Adapters by name, if a variable chooses among some.
            bindings: Whether variables set the options that they did when it was saved (`dspex_persist.dspy.bind`),
                those of this session. A module that is bound already stays so.

        Returns:
            The module.

        Raises:
            ProgramNotFoundError: There is no such program, version or tag.
            ProgramMismatchError: It does not fit the module; the error says why.
            DamagedProgramError: It is no program that this release can read.
        """
        arguments.flag("strict", strict)
        module = yield from self._module(name, into)
        loading = yield from self._loading(name, module, version, Choices.of(lms, adapters), bindings)
        report = loading.report
        if strict and report.differences:
            raise ProgramMismatchError(name, report.version, tuple(report.differences))
        loading.apply()
        for text in (*report.differences, *report.notes):
            _logger.warning(f"loaded, but: {text}", program=name, version=report.version)
        return module

    @verb
    def check(
        self,
        name: str,
        into: Into = None,
        version: At = None,
        *,
        lms: Mapping[str, Any] | None = None,
        adapters: Mapping[str, Any] | None = None,
        bindings: bool = True,
    ) -> Steps[LoadReport]:
        """Say what loading a program into a module would do, without changing it.

        Args:
            name: The name of the program.
            into: See `load`.
            version: See `load`.
            lms: See `load`.
            adapters: See `load`.
            bindings: See `load`.

        Returns:
            What does not fit, and what may work differently. True if all fits.

        Raises:
            ProgramNotFoundError: There is no such program, version or tag.
            DamagedProgramError: It is no program that this release can read.
        """
        module = yield from self._module(name, into)
        return (yield from self._loading(name, module, version, Choices.of(lms, adapters), bindings)).report

    def _loading(self, name: str, module: dspy.Module, version: At, choices: Choices, bindings: bool) -> Steps[Loading]:
        arguments.flag("bindings", bindings)
        number, value = yield from self._find(name, version)
        saved = self._read(name, number, value)
        return (yield from work(Loading, saved, number, module, choices, self._owner if bindings else None))

    def _module(self, name: str, into: Into) -> Steps[Any]:
        if into is None:
            into = _registered.get(name)
            if into is None:
                reason = f"say which module: its class, or once ctx.programs.register({name!r}, ...)"
                raise InvalidArgumentError("into", reason)
        return (yield from work(_made, into, self._owner))

    # Calls

    @verb
    def call(self, name: str, into: Into = None, /, **inputs: Any) -> Steps[Any]:
        """Run a program as one transaction: `execute`, without options.

        Args:
            name: The name of the program.
            into: See `load`. A module is copied.
            inputs: The inputs of the program by name.

        Returns:
            What the program returns, mostly a `dspy.Prediction`.

        Raises:
            ProgramNotFoundError: There is no such program.
            ToolFailedError: The program failed, or does not fit the module. Nothing was written.
        """
        return (yield from self.execute._steps(name, inputs, into=into))

    @verb
    def execute(
        self,
        name: str,
        inputs: Mapping[str, Any],
        *,
        into: Into = None,
        version: At = None,
        lms: Mapping[str, Any] | None = None,
        adapters: Mapping[str, Any] | None = None,
        record_lm: bool | None = None,
        isolation: Isolation | str = Isolation.SNAPSHOT,
        retries: int = 0,
        timeout_s: float = TOOL_TIMEOUT_S,
        metadata: Mapping[str, str] | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> Steps[Any]:
        """Run a program as a tool, in a transaction: the journal has it as one execution of the tool `programs/NAME`.

        Its version is chosen, and variables are read, as of one moment. What it writes takes effect when it returns. In
        a tool, and in a transaction, it is part of that, and not an execution of its own.

        Args:
            name: The name of the program.
            inputs: The inputs of the program by name.
            into: See `load`. A module is copied.
            version: See `load`.
            lms: See `load`.
            adapters: See `load`.
            record_lm: Whether the journal has its LM calls; None for what the context says.
            isolation: What others must not change meanwhile: what it writes ("snapshot"), or also what it reads
                ("serializable").
            retries: How often to run it again after a conflict.
            timeout_s: How long to wait, in seconds.
            metadata: Texts to record with the execution.
            reason: Why. The journal keeps it.
            actor: Who asks for it; by default the actor of the context.

        Returns:
            What the program returns, mostly a `dspy.Prediction`.

        Raises:
            ProgramNotFoundError: There is no such program.
            ToolFailedError: The program failed, or does not fit the module. Nothing was written.
            UnsupportedError: The backend executes no tools.
        """
        given = arguments.mapping("inputs", inputs)
        own = into.deepcopy() if isinstance(into, dspy.Module) else into
        here = joined(self._owner, surroundings())
        execute = getattr(here, "_execute_code", None)
        if execute is None:
            programs = Programs(here, self._session_id)
            program = yield from programs.load._steps(name, own, version, lms=lms, adapters=adapters)
            return (yield from work(run_program, program, given))
        yield from self._current(name)
        # Its signatures say which classes its inputs may have.
        first = yield from self._module(name, own)
        parameters: dict[str, Any] = {INPUTS: Signatures(first).inputs_as_json(given)}
        if version is not None:
            parameters[VERSION] = version
        modules = iter((first,))

        def load(ctx: InExecution, at: At) -> Any:
            module = next(modules, None) if not takes_context(own) else None
            again = own.deepcopy() if isinstance(own, dspy.Module) else own
            return Programs(ctx, ctx.session_id).load(name, module or again, at, lms=lms, adapters=adapters)

        records = getattr(here, "_record_lm", False) if record_lm is None else record_lm
        options = {"isolation": arguments.member("isolation", isolation, Isolation), "retries": retries}
        code = ProgramCode(name, load, bool(records), **options)
        timeout_s = arguments.timeout("timeout_s", timeout_s)
        command = ExecuteTool(
            self._session_id, code.spec.name, values.encode_arguments(parameters), metadata or {}, timeout_s
        )
        outcome = yield from work(execute, code, command, Terms(actor, reason))
        if isinstance(code.error, ProgramError):
            raise code.error
        result = result_of(outcome)
        return code.result if code.result is not None else Signatures(first).prediction_of(result)


_registered: Final[dict[str, Any]] = {}
"""Which modules programs are loaded into, by name, in this process."""


def _saved(name: str, module: dspy.Module, lms: Mapping[str, Any]) -> SavedProgram:
    saved = Saving(name, module, lms).saved()
    # What is saved has to load again, into this module at least.
    differences = Loading(saved, 0, module, Choices.of(lms), None).report.differences
    if differences:
        raise ProgramNotSavedError(name, f"it would not load again: {'; '.join(differences)}")
    for left in saved.left_out:
        _logger.warning(
            "not saved: it may be secret" if left.why == "secret" else "not saved",
            program=name,
            predictor=left.path,
            option=left.what,
        )
    return saved


def _made(into: Any, ctx: Any) -> Any:
    if isinstance(into, dspy.Module):
        return into
    if not callable(into):
        reason = f"it must be a module, its class, or a function that makes one, not a {type(into).__name__}"
        raise InvalidArgumentError("into", reason)
    module = into(**{CONTEXT: ctx}) if takes_context(into) else into()
    if not isinstance(module, dspy.Module):
        raise InvalidArgumentError("into", f"it made a {type(module).__name__}, not a dspy.Module")
    return module


def _how_to_shrink(saved: SavedProgram) -> str:
    sizes = {
        f"{len(each.demos)} demos of {path!r}": size_of([demo.model_dump(mode="json") for demo in each.demos])
        for path, each in saved.predictors.items()
        if each.demos
    }
    largest = sorted(sizes, key=lambda what: sizes[what], reverse=True)[:_LARGEST_PARTS]
    parts = ", ".join(f"{what} ({sizes[what]:,} bytes)" for what in largest)
    return f"; its largest parts are {parts}: keep fewer, or raise the limit" if parts else ""
