"""Configuration spaces: the variables that a study sets, and what it may set them to."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Self, TypeAlias

from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
    json_to_distribution,
)

from dspex_persist.cognitive.describing import is_sensitive
from dspex_persist.cognitive.records import VariableInfo
from dspex_persist.cognitive.variables import Variables
from dspex_persist.spelling import quote
from dspex_persist.state import arguments, values
from dspex_persist.state.errors import InvalidArgumentError, StateError

Choices: TypeAlias = BaseDistribution | Mapping[str, Any] | Sequence[Any] | None
"""What a variable may be set to: a distribution of Optuna; changes to the range of its constraints, such as `{"log":
True}`; a list of values; or None for what its type and constraints say."""

SCALE: Final = "scale"
"""The key of a variable's metadata whose entry "log" means that a study looks for its values on a logarithmic scale."""
_LISTS: Final = ("choices", "enum", "allowed_modules")
"""The constraints that list the possible values."""
_RANGE: Final = frozenset(("low", "high", "step", "log"))
_SCALARS: Final = (bool, int, float, str, type(None))


class ConfigurationSpace(Mapping[str, BaseDistribution]):
    """The variables that a study sets, each with the distribution that its values come from.

    Args:
        distributions: The distributions of Optuna by the names of the variables.
    """

    def __init__(self, distributions: Mapping[str, BaseDistribution]) -> None:
        self._distributions = dict(distributions)

    @classmethod
    def of(cls, ctx: Variables, variables: Sequence[str] | Mapping[str, Choices]) -> Self:
        """Return the space of variables of a session.

        Numbers need a range, from their constraints `min` and `max` or from here. Metadata `{"scale": "log"}` has
        their values looked for on a logarithmic scale. Texts need a list: `choices` or `enum`. Booleans need nothing.

        Args:
            ctx: A context of the session.
            variables: The names of the variables; or by their names, what they may be set to, if that is not all that
                their types and constraints allow: a distribution of Optuna, changes to their range such as `{"log":
                True, "high": 0.5}` (low, high, step, log), or a list of values.

        Raises:
            VariableNotFoundError: There is no such variable.
            InvalidArgumentError: A variable has no range or list, or cannot be set to what is stated.
        """
        if isinstance(variables, str):
            raise InvalidArgumentError("variables", f"it must be a list of names, such as [{variables!r}]")
        given: Mapping[str, Choices]
        given = variables if isinstance(variables, Mapping) else dict.fromkeys(arguments.texts("variables", variables))
        if not given:
            raise InvalidArgumentError("variables", "it names no variable")
        return cls({name: _distribution_of(ctx.info(name), stated) for name, stated in given.items()})

    def check(self, ctx: Variables) -> None:
        """Check that the variables, as they are now, can have all values of the space.

        Raises:
            VariableNotFoundError: There is no such variable.
            InvalidArgumentError: A variable cannot be set to some of the values.
        """
        for name, distribution in self._distributions.items():
            _check(ctx.info(name), distribution)

    @classmethod
    def from_json(cls, document: Mapping[str, str]) -> Self:
        """Return the space that `to_json` described."""
        return cls({name: json_to_distribution(text) for name, text in document.items()})

    def to_json(self) -> dict[str, str]:
        """Return the distributions as Optuna writes them, by name."""
        return {name: distribution_to_json(each) for name, each in self._distributions.items()}

    @property
    def digest(self) -> str:
        """What tells it from other spaces, in hexadecimal."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def contains(self, name: str, value: Any) -> bool:
        """Whether a variable can be set to a value."""
        distribution = self._distributions.get(name)
        return distribution is not None and contains(distribution, value)

    def __getitem__(self, name: str) -> BaseDistribution:
        return self._distributions[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._distributions)

    def __len__(self) -> int:
        return len(self._distributions)

    def __repr__(self) -> str:
        return f"<ConfigurationSpace {', '.join(f'{name}: {each}' for name, each in self._distributions.items())}>"


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Whether a distribution has a value."""
    if isinstance(distribution, CategoricalDistribution):
        # 1 is no True here.
        return any(each == value and type(each) is type(value) for each in distribution.choices)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return bool(distribution._contains(distribution.to_internal_repr(value)))


def _distribution_of(info: VariableInfo, stated: Choices) -> BaseDistribution:
    if is_sensitive(info):
        raise _refused(info, "is sensitive, and the journal would show the values that are tried")
    if isinstance(stated, BaseDistribution):
        distribution = stated
    elif stated is None or isinstance(stated, Mapping):
        distribution = _from_constraints(info, {} if stated is None else stated)
    else:
        distribution = _one_of(info, stated)
    _check(info, distribution)
    return distribution


def _from_constraints(info: VariableInfo, stated: Mapping[str, Any]) -> BaseDistribution:
    value_type = values.get_type(info.name, info.type)
    if value_type.is_number:
        return _range(info, stated, is_whole=int in value_type.infer)
    if stated:
        raise _refused(info, f"is no number, and has no {', '.join(stated)}: give a list of values")
    if bool in value_type.infer:
        return CategoricalDistribution([False, True])
    lists = [info.constraints[key] for key in _LISTS if info.constraints.get(key)]
    if not lists:
        raise _refused(info, "can have any value: give a list, variables={...: [...]}")
    return _one_of(info, [each for each in lists[0] if _fault(info, each) is None])


def _one_of(info: VariableInfo, choices: object) -> BaseDistribution:
    if not isinstance(choices, Sequence) or isinstance(choices, str):
        kinds = "a distribution of Optuna, a list of values, a range such as {'low': 0, 'high': 1}, or None"
        raise _refused(info, f"can be given {kinds}, not {quote(choices)}")
    if not choices:
        raise _refused(info, "has nothing to choose from")
    for choice in choices:
        if not isinstance(choice, _SCALARS):
            raise _refused(info, f"can be given numbers, texts and booleans to choose from, not {quote(choice)}")
    return CategoricalDistribution(choices)


def _range(info: VariableInfo, stated: Mapping[str, Any], *, is_whole: bool) -> BaseDistribution:
    for key in stated:
        if key not in _RANGE:
            raise _refused(info, f"can be given {', '.join(sorted(_RANGE))}, not {quote(key)}")
    low = stated.get("low", info.constraints.get("min"))
    high = stated.get("high", info.constraints.get("max"))
    if low is None or high is None:
        lacks = " and ".join(key for key, bound in (("min", low), ("max", high)) if bound is None)
        raise _refused(info, f"has no {lacks} in its constraints: give a range, variables={{...: {{'low': ...}}}}")
    step = stated.get("step")
    log = stated.get("log", info.metadata.get(SCALE) == "log")
    try:
        if is_whole:
            return IntDistribution(low, high, log=bool(log), step=1 if step is None else step)
        return FloatDistribution(low, high, log=bool(log), step=step)
    except (TypeError, ValueError) as error:
        raise _refused(info, f"cannot have this range: {error}") from error


def _check(info: VariableInfo, distribution: BaseDistribution) -> None:
    """Refuse a distribution with values that the variable cannot have."""
    if isinstance(distribution, CategoricalDistribution):
        tried: Sequence[Any] = distribution.choices
    elif isinstance(distribution, FloatDistribution | IntDistribution):
        value_type = values.get_type(info.name, info.type)
        if isinstance(distribution, FloatDistribution) and int in value_type.infer:
            raise _refused(info, "is a whole number: use IntDistribution")
        tried = (distribution.low, distribution.high)
    else:
        raise _refused(info, f"can be given a distribution of Optuna, not {quote(distribution)}")
    for value in tried:
        fault = _fault(info, value)
        if fault is not None:
            raise _refused(info, f"cannot be {quote(value) if isinstance(value, str) else value}: {fault}")


def _fault(info: VariableInfo, value: Any) -> str | None:
    """Return why a variable cannot have a value."""
    try:
        document = json.loads(values.encode(value, info.type, name=info.name).json)
        values.compile_constraints(info.name, info.type, info.record.constraints).check(info.name, document)
    except StateError as error:
        return getattr(error, "reason", str(error))
    return None


def _refused(info: VariableInfo, reason: str) -> InvalidArgumentError:
    return InvalidArgumentError("variables", f"{quote(info.name)} {reason}")
