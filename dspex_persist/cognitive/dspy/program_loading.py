"""Loading programs: holds a saved program against a module, and changes the module as a whole or not at all."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, field
from functools import partial
from inspect import signature as signature_of
from itertools import islice
from typing import Any, Final, NamedTuple

import dspy
from dspy.adapters.decision_state import DecisionState
from dspy.signatures.signature import make_signature

from dspex_persist.cognitive.dspy.binding import bind, is_lm
from dspex_persist.cognitive.dspy.module_types import INNER, OPTION, VariableModule, retyped, variable_modules
from dspex_persist.cognitive.dspy.program_parts import FORWARD, ROOT, Parts, kind_of, settings_of, source_of, tools_of
from dspex_persist.cognitive.dspy.program_state import CONFIG, adapter_name, annotations_of, model_of, saved_signature
from dspex_persist.cognitive.dspy.program_types import Classes, class_name
from dspex_persist.cognitive.dspy.program_values import UnreadableError, decode
from dspex_persist.cognitive.dspy.snapshots import ATTRIBUTE, binding_of
from dspex_persist.cognitive.programs.documents import (
    SavedBinding,
    SavedDemo,
    SavedLm,
    SavedModule,
    SavedPredictor,
    SavedProgram,
    SavedSignature,
)
from dspex_persist.cognitive.variables import Variables
from dspex_persist.errors import DspexError
from dspex_persist.spelling import closest, did_you_mean, printable, quote, shorten
from dspex_persist.state import arguments
from dspex_persist.state.errors import InvalidArgumentError

_TOOL_NAME_FIELD: Final = "next_tool_name"
_MOST_LISTED: Final = 8
_LONGEST: Final = 120


class Choices(NamedTuple):
    """What a program may name of this process.

    Attributes:
        lms: LMs by name.
        adapters: Adapters by name.
    """

    lms: Mapping[str, Any]
    adapters: Mapping[str, Any]

    @classmethod
    def of(cls, lms: Mapping[str, Any] | None, adapters: Mapping[str, Any] | None = None) -> "Choices":
        """Return what was given; None for nothing."""
        return cls(
            _choice("lms", lms, is_lm, "an LM"),
            _choice("adapters", adapters, lambda each: isinstance(each, dspy.Adapter), "an adapter"),
        )


def _choice(field: str, given: Mapping[str, Any] | None, fits: Callable[[Any], bool], what: str) -> dict[str, Any]:
    choice = {} if given is None else arguments.mapping(field, given)
    for each in choice.values():
        if not fits(each):
            raise InvalidArgumentError(field, f"it must have {what} for each name, not {type(each).__name__}")
    return choice


@dataclass
class LoadReport:
    """What loading a program into a module does, or would do.

    Attributes:
        version: The version of the program.
        differences: What does not fit, one sentence each: with `strict`, nothing is loaded because of them, otherwise
            all the rest.
        notes: What fits, but may work differently, one sentence each.
    """

    version: int
    differences: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return not self.differences

    def __str__(self) -> str:
        lines = [f"version {self.version}: {'it fits' if self else 'it does not fit'}"]
        lines += [f"- {each}" for each in self.differences]
        lines += [f"- note: {each}" for each in self.notes]
        return "\n".join(lines)


class Loading:
    """Holds a saved program against a module. Creating it changes nothing.

    Args:
        saved: The program.
        version: Its version.
        program: The module.
        choices: LMs and adapters of this process by name.
        ctx: Whose variables set the options that variables did; None to bind nothing.

    Attributes:
        report: What does not fit.
    """

    def __init__(
        self, saved: SavedProgram, version: int, program: dspy.Module, choices: "Choices", ctx: Variables | None
    ) -> None:
        self._saved = saved
        self._lms, self._adapters = choices
        self.report = LoadReport(version)
        # Attributes to set, which cannot fail any more.
        self._changes: list[tuple[Any, str, Any]] = []
        self._retyped: dict[int, Mapping[str, Any]] = {}
        self._retype(program)
        self._parts = Parts(program, self._retyped)
        self._check_releases()
        self._check_modules()
        self._match_predictors()
        self._match_retrievers()
        if ctx is not None:
            self._match_bindings(ctx)

    def apply(self) -> None:
        """Change the module; if that fails, it is as before."""
        done: list[tuple[Any, str, Any]] = []
        try:
            for part, name, value in self._changes:
                done.append((part, name, getattr(part, name, _NONE)))
                setattr(part, name, value)
        except BaseException:
            for part, name, value in reversed(done):
                if value is _NONE:
                    vars(part).pop(name, None)
                else:
                    setattr(part, name, value)
            raise

    def _differs(self, text: str) -> None:
        self.report.differences.append(text)

    def _note(self, text: str) -> None:
        self.report.notes.append(text)

    # The whole

    def _retype(self, program: dspy.Module) -> None:
        """Have modules whose type a variable says be of the type that they had, whatever the variable has now."""
        for path, module in variable_modules(program):
            inner = INNER if path == ROOT else f"{path}.{INNER}"
            saved = self._saved.modules.get(inner) or self._saved.predictors.get(inner)
            if saved is not None:
                name = saved.kind.rpartition(".")[2]
                attributes = retyped(module, partial(_is_called, name))
                if attributes is None:
                    self._differs(
                        f"{_called(path)} was a {_brief(saved.kind)}, and no module type that is registered makes one: "
                        "register_module"
                    )
                    continue
                self._retyped[id(module)] = attributes
                self._changes.extend((module, each, value) for each, value in attributes.items())

    def _check_releases(self) -> None:
        saved, here = self._saved.dspy, dspy.__version__
        if saved != here:
            if _release(saved)[:2] > _release(here)[:2]:
                self._differs(f"DSPy {_brief(saved)} has saved it, and this is {here}: upgrade DSPy")
            else:
                self._note(
                    f"DSPy {_brief(saved)} has saved it, and this is {here}, which may word its requests otherwise"
                )
        adapter = adapter_name()
        if self._saved.adapter != adapter:
            self._note(
                f"the adapter was {_brief(self._saved.adapter)}, and is {adapter}: requests are worded otherwise, "
                "unless dspy.configure(adapter=...) says the same"
            )

    def _check_modules(self) -> None:
        for path, saved in self._saved.modules.items():
            module = self._parts.modules.get(path)
            if module is None:
                # Its predictors are reported.
                if not any(each.startswith(path) for each in self._saved.predictors):
                    self._note(
                        f"the saved program has a module {quote(path)}, a {_brief(saved.kind)}, and this one has not"
                    )
                continue
            self._check_class(path, saved, module)
            self._match_settings(path, saved, module)
            self._check_tools(path, saved, module)
        for path, module in self._parts.modules.items():
            listed = self._saved.modules.get(path)
            compiled = listed is not None and listed.compiled
            # The program itself can be compiled again, as after DSPy's own load.
            if path != ROOT and getattr(module, "_compiled", False) is not compiled:
                self._changes.append((module, "_compiled", compiled))
        for left in self._saved.left_out:
            module = self._parts.modules.get(left.path)
            if left.what == FORWARD and module is not None and FORWARD not in vars(module):
                self._differs(
                    f"{_called(left.path)} had a {FORWARD} that an optimizer had put there, such as KNNFewShot, which "
                    "is no data: compile the module first"
                )

    def _check_class(self, path: str, saved: SavedModule, module: dspy.Module) -> None:
        here = kind_of(module)
        if saved.kind.rpartition(".")[2] != here.rpartition(".")[2]:
            self._note(
                f"{_called(path)} was a {_brief(saved.kind)}, and is a {here}: what it does with its predictors may "
                "differ"
            )
        elif saved.source is not None and source_of(module) not in (None, saved.source):
            self._note(f"the source of {here} has changed since it was saved: what it does may differ")

    def _match_settings(self, path: str, saved: SavedModule, module: dspy.Module) -> None:
        here = settings_of(module)
        for name, value in saved.settings.items():
            if name not in here:
                self._differs(
                    f"{name}={value} is saved for {_called(path)}, and a {kind_of(module)} has no such setting"
                )
            elif isinstance(value, bool) or not (value is None or value >= 0) or not _is_alike(value, here[name]):
                self._differs(f"{name}={value} is saved for {_called(path)}, which makes no sense")
            elif here[name] != value:
                self._changes.append((module, name, value))

    def _check_tools(self, path: str, saved: SavedModule, module: dspy.Module) -> None:
        here = tools_of(module)
        if saved.tools is None or here is None:
            return
        gone, new = saved.tools.keys() - here.keys(), here.keys() - saved.tools.keys()
        if gone or new:
            parts = [f"it lacks {_listed(gone)}"] if gone else []
            parts += [f"{_listed(new)} came later"] if new else []
            self._differs(
                f"the tools of {_called(path)} are others, and the saved instructions name them: {', '.join(parts)}; "
                "make the module with the same tools, or optimize it again"
            )
            return
        changed = [name for name, digest in saved.tools.items() if here[name] != digest]
        if changed:
            self._note(f"the saved instructions of {_called(path)} describe tools as they were: {_listed(changed)}")

    # Predictors

    def _match_predictors(self) -> None:
        by_path = {path: path for path in self._saved.predictors}
        by_path |= {also: path for path, saved in self._saved.predictors.items() for also in saved.also}
        used: set[str] = set()
        here = self._parts.predictors
        for path, predictor in here.items():
            matches = dict.fromkeys(by_path[each] for each in (path, *self._parts.also[path]) if each in by_path)
            if not matches:
                near = did_you_mean(closest(path, set(by_path) - set(here)))
                self._differs(
                    f"the module has a predictor {quote(path)}, and the saved program has not{near and f' ({near})'}"
                )
                continue
            if len(matches) > 1:
                paths = _listed(matches)
                self._differs(f"{paths} were several predictors, and are one in the module, {quote(path)}")
            used.update(matches)
            self._match(path, predictor, self._saved.predictors[next(iter(matches))])
        for path in self._saved.predictors:
            if path not in used:
                near = did_you_mean(closest(path, set(here) - set(by_path)))
                self._differs(
                    f"the saved program has a predictor {quote(path)}, and the module has not{near and f' ({near})'}"
                )

    def _match(self, path: str, predictor: dspy.Predict, saved: SavedPredictor) -> None:
        changed = self._check_signature(path, predictor, saved.signature)
        signature = _signature(predictor.signature, saved.signature)
        demos = self._demos(path, predictor, saved, changed)
        config = self._config(path, predictor, saved)
        decisions = self._decisions(path, predictor, saved)
        lm = self._lm(path, predictor, saved.lm)
        new = {"signature": signature, "demos": demos, "config": config, "fields": decisions, "lm": lm}
        self._changes.extend((predictor, name, value) for name, value in new.items())

    def _check_signature(self, path: str, predictor: dspy.Predict, saved: SavedSignature) -> set[str]:
        """Report how the fields differ; returns the names of those whose values do not fit."""
        here = saved_signature(predictor.signature)
        were, are = ({each.name: each for each in one.fields} for one in (saved, here))
        changed: set[str] = set()
        for name, was in were.items():
            now = are.get(name)
            if now is None:
                near = did_you_mean(closest(name, are.keys() - were.keys()))
                self._differs(
                    f"{quote(path)} has lost the {was.role} field {quote(name)} ({_brief(was.type)})"
                    f"{near and f'; {near}'}"
                )
            elif now.role != was.role:
                changed.add(name)
                self._differs(f"field {quote(name)} of {quote(path)} was an {was.role}, and is an {now.role}")
            elif now.type != was.type:
                changed.add(name)
                if not (
                    name == _TOOL_NAME_FIELD and was.type.startswith("Literal[") and now.type.startswith("Literal[")
                ):
                    self._differs(
                        f"field {quote(name)} of {quote(path)} was a {_brief(was.type)}, and is a {_brief(now.type)}"
                    )
        for name, now in are.items():
            if name not in were:
                self._differs(f"{quote(path)} has a new {now.role} field {quote(name)} ({_brief(now.type)})")
        if were.keys() == are.keys() and list(were) != list(are):
            self._differs(
                f"the fields of {quote(path)} were in the order {_listed(were)}, and are in the order {_listed(are)}"
            )
        self._check_types(path, saved, here)
        return changed

    def _check_types(self, path: str, saved: SavedSignature, here: SavedSignature) -> None:
        for name, was in saved.types.items():
            now = here.types.get(name)
            if now is None or now == was:
                continue  # Without it, the type of a field is another one.
            parts = [f"{each} is gone" for each in was if each not in now]
            parts += [f"{each} is new" for each in now if each not in was]
            parts += [
                f"{each} was {_brief(was[each])}, and is {_brief(now[each])}"
                for each in was
                if now.get(each, was[each]) != was[each]
            ]
            what = ", ".join(islice(parts, _MOST_LISTED)) or "its parts are in another order"
            self._differs(f"the class {_brief(name)}, which fields of {quote(path)} have, has changed: {what}")

    def _demos(self, path: str, predictor: dspy.Predict, saved: SavedPredictor, changed: set[str]) -> list[Any]:
        classes = Classes(annotations_of(predictor.signature))
        demos = []
        for number, demo in enumerate(saved.demos):
            unfit = changed.intersection(name for name, _ in demo.values)
            if unfit:
                continue  # Reported once, with the field.
            try:
                demos.append(_demo(demo, predictor, classes))
            except UnreadableError as error:
                self._differs(f"demo {number} of {quote(path)} cannot be read: {error}")
        return demos

    def _config(self, path: str, predictor: dspy.Predict, saved: SavedPredictor) -> dict[str, Any]:
        classes = Classes(annotations_of(predictor.signature))
        # What is not saved is as the module was made with.
        config = {name: value for name, value in predictor.config.items() if name not in CONFIG}
        for name, document in saved.config.items():
            if name not in CONFIG:
                self._differs(f"{quote(path)} has the option {quote(name)} saved, which is none that is loaded")
                continue
            try:
                config[name] = decode(document, classes)
            except UnreadableError as error:
                self._differs(f"the option {quote(name)} of {quote(path)} cannot be read: {error}")
        for left in self._saved.left_out:
            if left.path != path or left.what.startswith("lm.") or left.what == FORWARD:
                continue
            if left.what in predictor.config:
                config[left.what] = predictor.config[left.what]
            elif left.why == "object":
                self._differs(
                    f"{quote(path)} had an option {quote(left.what)} that is no data: make the module with it, as "
                    "before"
                )
            else:
                self._note(f"{quote(path)} had an option {quote(left.what)}, which is not saved; the module has none")
        return config

    def _decisions(self, path: str, predictor: dspy.Predict, saved: SavedPredictor) -> dict[str, Any]:
        classes = Classes(annotations_of(predictor.signature))
        try:
            decisions = {name: decode(document, classes) for name, document in saved.decisions.items()}
            DecisionState(predictor.signature, decisions)
        except (UnreadableError, ValueError, TypeError, KeyError, AttributeError) as error:
            self._differs(f"the decisions of {quote(path)} do not fit: {error!s:.200}")
            return dict(predictor.fields)
        return decisions

    def _lm(self, path: str, predictor: dspy.Predict, saved: SavedLm | None) -> Any:
        """Return the LM: one of this process, as what is stored must not decide where requests go."""
        if saved is None:
            if predictor.lm is not None:
                self._note(
                    f"{quote(path)} had no LM of its own, and keeps that of the module, {model_of(predictor.lm)}"
                )
            return predictor.lm
        lm = self._find_lm(predictor, saved)
        if lm is None:
            name = saved.name or saved.model
            how = f"lms={{{quote(name)}: dspy.LM(...)}}"
            self._differs(
                f"{quote(path)} has an LM of its own, {_brief(saved.model)}, and none is given for it: load with {how}"
            )
            return predictor.lm
        options = getattr(lm, "kwargs", {})
        differing = [name for name, value in saved.options.items() if options.get(name) != value]
        if model_of(lm) != saved.model:
            self._note(f"the LM of {quote(path)} was {_brief(saved.model)}, and is {model_of(lm)}")
        if differing:
            self._note(f"the LM of {quote(path)} has other options than it had: {_listed(differing)}")
        return lm

    def _find_lm(self, predictor: dspy.Predict, saved: SavedLm) -> Any:
        for name in (saved.name, saved.model):
            if name is not None and name in self._lms:
                return self._lms[name]
        near = (*self._lms.values(), predictor.lm, dspy.settings.lm)
        return next((lm for lm in near if lm is not None and saved.name is None and model_of(lm) == saved.model), None)

    def _match_retrievers(self) -> None:
        here = {path: part for path, part in self._parts.parameters.items() if isinstance(part, dspy.Retrieve)}
        for path, k in self._saved.retrievers.items():
            if path not in here:
                self._differs(f"the saved program has a retriever {quote(path)}, and the module has not")
            elif here[path].k != k:
                self._changes.append((here[path], "k", k))
        for path in here.keys() - self._saved.retrievers.keys():
            self._differs(f"the module has a retriever {quote(path)}, and the saved program has not")

    # Bindings

    def _match_bindings(self, ctx: Variables) -> None:
        for saved in self._saved.bindings:
            module = self._parts.modules.get(saved.path)
            if module is None:
                continue  # Reported with the predictors.
            before = binding_of(module)
            if before is not None and not (
                isinstance(module, VariableModule) and before.names == (before.options.get(OPTION),)
            ):
                self._note(f"{_called(saved.path)} is bound to variables already, and stays so")
                continue
            try:
                self._changes.append((module, ATTRIBUTE, self._bound(saved, module, ctx)))
            except (DspexError, TypeError, UnreadableError) as error:
                self._differs(
                    f"variables set options of {_called(saved.path)}, which cannot be bound again: {error!s:.300} "
                    "(bindings=False loads it without)"
                )

    def _bound(self, saved: SavedBinding, module: dspy.Module, ctx: Variables) -> Any:
        names = {option for options in (saved.options, *saved.per.values()) for option in options}
        if names & _ARGUMENTS.keys():
            raise UnreadableError(f"{_listed(names & _ARGUMENTS.keys())} is no option")
        arguments: dict[str, Any] = dict(saved.options)
        for argument, chosen, given in (("lms", saved.lms, self._lms), ("adapters", saved.adapters, self._adapters)):
            missing = [name for name in chosen if name not in given]
            if missing:
                raise UnreadableError(f"{argument} has no {_listed(missing)}")
            if chosen:
                arguments[argument] = {name: given[name] for name in chosen}
        # `bind` checks all, and binds a copy, as the module has to stay as it is.
        trial = copy(module)
        vars(trial).update(self._retyped.get(id(module), {}))
        precedence = "default" if saved.is_default else "variable"
        bind(trial, ctx, per=saved.per or None, precedence=precedence, live=saved.live, **arguments)
        return binding_of(trial)


_NONE: Final = object()
_ARGUMENTS: Final = signature_of(bind).parameters


def _demo(saved: SavedDemo, predictor: dspy.Predict, classes: Classes) -> Any:
    values = {}
    for name, document in saved.values:
        known = predictor.signature.fields.get(name)
        try:
            values[name] = decode(document, classes, None if known is None else known.annotation)
        except UnreadableError as error:
            raise UnreadableError(f"its field {quote(name)}: {error}") from None
    if saved.kind == "dict":
        return values
    demo = dspy.Example(values)
    return demo if saved.inputs is None else demo.with_inputs(*saved.inputs)


def _signature(signature: Any, saved: SavedSignature) -> Any:
    """Return the module's signature with the instructions, prefixes and descriptions that were saved, by field name."""
    were = {each.name: each for each in saved.fields}
    extras: dict[str, dict[str, str]] = {
        name: {"prefix": were[name].prefix, "desc": were[name].desc}
        for name, each in signature.fields.items()
        if name in were
        and (each.json_schema_extra["prefix"], each.json_schema_extra["desc"]) != (were[name].prefix, were[name].desc)
    }
    if signature.instructions == saved.instructions and not extras:
        return signature
    fields = {}
    for name, each in signature.fields.items():
        own = deepcopy(each)
        own.json_schema_extra = {**own.json_schema_extra, **extras.get(name, {})}
        fields[name] = (own.annotation, own)
    return make_signature(fields, saved.instructions, signature.__name__)


def _is_called(name: str, kind: type) -> bool:
    return class_name(kind).rpartition(".")[2] == name


def _called(path: str) -> str:
    return "the program" if path == ROOT else quote(path)


def _listed(names: Any) -> str:
    listed: Sequence[str] = list(names) if isinstance(names, dict | list) else sorted(names)
    more = len(listed) - _MOST_LISTED
    shown = ", ".join(_brief(each) for each in listed[:_MOST_LISTED])
    return f"{shown} and {more} more" if more > 0 else shown


def _brief(text: str) -> str:
    """Return a text of the store on one line, shortened."""
    return printable(shorten(text, _LONGEST))


def _is_alike(value: float | None, other: float | None) -> bool:
    """Whether a setting is a whole number where the module has one."""
    return not isinstance(other, int) or not isinstance(value, float)


def _release(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.split(".")[:3]:
        digits = "".join(islice(_digits(part), 9))
        parts.append(int(digits or 0))
    return tuple(parts)


def _digits(text: str) -> Iterator[str]:
    for each in text:
        if not "0" <= each <= "9":
            return
        yield each
