"""Programs as data: what is saved of a module."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import dspy

from dspex_persist.cognitive.dspy.program_parts import FORWARD, ROOT, Parts, kind_of, settings_of, source_of, tools_of
from dspex_persist.cognitive.dspy.program_types import Classes, described_types, type_text
from dspex_persist.cognitive.dspy.program_values import UnstorableError, encode
from dspex_persist.cognitive.dspy.requests import OPTIONS
from dspex_persist.cognitive.dspy.snapshots import binding_of
from dspex_persist.cognitive.programs.documents import (
    LeftOut,
    SavedBinding,
    SavedDemo,
    SavedField,
    SavedLm,
    SavedModule,
    SavedPredictor,
    SavedProgram,
    SavedSignature,
)
from dspex_persist.cognitive.programs.errors import ProgramNotSavedError

CONFIG: Final = OPTIONS | {"cache"}
"""The options of a predictor's configuration that are saved. All others may be secret."""
_TOOL_FIELDS: Final = frozenset(
    ("type", "function", "name", "description", "parameters", "input_schema", "strict", "config")
)
_KNOWN_SECRETS: Final = re.compile(
    r"key|token|secret|passw|auth|header|cookie|credential|base|url|endpoint|host|proxy", re.I
)
_ADDRESS: Final = re.compile(r"[a-z][a-z0-9+.-]*://\S+", re.I)


def annotations_of(signature: Any) -> list[Any]:
    """Return the types of a signature's fields."""
    return [each for field in signature.fields.values() for each in (field.annotation, *field.metadata)]


def role_of(field: Any) -> str:
    """Return whether a field is an input or an output."""
    return str(field.json_schema_extra["__dspy_field_type"])


def adapter_name() -> str:
    """Return the class of the adapter that is configured; DSPy's default without one."""
    adapter = dspy.settings.adapter
    return "dspy.ChatAdapter" if adapter is None else kind_of(adapter)


def saved_signature(signature: Any) -> SavedSignature:
    """Return what is saved of a signature, which is also what it is recognized by."""
    fields = tuple(
        SavedField(
            name=name,
            role="input" if role_of(field) == "input" else "output",
            type=type_text(field.annotation),
            prefix=str(field.json_schema_extra["prefix"]),
            desc=str(field.json_schema_extra["desc"]),
        )
        for name, field in signature.fields.items()
    )
    return SavedSignature(
        instructions=signature.instructions, fields=fields, types=described_types(annotations_of(signature))
    )


class Saving:
    """Makes data of a module.

    Args:
        name: The name of the program, for errors.
        program: The module.
        lms: LMs of this process by the names by which they are saved.
    """

    def __init__(self, name: str, program: dspy.Module, lms: Mapping[str, Any]) -> None:
        self._name = name
        self._parts = Parts(program)
        self._lms = lms
        self._left_out: list[LeftOut] = []

    def saved(self) -> SavedProgram:
        """Return the program as data.

        Raises:
            ProgramNotSavedError: Something cannot be stored.
        """
        predictors, retrievers = {}, {}
        for path, part in self._parts.parameters.items():
            if isinstance(part, dspy.Predict):
                predictors[path] = self._predictor(path, part)
            elif isinstance(part, dspy.Retrieve):
                retrievers[path] = int(part.k)
            else:
                self._refuse(path, part)
        for path, module in self._parts.modules.items():
            if FORWARD in vars(module):
                self._leave_out(path, FORWARD, "object")
        return SavedProgram(
            dspy=dspy.__version__,
            adapter=adapter_name(),
            modules={path: _module(each) for path, each in self._parts.modules.items() if _is_kept(path, each)},
            predictors=predictors,
            retrievers=retrievers,
            bindings=tuple(_bindings(self._parts.modules)),
            left_out=tuple(self._left_out),
        )

    def _refuse(self, path: str, part: object) -> None:
        what = kind_of(part)
        reason = (
            f"its state is code, and what is stored is never run ({path!r} is a {what})"
            if what == "dspy.Flex"
            else f"nothing is known about the parameter {path!r}, a {what}: take it out of the module, or keep its "
            "state in variables of its own"
        )
        raise ProgramNotSavedError(self._name, reason)

    def _predictor(self, path: str, predictor: dspy.Predict) -> SavedPredictor:
        classes = Classes(annotations_of(predictor.signature))
        return SavedPredictor(
            kind=kind_of(predictor),
            signature=saved_signature(predictor.signature),
            demos=tuple(
                self._demo(path, number, each, predictor, classes) for number, each in enumerate(predictor.demos)
            ),
            config=self._config(path, predictor.config, classes),
            decisions=self._decisions(path, predictor, classes),
            lm=None if predictor.lm is None else self._lm(path, predictor.lm, classes),
            frozen=path in self._parts.frozen,
            also=tuple(self._parts.also[path]),
        )

    def _demo(self, path: str, number: int, demo: Any, predictor: dspy.Predict, classes: Classes) -> SavedDemo:
        is_example = isinstance(demo, dspy.Example)
        if not is_example and not isinstance(demo, Mapping):
            reason = f"demo {number} of {path!r} is a {type(demo).__name__}, not a dspy.Example or a dict"
            raise ProgramNotSavedError(self._name, reason)
        values = []
        for field, value in demo.items(include_dspy=True) if is_example else demo.items():
            known = predictor.signature.fields.get(field)
            try:
                values.append((str(field), encode(value, classes, None if known is None else known.annotation)))
            except UnstorableError as error:
                reason = f"field {field!r} of demo {number} of {path!r} is {error}"
                raise ProgramNotSavedError(self._name, reason) from error
        inputs = getattr(demo, "_input_keys", None) if is_example else None
        return SavedDemo(
            kind="example" if is_example else "dict",
            values=tuple(values),
            inputs=None if inputs is None else tuple(sorted(map(str, inputs))),
        )

    def _config(self, path: str, config: Mapping[str, Any], classes: Classes) -> dict[str, Any]:
        kept = {}
        for option, value in config.items():
            if option not in CONFIG:
                self._leave_out(path, option, "secret" if _KNOWN_SECRETS.search(option) else "unknown")
                continue
            if option == "tools" and isinstance(value, list):
                value = self._allowed_tools(path, value)
            try:
                kept[option] = encode(value, classes)
            except UnstorableError:
                self._leave_out(path, option, "object")
        return kept

    def _allowed_tools(self, path: str, tools: list[Any]) -> list[Any]:
        """Return the tools of a request without what may be secret, such as the headers for a tool's server."""
        allowed = []
        for each in tools:
            if isinstance(each, dict) and not each.keys() <= _TOOL_FIELDS:
                self._leave_out(path, "tools", "secret")
                each = {name: item for name, item in each.items() if name in _TOOL_FIELDS}
            allowed.append(each)
        return allowed

    def _decisions(self, path: str, predictor: dspy.Predict, classes: Classes) -> dict[str, Any]:
        try:
            return {str(field): encode(each, classes) for field, each in predictor.fields.items()}
        except UnstorableError as error:
            raise ProgramNotSavedError(self._name, f"the decisions of {path!r} have {error}") from error

    def _lm(self, path: str, lm: Any, classes: Classes) -> SavedLm:
        options = {}
        for option, value in getattr(lm, "kwargs", {}).items():
            if option in OPTIONS and value is not None:
                try:
                    options[option] = encode(value, classes)
                except UnstorableError:
                    self._leave_out(path, f"lm.{option}", "object")
        name = next((name for name, each in self._lms.items() if each is lm), None)
        return SavedLm(name=name, model=model_of(lm), options=options)

    def _leave_out(self, path: str, what: str, why: Any) -> None:
        entry = LeftOut(path=path, what=what, why=why)
        if entry not in self._left_out:
            self._left_out.append(entry)


def _bindings(modules: Mapping[str, Any]) -> Iterator[SavedBinding]:
    for path, module in modules.items():
        binding = binding_of(module)
        if binding is not None:
            yield SavedBinding(
                path=path,
                options=dict(binding.options),
                per={each: dict(options) for each, options in binding.per.items()},
                is_default=binding.is_default,
                live=binding.live,
                lms=tuple(binding.lms),
                adapters=tuple(binding.adapters),
            )


def model_of(lm: Any) -> str:
    """Return the model of an LM; without an address, which may have a password in it."""
    return _ADDRESS.sub("<address>", str(getattr(lm, "model", type(lm).__name__)))


def _module(module: dspy.Module) -> SavedModule:
    return SavedModule(
        kind=kind_of(module),
        source=source_of(module),
        compiled=getattr(module, "_compiled", False) is True,
        settings=settings_of(module),
        tools=tools_of(module),
    )


def _is_kept(path: str, module: dspy.Module) -> bool:
    """Whether a module is listed: predictors are listed elsewhere, unless one is the program or frozen."""
    return path == ROOT or not isinstance(module, dspy.Predict) or getattr(module, "_compiled", False) is True
