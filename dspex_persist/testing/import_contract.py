"""The contract of every provider that is `Importable` and `Recordable`, as tests. A backend subclasses
`ImportContract`.

The tests record values of sensitive variables, so a server under test needs `audit_reveal`.
"""

import io
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.abilities import Importable, Recordable
from dspex_persist.state.model import ChangeKind, ImportedSession, Origin, Source, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.recording import (
    ContentHash,
    Header,
    RecordedAnswer,
    RecordedCommit,
    read_recording,
    write_recording,
)
from dspex_persist.testing.checks import check_invalid, exact, shown
from dspex_persist.testing.provider_contract.arguments import WRONG_TEXTS
from dspex_persist.testing.provider_contract.base import Contract
from dspex_persist.testing.provider_contract.values import BINARY_VALUES, EXACT_VALUES

Commits: TypeAlias = tuple[RecordedCommit, ...]


def recording_of(provider: StateProvider, session: str) -> tuple[Header, Commits]:
    """Return the whole recording of a session."""
    header, commits = Recordable.of(provider).record(session, reveal=True)
    return header, tuple(commits)


def anew(provider: StateProvider, header: Header, commits: Iterable[RecordedCommit], **more: Any) -> ImportedSession:
    """Import a recording."""
    return Importable.of(provider).import_session(header, commits, **more)


def anew_ahead(
    provider: StateProvider, header: Header, commits: Iterable[RecordedCommit], **more: Any
) -> ImportedSession:
    """Import a recording whose commits are written as they come, where that is possible."""
    with Importable.of(provider).begin_import(header, **more) as begun:
        begun.write_ahead()
        for commit in commits:
            begun.add(commit)
        begun.check()
        return begun.finish()


def ended(provider: StateProvider, session: str) -> tuple[Header, Commits]:
    """Record a session, then end it, so that it can be imported under its own id."""
    recording = recording_of(provider, session)
    provider.cleanup_session(session)
    return recording


class ImportContract(Contract):
    """A recorded session that goes on elsewhere."""

    @pytest.fixture
    def other(self) -> str:
        """The id of a session that does not exist."""
        return f"contract-{uuid.uuid4().hex}"

    @pytest.fixture
    def story(self, provider: StateProvider, session: str) -> str:
        """A session in which much has happened."""
        provider.initialize_session(session, {"user": "ada \U0001f600"})
        provider.register_variable(session, "x", "integer", 1, metadata={"unit": "m"}, constraints={"min": 0})
        provider.submit(
            commands.SetVariable(session, "x", Value("2"), {"why": "so"}), Origin("ada", "SetVariable", Source.ELIXIR)
        ).result()
        provider.register_variable(session, "y", "string", "a\nb\u2028", metadata={"sensitive": "true"})
        provider.register_variable(session, "z", "list", [1, {"deep": None}])
        provider.set_variables(session, {"x": 3, "z": []})
        provider.add_dependency(session, "y", "x", "uses")
        provider.rollback_variable(session, "x", 0)
        provider.start_optimization(session, "y", "optimizer", {"trials": "5"})
        provider.delete_variable(session, "z")
        provider.register_variable(session, "z", "float", 0.5)
        return session

    def test_it_claims_to_import(self, provider: StateProvider) -> None:
        assert isinstance(provider, Importable)

    def test_it_is_the_same_session(self, provider: StateProvider, story: str) -> None:
        before = provider.list_variables(story)
        histories = {name: provider.get_variable_history(story, name) for name in ("x", "y", "z")}
        header, commits = ended(provider, story)
        imported = anew(provider, header, commits)
        assert imported == ImportedSession(
            story,
            len(commits),
            imported.first_sequence,
            imported.first_sequence + len(commits) - 1,
            content_hash=imported.content_hash,
        )
        assert recording_of(provider, story) == (header, commits)
        assert provider.list_variables(story) == before
        for name, history in histories.items():
            again = provider.get_variable_history(story, name)
            assert [each._replace(sequence=0) for each in again] == [each._replace(sequence=0) for each in history]
            assert imported.first_sequence <= again[-1].sequence <= imported.last_sequence
        assert provider.get_session(story).metadata["user"] == "ada \U0001f600"

    def test_it_goes_on(self, provider: StateProvider, story: str) -> None:
        header, commits = ended(provider, story)
        anew(provider, header, commits)
        assert provider.set_variable(story, "x", 7) == 4
        with pytest.raises(errors.InvalidValueError):
            provider.set_variable(story, "x", -1)
        with pytest.raises(errors.VariableLockedError):
            provider.set_variable(story, "y", "no")
        with pytest.raises(errors.DependencyCycleError):
            provider.add_dependency(story, "x", "y")
        provider.stop_optimization(story, "y", force=True)
        provider.register_variable(story, "new", "integer", 0)
        assert len(recording_of(provider, story)[1]) == len(commits) + 3

    def test_under_another_id(self, provider: StateProvider, story: str, other: str) -> None:
        header, commits = recording_of(provider, story)
        imported = anew(provider, header, commits, session_id=other)
        assert imported.session_id == other
        ids = [variable.id for variable in provider.list_variables(story)]
        assert [variable.id for variable in provider.list_variables(other)] == ids
        provider.set_variable(other, "x", 9)
        assert (provider.get_value(story, "x"), provider.get_value(other, "x")) == (1, 9)

    def test_it_has_the_same_content_hash(self, provider: StateProvider, story: str, other: str) -> None:
        header, commits = recording_of(provider, story)
        content = ContentHash()
        for _ in content.over(commits):
            pass
        before = Recordable.of(provider).content_hash(story)
        assert before == content.hexdigest()
        imported = anew(provider, header, commits, session_id=other)
        assert imported.content_hash == before == Recordable.of(provider).content_hash(other)
        provider.set_variable(other, "x", 9)
        assert Recordable.of(provider).content_hash(other) != before == Recordable.of(provider).content_hash(story)

    def test_by_way_of_a_file(self, provider: StateProvider, story: str) -> None:
        provider.set_variable(story, "x", 5, idempotency_key="key")
        recording = ended(provider, story)
        file = io.StringIO()
        write_recording(*recording, file)
        file.seek(0)
        anew(provider, *read_recording(file))
        assert recording_of(provider, story) == recording

    def test_values_of_all_types_are_exact(self, provider: StateProvider, session: str, other: str) -> None:
        for number, (type_name, value) in enumerate(EXACT_VALUES):
            provider.register_variable(session, f"v{number}", type_name, value)
        for number, (type_name, binary) in enumerate(BINARY_VALUES):
            provider.run(commands.RegisterVariable(session, f"b{number}", type_name, binary))
        anew(provider, *recording_of(provider, session), session_id=other)
        assert provider.list_variables(other) == provider.list_variables(session)
        for number, (_, value) in enumerate(EXACT_VALUES):
            assert exact(provider.get_value(other, f"v{number}")) == exact(value)

    # Idempotency keys

    def test_answers_under_idempotency_keys_come_along(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0, idempotency_key="register")
        provider.set_variable(session, "x", 1, idempotency_key="set")
        provider.set_variable(session, "x", 2)
        provider.set_variables(session, {"x": 3}, idempotency_key="batch")
        identifier = provider.get_variable(session, "x").id
        header, commits = ended(provider, session)
        assert [each.answer.key for each in commits if each.answer is not None] == ["register", "set", "batch"]
        assert anew(provider, header, commits).answers == 3
        assert provider.register_variable(session, "x", "integer", 0, idempotency_key="register") == identifier
        assert provider.set_variable(session, "x", 1, idempotency_key="set") == 1
        assert provider.set_variables(session, {"x": 3}, idempotency_key="batch").versions == {"x": 3}
        with pytest.raises(errors.IdempotencyConflictError):
            provider.set_variable(session, "x", 9, idempotency_key="set")
        assert provider.get_variable(session, "x").version == 3
        assert recording_of(provider, session) == (header, commits)

    def test_under_another_id_the_keys_are_free(self, provider: StateProvider, session: str, other: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        provider.set_variable(session, "x", 1, idempotency_key="set")
        assert anew(provider, *recording_of(provider, session), session_id=other).answers == 0
        assert provider.set_variable(other, "x", 1, idempotency_key="set") == 2

    def test_a_recording_without_answers(self, provider: StateProvider, session: str) -> None:
        """Recordings of releases before they were recorded."""
        provider.register_variable(session, "x", "integer", 0)
        provider.set_variable(session, "x", 1, idempotency_key="set")
        header, commits = ended(provider, session)
        assert anew(provider, header, (replace(commit, answer=None) for commit in commits)).answers == 0
        assert provider.set_variable(session, "x", 1, idempotency_key="set") == 2

    # All or nothing

    @pytest.fixture
    def damages(self, story: str, provider: StateProvider) -> Sequence[tuple[Header, Callable[[], Iterator[Any]]]]:
        """Recordings that are wrong in one place."""
        header, commits = recording_of(provider, story)
        first, updated, second, third, *_, last = commits
        version = second.versions[0]
        late = replace(version, version=5, kind=ChangeKind.SET)
        twice = RecordedAnswer("key", "SetVariable", "0" * 64, "1")

        def but(place: int, commit: RecordedCommit) -> Commits:
            return (*commits[:place], commit, *commits[place + 1 :])

        def broken() -> Iterator[RecordedCommit]:
            yield from commits[:3]
            raise errors.RecordingError("a file", 5, "it is not a commit")

        wrong: Sequence[Commits] = (
            (first, second),
            (updated,),
            (*commits, replace(first, number=len(commits) + 1)),
            but(2, replace(second, versions=(replace(version, value=Value("-1")),))),
            but(2, replace(second, versions=(replace(version, value=Value("1 ")),))),
            but(2, replace(second, versions=(replace(version, value=None, masked=True),))),
            but(2, replace(second, versions=())),
            but(3, replace(third, versions=(late,))),
            but(3, replace(third, versions=(), events=())),
            but(len(commits) - 1, replace(last, answer=RecordedAnswer("", "SetVariable", "0" * 64, "1"))),
            but(len(commits) - 1, replace(last, answer=RecordedAnswer("key", "SetVariable", "0" * 64, "no JSON"))),
            (*but(2, replace(second, answer=twice))[:-1], replace(last, answer=twice)),
            but(2, replace(second, actor="\ud800")),
        )
        recordings = [(header, partial(iter, each)) for each in wrong]
        return [*recordings, (header, broken), (replace(header, masked=True), partial(iter, commits))]

    def test_what_is_wrong_changes_nothing(
        self, provider: StateProvider, damages: Sequence[tuple[Header, Callable[[], Iterator[Any]]]], other: str
    ) -> None:
        provider.initialize_session(f"{other}-other")
        (before,) = recording_of(provider, f"{other}-other")[1]
        for header, commits in damages:
            for way in (anew, anew_ahead):
                with pytest.raises(errors.RecordingError):
                    way(provider, header, commits(), session_id=other)
                assert not provider.heartbeat(other)
        provider.register_variable(f"{other}-other", "x", "integer", 0)
        # No number was used up.
        assert recording_of(provider, f"{other}-other")[1][1].sequence == before.sequence + 1

    def test_the_id_of_a_live_session(self, provider: StateProvider, story: str, other: str) -> None:
        header, commits = recording_of(provider, story)
        provider.initialize_session(other)
        for existing in (None, other):
            for way in (anew, anew_ahead):
                with pytest.raises(errors.SessionExistsError):
                    way(provider, header, commits, session_id=existing)
        assert provider.list_variables(other) == ()
        assert recording_of(provider, story) == (header, commits)

    def test_what_exceeds_a_limit(self, provider: StateProvider, session: str, other: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        header, (first, second) = recording_of(provider, session)
        version, event = second.versions[0], second.events[0]
        more = [
            RecordedCommit(
                number,
                second.at,
                second.actor,
                second.cause,
                (replace(version, variable_id=f"var_{number}", name=f"x{number}"),),
                (replace(event, body={**event.body, "variable_id": f"var_{number}", "name": f"x{number}"}),),
            )
            for number in range(2, self.limits.variables_per_session + 3)
        ]
        with pytest.raises(errors.RecordingError, match="variables"):
            anew(provider, replace(header, commits=len(more) + 1), (first, *more), session_id=other)
        assert not provider.heartbeat(other)
        anew(provider, replace(header, commits=len(more)), (first, *more[:-1]), session_id=other)
        assert len(provider.list_variables(other)) == self.limits.variables_per_session

    def test_written_as_it_comes(self, provider: StateProvider, story: str) -> None:
        provider.set_variable(story, "x", 4, idempotency_key="key")
        header, commits = ended(provider, story)
        imported = anew_ahead(provider, header, commits)
        assert (imported.commits, imported.answers) == (len(commits), 1)
        assert imported.content_hash == Recordable.of(provider).content_hash(story)
        assert recording_of(provider, story) == (header, commits)
        assert provider.set_variable(story, "x", 4, idempotency_key="key") == 4
        assert provider.set_variable(story, "x", 5) == 5

    @pytest.mark.parametrize("closes", [True, False], ids=["closed", "forgotten"])
    def test_written_in_part_and_given_up(
        self, provider: StateProvider, story: str, other: str, *, closes: bool
    ) -> None:
        header, commits = recording_of(provider, story)
        begun = Importable.of(provider).begin_import(header, other)
        begun.write_ahead()
        for commit in commits[:3]:
            begun.add(commit)
        begun.check()
        if closes:
            begun.close()
        del begun
        assert provider.set_variable(story, "x", 9) == 4
        assert not provider.heartbeat(other)

    def test_progress_that_raises_ends_it(self, provider: StateProvider, story: str, other: str) -> None:
        def refuse(*_: object) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            anew(provider, *recording_of(provider, story), session_id=other, progress=refuse)
        assert not provider.heartbeat(other)

    # Many commits, and others who write

    def test_others_write_meanwhile(self, provider: StateProvider, session: str, other: str) -> None:
        provider.register_variable(session, "x", "string", "")
        pending = [provider.submit(commands.SetVariable(session, "x", Value(f'"{"x" * 1000}"'))) for _ in range(700)]
        for future in pending:
            future.result()
        header, commits = recording_of(provider, session)
        written: list[int] = []
        halfway, ended = threading.Event(), threading.Event()

        def write() -> None:
            halfway.wait()
            provider.register_variable(session, "y", "integer", 0)
            for number in range(1, 50):
                written.append(provider.set_variable(session, "y", number))
            ended.set()

        def slow() -> Iterator[RecordedCommit]:
            yield from commits[:350]
            halfway.set()
            # The other one writes while half of the recording has come.
            ended.wait()
            yield from commits[350:]

        writer = threading.Thread(target=write)
        writer.start()
        reports: list[tuple[int, int]] = []
        try:
            imported = anew(
                provider,
                header,
                slow(),
                session_id=other,
                progress=lambda _what, done, in_all: reports.append((done, in_all)),
            )
        finally:
            halfway.set()
            ended.set()
            writer.join()
        assert written == list(range(1, 50))
        assert imported.commits == header.commits == 702
        assert (reports[0], reports[-1]) == ((0, 702), (702, 702))
        assert reports == sorted(reports)
        assert provider.get_variable(other, "x").version == 700
        sequences = [commit.sequence for commit in recording_of(provider, other)[1]]
        assert sequences == list(range(imported.first_sequence, imported.last_sequence + 1))
        last = provider.get_variable_history(session, "y", limit=1)[0]
        assert last.sequence < imported.first_sequence

    def test_it_can_be_watched(self, provider: StateProvider, story: str, other: str) -> None:
        imported = anew(provider, *recording_of(provider, story), session_id=other)
        with provider.watch(other, ["x"], after_sequence=imported.first_sequence) as watch:
            provider.set_variable(other, "x", 4)
            versions: list[int] = []
            while 4 not in versions:
                versions += [update.variable.version for update in watch.pull()]
        assert versions == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize(("wrong", "reason"), WRONG_TEXTS, ids=shown)
    def test_an_id_of_a_wrong_type(self, provider: StateProvider, story: str, wrong: Any, reason: str) -> None:
        header, commits = recording_of(provider, story)
        if wrong is not None:
            check_invalid(lambda: anew(provider, header, commits, session_id=wrong), "session_id", reason)
