"""What a program keeps when the type of a module changes: the state of predictors whose names match."""

from collections.abc import Iterable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

from dspy import Predict
from dspy.signatures.signature import make_signature

from dspex_persist.cognitive.dspy.paths import predictors_in
from dspex_persist.spelling import quote


@dataclass(frozen=True, slots=True)
class TypeChange:
    """What became of the state of a module's predictors when the module's type changed.

    True if nothing was left behind.

    Attributes:
        variable: The variable that says the type.
        before: The type before.
        after: The type from then on.
        carried: What was carried over, one sentence for each predictor.
        left: What was not, because no predictor has a matching name, one sentence each. The type before has it still.
        notes: What may work differently, one sentence each.
    """

    variable: str
    before: str
    after: str
    carried: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return not self.left

    def __str__(self) -> str:
        lines = [f"the module type has changed from {quote(self.before)} to {quote(self.after)} ({self.variable})"]
        lines += [f"- {each}" for each in self.carried]
        lines += [f"- not carried over: {each}" for each in self.left]
        lines += [f"- note: {each}" for each in self.notes]
        return "\n".join(lines)


class PredictorState(NamedTuple):
    """What an optimizer, or a program, changes in a predictor."""

    signature: Any
    demos: tuple[Any, ...]
    config: Mapping[str, Any]
    lm: Any
    decisions: Mapping[str, Any]

    @classmethod
    def of(cls, predict: Any) -> "PredictorState":
        """Return the state of a predictor."""
        return cls(
            predict.signature, tuple(predict.demos), dict(predict.config), predict.lm, deepcopy(dict(predict.fields))
        )

    def changes_from(self, other: "PredictorState | None") -> list[str]:
        """Return in words what differs from another state."""
        if other is None:
            return ["all"]
        parts = []
        if self.signature.instructions != other.signature.instructions:
            parts.append("instructions")
        if list(_retold(other.signature, self.signature, other.signature)):
            parts.append("descriptions of fields")
        if _differ(self.demos, other.demos):
            parts.append(f"{len(self.demos)} demo{'' if len(self.demos) == 1 else 's'}")
        if _differ(self.config, other.config):
            parts.append("configuration")
        if self.lm is not other.lm:
            parts.append("LM")
        if _differ(self.decisions, other.decisions):
            parts.append("decisions")
        return parts


State = dict[str, PredictorState]
"""The states of predictors by path."""


def state_of(module: Any) -> State:
    """Return the state of a module."""
    return {path: PredictorState.of(each) for path, each in predictors_in(module)}


def changed_in(state: State, before: State) -> list[str]:
    """Return the paths of the predictors whose state is another one than before."""
    return [path for path, each in state.items() if each.changes_from(before.get(path))]


class Carried(NamedTuple):
    """What `carry` did, in sentences; see `TypeChange`."""

    carried: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def carry(state: State, plain: State, paths: Iterable[str], module: Any) -> Carried:
    """Give the predictors of a module the state of those of another module.

    Predictors match by path; and if each module has only one, that one matches, whatever it is called.

    Args:
        state: The state.
        plain: The state of such a module when it is new: what is as there is not carried over, since a module of
            another type begins with other instructions.
        paths: The paths of those predictors in `state` whose state is to be carried over.
        module: The module that gets it.
    """
    here: dict[str, Any] = dict(predictors_in(module))
    lms = {id(each.lm): each.lm for each in state.values()}
    shared = next(iter(lms.values())) if len(lms) == 1 else None
    only = next(iter(here)) if len(here) == len(state) == 1 else None
    carried, left, notes = [], [], []
    for path in paths:
        source, new = state[path], plain.get(path)
        words = source.changes_from(new)
        match = path if path in here else only
        if match is None:
            words = [each for each in words if shared is None or each != "LM"]
            if words:
                left.append(f"{', '.join(words)} of {quote(path)}: there is no such predictor, only {_listed(here)}")
            continue
        predict: Predict = here[match]
        _give(predict, source, new)
        if words:
            where = "" if match == path else f", which is {quote(match)} now"
            carried.append(f"{', '.join(words)} of {quote(path)}{where}")
        lacking = [name for name in predict.signature.fields if any(name not in demo for demo in source.demos)]
        if lacking:
            notes.append(f"demos of {quote(match)} have no {', '.join(map(quote, lacking))}")
    if shared is not None:
        # As by `set_lm`.
        for predict in here.values():
            predict.lm = predict.lm or shared
    return Carried(tuple(carried), tuple(left), tuple(notes))


def _give(predict: Any, source: PredictorState, new: PredictorState | None) -> None:
    predict.signature = _signature(predict.signature, source.signature, None if new is None else new.signature)
    predict.demos = list(source.demos)
    predict.config = dict(source.config)
    predict.lm = source.lm
    if source.decisions.keys() <= predict.signature.output_fields.keys():
        predict.fields = deepcopy(dict(source.decisions))


def _signature(own: Any, source: Any, new: Any) -> Any:
    """Return a signature with what another one says differently from what it said when it was new."""
    if new is not None and source.instructions == new.instructions:
        instructions = own.instructions
    else:
        instructions = source.instructions
    extras = dict(_retold(own, source, new))
    if not extras:
        return own if instructions == own.instructions else own.with_instructions(instructions)
    fields = {}
    for name, each in own.fields.items():
        field = deepcopy(each)
        field.json_schema_extra = {**field.json_schema_extra, **extras.get(name, {})}
        fields[name] = (field.annotation, field)
    return make_signature(fields, instructions, own.__name__)


def _retold(own: Any, source: Any, new: Any) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the fields that another signature describes differently from what it did when it was new."""
    for name in own.fields:
        if name in source.fields:
            said = _described(source.fields[name])
            was = _described(new.fields[name]) if new is not None and name in new.fields else None
            if said not in (was, _described(own.fields[name])):
                yield name, said


def _differ(one: Any, other: Any) -> bool:
    try:
        return bool(one != other)
    except Exception:  # noqa: BLE001 -- values may be anything, such as arrays, whose comparison has no truth value
        return True


def _described(field: Any) -> dict[str, str]:
    return {each: str(field.json_schema_extra[each]) for each in ("prefix", "desc")}


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(quote, names)) or "none"
