"""How a burst of changes becomes one, by debouncing and throttling, at times that the test says."""

from datetime import UTC, datetime

import pytest

from dspex_persist.cognitive.changes import Change, Choice, Pace, Taken
from dspex_persist.state.errors import InvalidArgumentError
from dspex_persist.state.model import ChangeKind, Source, Update, UpdateKind, Value, Variable, VariableVersion

NOW = datetime(2030, 1, 1, tzinfo=UTC)


def change(number: int, name: str = "x") -> Change[int]:
    """Version `number` of a variable, with the same value, in the commit of this number."""
    value = Value(str(number))
    variable = Variable(f"id-{name}", name, "integer", value, number, "", {}, Source.PYTHON, NOW)
    version = VariableVersion(
        variable.id, "integer", number, ChangeKind.SET, value, {}, Source.PYTHON, NOW, "ada", "SetVariable", number
    )
    update = Update(UpdateKind.VALUE_CHANGE, variable, number, NOW, version, previous=Value(str(number - 1)))
    return Change(update)


def shown(taken: list[Taken]) -> list[tuple[str, object, object, int]]:
    return [(each.change.name, each.change.old, each.change.value, each.change.count) for each in taken]


class TestPace:
    def test_without_any_each_change_comes_at_once(self) -> None:
        pace = Pace(None, None)
        assert [shown(list(pace.offer(change(number), 0))) for number in (1, 2)] == [
            [("x", 0, 1, 1)],
            [("x", 1, 2, 1)],
        ]
        assert (pace.next_due_s(), pace.due(9), pace.flush()) == (None, [], [])

    def test_debounce_delivers_the_last_once_it_is_quiet(self) -> None:
        pace = Pace(2, None)
        for number in (1, 2, 3):
            assert list(pace.offer(change(number), number)) == []
        assert pace.next_due_s() == 5
        assert pace.due(4.9) == []
        due = pace.due(5)
        assert shown(due) == [("x", 0, 3, 3)]
        assert due[0].first == 1
        assert pace.due(100) == []
        list(pace.offer(change(4), 6))
        assert shown(pace.due(8)) == [("x", 3, 4, 1)]

    def test_throttle_delivers_the_first_at_once_and_the_last_of_each_interval(self) -> None:
        pace = Pace(None, 10)
        assert shown(list(pace.offer(change(1), 0))) == [("x", 0, 1, 1)]
        for number in (2, 3):
            assert list(pace.offer(change(number), number)) == []
        assert pace.next_due_s() == 10
        assert pace.due(9) == []
        assert shown(pace.due(10)) == [("x", 1, 3, 2)]
        assert list(pace.offer(change(4), 12)) == []
        assert shown(pace.due(25)) == [("x", 3, 4, 1)]
        assert list(pace.offer(change(5), 30)) == [], "35 is the first time after the last one"
        assert shown(pace.due(35)) == [("x", 4, 5, 1)]
        assert shown(list(pace.offer(change(6), 45))) == [("x", 5, 6, 1)]

    @pytest.mark.parametrize("pace", [Pace(1, None), Pace(None, 1)])
    def test_each_variable_has_its_own_time(self, pace: Pace) -> None:
        taken = [each for name in "xyx" for each in pace.offer(change(1, name), 0)]
        taken += pace.due(1)
        assert {each.change.name for each in taken} == {"x", "y"}

    @pytest.mark.parametrize("pace", [Pace(1, None), Pace(None, 1)])
    def test_at_the_end_everything_that_waits_is_delivered(self, pace: Pace) -> None:
        taken = [each for number in (1, 2, 3) for each in pace.offer(change(number), 0)]
        taken += pace.flush()
        assert taken[-1].change.value == 3
        assert sum(each.change.count for each in taken) == 3
        assert pace.flush() == []

    def test_what_waits_is_due_in_order(self) -> None:
        pace = Pace(1, None)
        for number, name in ((1, "x"), (2, "y"), (3, "x"), (4, "z")):
            list(pace.offer(change(number, name), number))
        assert [each.change.name for each in pace.due(9)] == ["y", "x", "z"]

    @pytest.mark.parametrize(("debounce_s", "throttle_s"), [(1, 1), (0, None), (None, -1), (float("nan"), None)])
    def test_refused(self, debounce_s: float | None, throttle_s: float | None) -> None:
        with pytest.raises(InvalidArgumentError):
            Pace(debounce_s, throttle_s)

    def test_throttling_remembers_no_variable_for_longer_than_it_must(self) -> None:
        pace = Pace(None, 1)
        for number in range(1000):
            list(pace.offer(change(number, f"v{number}"), 0))
        pace.due(2)
        assert pace._free_at == {}


class TestChoice:
    def test_names_are_left_to_the_backend(self) -> None:
        choice = Choice(("a", "b"))
        assert choice.identifiers == ("a", "b")
        assert choice.includes("a")

    def test_globs_are_matched_here(self) -> None:
        choice = Choice(("temp*", "b"))
        assert choice.identifiers == ()
        assert [name for name in ("temp", "temperature", "b", "c") if choice.includes(name)] == [
            "temp",
            "temperature",
            "b",
        ]

    def test_none_means_all(self) -> None:
        assert Choice(()).includes("anything")
