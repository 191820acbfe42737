"""Dependencies: which cycle a new one would close, and which variables a change affects, in which order."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from dspex_persist.state.commands import (
    AddDependency,
    CleanupSession,
    DeleteVariable,
    InitializeSession,
    RegisterVariable,
    RemoveDependency,
)
from dspex_persist.state.errors import DependencyCycleError, LimitExceededError, VariableNotFoundError
from dspex_persist.state.graph import Dependencies, dependants, find_cycle
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Dependency, EventKind, Value
from tests.deadline import cpu_s_below
from tests.memory import MemoryGroups


def edges(*pairs: str, since: int = 1) -> Dependencies:
    """Each pair of letters is a dependency: the first depends on the second."""
    return Dependencies(Dependency(pair[0], pair[1], "", since) for pair in pairs)


def backing(*names: str, limits: Limits | None = None) -> MemoryGroups:
    """A session `s` with these variables."""
    memory = MemoryGroups(limits)
    memory.run(InitializeSession("s"))
    for name in names:
        memory.run(RegisterVariable("s", name, "integer", Value("0")))
    return memory


def depend(memory: MemoryGroups, *pairs: str) -> None:
    for pair in pairs:
        memory.run(AddDependency("s", pair[0], pair[1]))


class TestFindCycle:
    def test_none_in_a_chain_a_diamond_or_nothing(self) -> None:
        assert find_cycle(edges(), *edges("ab")) is None
        assert find_cycle(edges("ab", "bc"), *edges("ac")) is None
        assert find_cycle(edges("ab", "ac", "bd"), *edges("cd")) is None

    def test_itself(self) -> None:
        assert find_cycle(edges(), *edges("aa")) == ["a", "a"]

    @pytest.mark.parametrize("length", [2, 3, 7, 26])
    def test_runs_along_the_dependencies_and_returns_to_its_start(self, length: int) -> None:
        letters = "abcdefghijklmnopqrstuvwxyz"[:length]
        pairs = [first + second for first, second in pairwise(letters)]
        cycle = find_cycle(edges(*pairs), *edges(letters[-1] + letters[0]))
        assert cycle is not None
        assert cycle[0] == cycle[-1]
        assert sorted(cycle[1:]) == list(letters)
        steps = {first + second for first, second in pairwise(cycle)}
        assert steps == {*pairs, letters[-1] + letters[0]}

    def test_leaves_out_variables_that_are_not_on_it(self) -> None:
        cycle = find_cycle(edges("ab", "bc", "xa", "cy"), *edges("ca"))
        assert cycle is not None
        assert set(cycle) == {"a", "b", "c"}

    def test_an_edge_that_has_ended_closes_nothing(self) -> None:
        assert find_cycle(Dependencies([Dependency("a", "b", "", 1, until=5)]), *edges("ba")) is None

    def test_is_fast_with_the_maximum_number_of_dependencies(self) -> None:
        """This runs in the writer, where all others wait."""
        ids = [f"variable {number}" for number in range(10_000)]
        most = Dependencies(
            Dependency(ids[number], ids[number - step], "", 1)
            for number in range(16, len(ids))
            for step in range(1, 17)
        )
        with cpu_s_below(1):
            assert find_cycle(most, Dependency(ids[-1], ids[0], "", 1)) is None
            cycle = find_cycle(most, Dependency(ids[0], ids[-1], "", 1))
        assert cycle is not None
        assert (cycle[0], cycle[-1]) == (ids[0], ids[0])


class TestDependants:
    def affected(self, pairs: Sequence[str], *changed: str) -> list[str]:
        return dependants(edges(*pairs), changed, sequence=10)

    def test_no_dependants(self) -> None:
        assert self.affected([], "a") == []
        assert self.affected(["ab"], "a") == []

    def test_all_along_a_chain_dependencies_first(self) -> None:
        assert self.affected(["cb", "dc", "ba"], "a") == ["b", "c", "d"]

    def test_of_a_diamond_each_once_and_the_tip_last(self) -> None:
        found = self.affected(["ba", "ca", "db", "dc"], "a")
        assert found[-1] == "d"
        assert sorted(found[:2]) == ["b", "c"]
        assert len(found) == 3

    def test_a_long_way_round_still_comes_before_its_users(self) -> None:
        """`z` uses `a` directly, and also through the chain `b`, `c`, so it comes after the chain."""
        assert self.affected(["za", "zc", "cb", "ba"], "a") == ["b", "c", "z"]

    def test_a_changed_variable_that_depends_on_another_changed_one_is_included(self) -> None:
        assert self.affected(["ba"], "a", "b") == ["b"]

    def test_only_those_downstream(self) -> None:
        assert self.affected(["ba", "yx"], "a") == ["b"]

    def test_counts_as_of_the_commit(self) -> None:
        kept = Dependencies([Dependency("b", "a", "", since=5, until=8)])
        reported = {sequence: dependants(kept, ["a"], sequence) for sequence in (4, 5, 6, 8, 9)}
        assert reported == {4: [], 5: [], 6: ["b"], 8: ["b"], 9: []}


class Counting(Dependencies):
    """Counts the lookups of users."""

    looked = 0

    def users_of(self, variable_id: str, sequence: int) -> Iterator[str]:
        for user in super().users_of(variable_id, sequence):
            self.looked += 1
            yield user


class TestCost:
    def test_finding_dependants_takes_time_in_proportion_to_the_answer(self) -> None:
        ids = [f"variable {number:05}" for number in range(2_000)]
        web = Counting(
            Dependency(ids[number], ids[number - step], "", 1)
            for number in range(16, len(ids))
            for step in range(1, 17)
        )
        assert len(web) > 30_000
        assert dependants(web, [ids[-4]], sequence=2) == ids[-3:]
        assert web.looked == 3 + 2 + 1

    def test_ended_dependencies_take_no_time(self) -> None:
        """However many used it before, only those whose dependency ended in that commit are notified."""
        kept = Dependencies(edges("xa"))
        for number in range(2, 500):
            kept = kept.added(Dependency(f"gone {number}", "a", "", number)).without(f"gone {number}", number)
        counting = Counting(kept)
        assert dependants(counting, ["a"], sequence=500) == ["x"]
        assert counting.looked == 1
        assert dependants(counting, ["a"], sequence=499) == ["x"]
        assert dependants(counting, ["a"], sequence=2) == ["x"]
        kept = kept.added(Dependency("late", "a", "", 500)).without("late", 501)
        assert dependants(kept, ["a"], sequence=501) == ["late", "x"]

    def test_a_change_takes_time_in_proportion_to_its_variables(self) -> None:
        kept = Dependencies(Dependency(f"user {number}", f"used {number}", "", 1) for number in range(2_000))
        added = kept.added(Dependency("a", "b", "", 2))
        same = [each is other for each, other in zip(kept._nodes._shards, added._nodes._shards, strict=True)]
        assert same.count(False) <= 2
        assert (len(kept), len(added)) == (2_000, 2_001)
        gone = added.without("b", 3)
        same = [each is other for each, other in zip(added._nodes._shards, gone._nodes._shards, strict=True)]
        assert same.count(False) <= 2


@pytest.mark.parametrize("seed", range(30))
def test_changes_give_the_same_result_as_a_list_of_all_dependencies(seed: int) -> None:
    random, names = Random(seed), "abcdefgh"
    kept, known, gone = Dependencies(), list[Dependency](), set[str]()
    for sequence in range(1, 60):
        live = [name for name in names if name not in gone]
        if random.random() < 0.1 and len(live) > 2:
            name = random.choice(live)
            gone.add(name)
            kept = kept.without(name, sequence)
            known = [
                replace(edge, until=sequence) if edge.until is None and name in (edge.from_id, edge.to_id) else edge
                for edge in known
            ]
        else:
            used, user = sorted(random.sample(live, 2))
            edge = Dependency(user, used, random.choice(["", "type"]), sequence)
            assert kept.has(edge) == any(replace(each, since=sequence) == edge for each in known)
            if kept.has(edge):
                continue
            kept, known = kept.added(edge), [*known, edge]
        assert kept == known == Dependencies(known)
        assert kept.changed_at == Dependencies(known).changed_at
        for at in {1, sequence // 2, sequence, sequence + 1}:
            for name in names:
                counted = [edge for edge in known if edge.since < at and (edge.until or at) >= at]
                reached, frontier = set[str](), [name]
                while frontier:
                    used = frontier.pop()
                    users = {edge.from_id for edge in counted if edge.to_id == used} - reached
                    reached |= users
                    frontier += users
                reported = dependants(kept, [name], at)
                assert set(reported) == reached
                assert len(reported) == len(reached)
                assert all(
                    reported.index(edge.to_id) < reported.index(edge.from_id)
                    for edge in counted
                    if edge.to_id in reached
                )


class TestAddDependency:
    def test_is_kept_with_its_type_and_logged(self) -> None:
        memory = backing("a", "b")
        memory.run(AddDependency("s", "a", "b", "derives"))
        (edge,) = memory.states["s"].dependencies
        names = memory.states["s"].names
        assert (names[edge.from_id], names[edge.to_id], edge.type) == ("a", "b", "derives")
        assert edge.since == memory.sequence
        assert [event.kind for event in memory.commits[-1].events] == [EventKind.DEPENDENCY_ADDED]

    def test_names_and_ids_are_the_same(self) -> None:
        memory = backing("a", "b")
        depend(memory, "ab")
        ids = {name: variable.id for name, variable in memory.states["s"].variables.items()}
        commits = memory.sequence
        memory.run(AddDependency("s", ids["a"], ids["b"]))
        assert memory.sequence == commits, "saying it again changes nothing"

    def test_of_another_type_is_another_one(self) -> None:
        memory = backing("a", "b")
        memory.run(AddDependency("s", "a", "b", "one"))
        memory.run(AddDependency("s", "a", "b", "two"))
        assert [edge.type for edge in memory.states["s"].dependencies] == ["one", "two"]

    @pytest.mark.parametrize(("pairs", "closing"), [("", "aa"), ("ab", "ba"), ("ab bc cd", "da")])
    def test_a_cycle_is_refused_and_listed_by_name(self, pairs: str, closing: str) -> None:
        memory = backing("a", "b", "c", "d")
        depend(memory, *pairs.split())
        before = memory.states["s"].dependencies
        with pytest.raises(DependencyCycleError) as refused:
            depend(memory, closing)
        cycle = refused.value.cycle.split(" -> ")
        assert cycle[0] == cycle[-1]
        assert {first + second for first, second in pairwise(cycle)} == {*pairs.split(), closing}
        assert refused.value.cycle in str(refused.value)
        assert memory.states["s"].dependencies == before

    def test_unknown_ends_are_not_found(self) -> None:
        memory = backing("a")
        for ends in (("a", "missing"), ("missing", "a")):
            with pytest.raises(VariableNotFoundError, match="'missing'"):
                memory.run(AddDependency("s", *ends))

    def test_deleting_a_variable_ends_its_dependencies_both_ways(self) -> None:
        memory = backing("a", "b", "c")
        depend(memory, "ab", "bc")
        memory.run(DeleteVariable("s", "b"))
        assert {edge.until for edge in memory.states["s"].dependencies} == {memory.sequence}
        depend(memory, "ca")
        memory.run(RegisterVariable("s", "b", "integer", Value("1")))
        depend(memory, "ba", "bc")

    def test_too_many_of_them_name_the_setting(self) -> None:
        memory = backing("a", "b", limits=Limits(variables_per_session=2))
        for number in range(32):
            memory.run(AddDependency("s", "a", "b", f"type {number}"))
        with pytest.raises(LimitExceededError, match="variables_per_session"):
            memory.run(AddDependency("s", "a", "b", "one more"))

    def test_a_long_type_names_the_setting(self) -> None:
        memory = backing("a", "b")
        with pytest.raises(LimitExceededError, match="name_length"):
            memory.run(AddDependency("s", "a", "b", "x" * 256))

    def test_a_new_session_of_the_same_id_has_none(self) -> None:
        memory = backing("a", "b")
        depend(memory, "ab")
        memory.run(CleanupSession("s"))
        memory.run(InitializeSession("s"))
        assert memory.states["s"].dependencies == ()


class TestRemoving:
    """What is removed is what would be loaded from the rows of the log."""

    def test_one_of_two_types_and_one_of_two_users_stay(self) -> None:
        made = edges("ab", "cb").added(Dependency("a", "b", "uses", 2))
        left = made.removed(Dependency("a", "b", "", 5))
        assert left == Dependencies(
            [Dependency("a", "b", "", 1, 5), Dependency("a", "b", "uses", 2), Dependency("c", "b", "", 1)]
        )
        assert (left.changed_at, len(left)) == (5, 3)
        assert not left.has(Dependency("a", "b", "", 9))
        assert left.has(Dependency("a", "b", "uses", 9))
        assert left.removed(Dependency("a", "b", "", 6)) is left
        none = left.removed(Dependency("a", "b", "uses", 6)).removed(Dependency("c", "b", "", 7))
        assert (list(none.users_now("b")), list(none.used_by("a"))) == ([], [])
        # Those that ended in the commit that changed b are still told about it.
        assert list(none.users_of("b", 7)) == ["c"]

    def test_added_again_it_has_two_lives(self) -> None:
        again = edges("ab").removed(Dependency("a", "b", "", 5)).added(Dependency("a", "b", "", 5))
        again = again.removed(Dependency("a", "b", "", 8)).added(Dependency("a", "b", "", 9))
        expected = [Dependency("a", "b", "", 1, 5), Dependency("a", "b", "", 5, 8), Dependency("a", "b", "", 9)]
        assert list(again) == expected
        assert again == Dependencies(expected)

    def test_one_of_the_same_commit_never_was(self) -> None:
        made = edges().added(Dependency("a", "b", "", 5)).removed(Dependency("a", "b", "", 5))
        assert list(made) == []

    def test_it_opens_the_circle(self) -> None:
        memory = backing("a", "b")
        depend(memory, "ab")
        assert memory.run(RemoveDependency("s", "a", "b"))
        assert [event.kind for event in memory.commits[-1].events] == [EventKind.DEPENDENCY_REMOVED]
        depend(memory, "ba")
        assert not memory.run(RemoveDependency("s", "a", "b"))
