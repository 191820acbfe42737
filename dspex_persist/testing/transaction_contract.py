"""The contract of every provider that is `Transacts`, as tests. A backend subclasses `TransactionContract`.

The provider executes the tools of `CONTRACT_TOOLS`, as for `ToolContract`.
"""

import asyncio
import concurrent.futures
import contextlib
import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, cast

import pytest

from dspex_persist.cognitive.context import Context
from dspex_persist.cognitive.errors import ContextClosedError
from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.state import commands, errors, values
from dspex_persist.state.abilities import Recordable, Transaction, Transacts
from dspex_persist.state.model import ChangeKind, Value
from dspex_persist.testing.checks import DEADLINE_S, let_pass, names_of, take
from dspex_persist.testing.provider_contract.arguments import WRONG_METADATA, WRONG_TEXTS
from dspex_persist.testing.provider_contract.base import Contract

ENDED: Final = errors.TransactionEndedError


def value_in(transaction: Transaction, name: str) -> Any:
    """Return a variable's value as the transaction sees it."""
    variable = transaction.run(commands.GetVariable(transaction.session_id, name))
    return values.decode(variable.type, variable.value)


def write(transaction: Transaction, name: str, value: int) -> None:
    """Write an integer as part of the transaction."""
    transaction.run(commands.SetVariable(transaction.session_id, name, Value(str(value))))


def executions_of(provider: Any, session: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the journal has of the beginnings and the ends of executions, by id."""
    _, commits = Recordable.of(provider).record(session)
    facts = [event.body for commit in commits for event in commit.events if "execution_id" in event.body]
    begun = {each["execution_id"]: each for each in facts if "tool" in each}
    return begun, {each["execution_id"]: each for each in facts if "recorded" in each}


class TransactionContract(Contract):
    """Transactions of clients."""

    @pytest.fixture
    def shop(self, provider: Transacts, session: str) -> str:
        """The id of a session with the integers a, b and c, which are 0."""
        for name in ("a", "b", "c"):
            provider.register_variable(session, name, "integer", 0)
        return session

    def test_it_claims_to_transact(self, provider: Transacts) -> None:
        assert isinstance(provider, Transacts)

    def test_its_writes_show_all_at_once_in_one_commit(self, provider: Transacts, shop: str) -> None:
        with provider.watch(shop) as watch:
            transaction = provider.begin_transaction(shop)
            assert (transaction.session_id, transaction.status) == (shop, "")
            write(transaction, "a", 1)
            transaction.run(commands.SetVariables(shop, {"b": Value("2"), "c": Value("3")}))
            transaction.run(commands.RegisterVariable(shop, "d", "integer", Value("4")))
            transaction.run(commands.DeleteVariable(shop, "b"))
            assert [value_in(transaction, name) for name in ("a", "c", "d")] == [1, 3, 4]
            listed = transaction.run(commands.ListVariables(shop))
            assert names_of(listed) == ["a", "c", "d"]
            assert [provider.get_value(shop, name) for name in ("a", "b", "c")] == [0, 0, 0]
            sequence = transaction.commit()
            updates = take(watch, 5)
            assert {update.sequence for update in updates} == {sequence}
        assert transaction.status == "committed"
        assert {each.name: provider.get_value(shop, each.name) for each in provider.list_variables(shop)} == {
            "a": 1,
            "c": 3,
            "d": 4,
        }
        version = provider.get_variable_history(shop, "a")[0]
        assert (version.sequence, version.cause, version.kind) == (sequence, transaction.execution_id, ChangeKind.SET)
        assert version.actor == provider.default_origin("BeginTransaction").actor

    def test_it_reads_the_session_as_it_was_when_it_began(self, provider: Transacts, shop: str) -> None:
        transaction = provider.begin_transaction(shop, isolation="snapshot")
        provider.set_variable(shop, "a", 5)
        provider.register_variable(shop, "later", "integer", 0)
        assert value_in(transaction, "a") == 0
        with pytest.raises(errors.VariableNotFoundError):
            value_in(transaction, "later")
        history = transaction.run(commands.GetVariableHistory(shop, "a"))
        assert [version.version for version in history] == [0]
        write(transaction, "b", 1)
        transaction.commit()
        assert (provider.get_value(shop, "a"), provider.get_value(shop, "b")) == (5, 1)

    def test_what_is_refused_stages_nothing(self, provider: Transacts, shop: str) -> None:
        with provider.begin_transaction(shop) as transaction:
            write(transaction, "a", 1)
            with pytest.raises(errors.InvalidValueError):
                transaction.run(commands.SetVariable(shop, "b", Value('"one"')))
            with pytest.raises(errors.VersionConflictError):
                transaction.run(commands.SetVariable(shop, "a", Value("2"), expected_version=0))
            assert (value_in(transaction, "a"), value_in(transaction, "b")) == (1, 0)
        assert (provider.get_value(shop, "a"), provider.get_value(shop, "b")) == (1, 0)

    # Conflicts

    @pytest.mark.parametrize("isolation", ["serializable", "snapshot"])
    @pytest.mark.parametrize("what", ["read", "listed", "written", "absent"])
    def test_conflicts_follow_the_rules_of_tools(
        self, provider: Transacts, shop: str, what: str, isolation: str
    ) -> None:
        transaction = provider.begin_transaction(shop, isolation=isolation)
        if what == "read":
            value_in(transaction, "a")
        elif what == "listed":
            transaction.run(commands.ListVariables(shop, "a*"))
        elif what == "written":
            write(transaction, "a", 1)
        else:
            with pytest.raises(errors.VariableNotFoundError):
                value_in(transaction, "new")
        write(transaction, "b", 1)
        if what == "absent":
            provider.register_variable(shop, "new", "integer", 0)
        else:
            provider.set_variable(shop, "a", 9)
        if isolation == "snapshot" and what != "written":
            transaction.commit()
            assert provider.get_value(shop, "b") == 1
            return
        with pytest.raises(errors.ExecutionConflictError) as caught:
            transaction.commit()
        assert caught.value.execution_id == transaction.execution_id
        assert ("new" if what == "absent" else "a (was at version 0, is at version 1)") in caught.value.changes
        assert transaction.status == "conflict"
        assert provider.get_value(shop, "b") == 0
        with pytest.raises(ENDED):
            transaction.commit()

    def test_two_at_once_of_which_the_first_to_commit_wins(self, provider: Transacts, shop: str) -> None:
        first, second, apart = (provider.begin_transaction(shop) for _ in range(3))
        for transaction in (first, second):
            write(transaction, "a", value_in(transaction, "a") + 1)
        write(apart, "b", 1)
        second.commit()
        with pytest.raises(errors.ExecutionConflictError):
            first.commit()
        apart.commit()
        assert (provider.get_value(shop, "a"), provider.get_value(shop, "b")) == (1, 1)

    # Ends

    def test_an_abort_writes_nothing(self, provider: Transacts, shop: str) -> None:
        transaction = provider.begin_transaction(shop)
        write(transaction, "a", 1)
        transaction.abort()
        assert transaction.status == "aborted"
        assert provider.get_value(shop, "a") == 0
        transaction.abort()
        with pytest.raises(ENDED):
            transaction.commit()

    @pytest.mark.parametrize("end", ["commit", "abort"])
    def test_nothing_works_after_its_end(self, provider: Transacts, shop: str, end: str) -> None:
        transaction = provider.begin_transaction(shop)
        write(transaction, "a", 1)
        getattr(transaction, end)()
        acts: list[Callable[[], object]] = [
            lambda: value_in(transaction, "a"),
            lambda: write(transaction, "a", 2),
            lambda: transaction.run(commands.ExecuteTool(shop, "add")),
            transaction.commit,
        ]
        for act in acts:
            with pytest.raises(ENDED) as caught:
                act()
            assert (caught.value.execution_id, caught.value.status) == (transaction.execution_id, transaction.status)
        transaction.abort()
        assert provider.get_value(shop, "a") == (1 if end == "commit" else 0)

    def test_a_block_commits_at_its_end(self, provider: Transacts, shop: str) -> None:
        with provider.begin_transaction(shop) as transaction:
            write(transaction, "a", 1)
        assert (transaction.status, provider.get_value(shop, "a")) == ("committed", 1)
        for end in ("commit", "abort"):
            with provider.begin_transaction(shop) as transaction:
                write(transaction, "b", 1)
                getattr(transaction, end)()
        assert provider.get_value(shop, "b") == 1

    def test_a_block_that_raises_writes_nothing(self, provider: Transacts, shop: str) -> None:
        with pytest.raises(ZeroDivisionError), provider.begin_transaction(shop) as transaction:  # noqa: PT012
            write(transaction, "a", 1)
            write(transaction, "a", 1 // 0)
        assert (transaction.status, provider.get_value(shop, "a")) == ("failed", 0)

    def test_it_ends_when_its_time_is_up(self, provider: Transacts, shop: str) -> None:
        transaction = provider.begin_transaction(shop, timeout_s=0.05)
        deadline = time.monotonic() + DEADLINE_S
        with pytest.raises(ENDED):  # noqa: PT012
            while time.monotonic() < deadline:
                write(transaction, "a", 1)
                let_pass(0.01)
        with pytest.raises(ENDED):
            transaction.commit()
        assert provider.get_value(shop, "a") == 0

    def test_it_ends_with_its_session(self, provider: Transacts, shop: str) -> None:
        transaction = provider.begin_transaction(shop)
        write(transaction, "a", 1)
        provider.cleanup_session(shop)
        with pytest.raises(ENDED, match="the session or the server has ended"):
            transaction.commit()
        assert transaction.status == "interrupted"

    def test_it_ends_with_its_session_before_it_is_used(self, provider: Transacts, shop: str) -> None:
        transaction = provider.begin_transaction(shop)
        provider.cleanup_session(shop)
        deadline = time.monotonic() + DEADLINE_S
        while not transaction.status:
            assert time.monotonic() < deadline, "nothing has ended it"
            let_pass(0.01)
        assert transaction.status == "interrupted"

    def test_a_rule_refuses_the_commit_as_it_refuses_a_write(self, provider: Transacts, shop: str) -> None:
        provider.add_rule(shop, "ordered", "a <= b", "b is the limit")
        with pytest.raises(errors.RuleViolatedError) as refused:
            provider.set_variable(shop, "a", 1)
        transaction = provider.begin_transaction(shop)
        write(transaction, "a", 1)
        with pytest.raises(errors.RuleViolatedError) as caught:
            transaction.commit()
        assert str(caught.value) == str(refused.value)
        assert (transaction.status, provider.get_value(shop, "a")) == ("failed", 0)
        with pytest.raises(errors.RuleViolatedError), Context(shop, provider).transaction() as tx:
            tx["a"] = 1
        assert (tx.status, tx.commit_sequence) == ("failed", None)

    def test_one_that_is_forgotten_writes_nothing(self, provider: Transacts, shop: str) -> None:
        transaction = provider.begin_transaction(shop)
        write(transaction, "a", 1)
        del transaction
        gc.collect()
        with provider.begin_transaction(shop) as other:
            write(other, "a", value_in(other, "a") + 10)
        assert provider.get_value(shop, "a") == 10

    # What it can do

    def test_tools_join_it(self, provider: Transacts, shop: str) -> None:
        with provider.begin_transaction(shop) as transaction:
            write(transaction, "a", 5)
            outcome = transaction.run(commands.ExecuteTool(shop, "add", {"amount": Value("2")}))
            assert outcome.success
            assert outcome.execution_id == transaction.execution_id
            assert value_in(transaction, "a") == 7
            assert provider.get_value(shop, "a") == 0
            failed = transaction.run(commands.ExecuteTool(shop, "fail", {"name": Value('"ValueError"')}))
            assert failed.error_code == "TOOL_FAILED"
            unknown = transaction.run(commands.ExecuteTool(shop, "nothing"))
            assert unknown.error_code == "UNKNOWN_TOOL"
        assert provider.get_value(shop, "a") == 7

    @pytest.mark.parametrize(
        "command", [commands.GetSession, commands.CleanupSession, commands.InitializeSession, commands.Heartbeat]
    )
    def test_what_cannot_be_part_of_it(
        self, provider: Transacts, shop: str, command: Callable[[str], commands.Command[Any]]
    ) -> None:
        with provider.begin_transaction(shop) as transaction:
            with pytest.raises(errors.UnsupportedError, match="inside an execution"):
                transaction.run(command(shop))
            with pytest.raises(errors.InvalidArgumentError, match="belongs to another session"):
                transaction.run(commands.GetVariable("another", "a"))
        assert provider.heartbeat(shop)

    def test_who_writes_and_why(self, provider: Transacts, shop: str) -> None:
        origin = provider.origin("BeginTransaction", actor="ada", reason="because")
        with provider.begin_transaction(shop, origin=origin) as transaction:
            write(transaction, "a", 1)
            why = provider.origin("SetVariable", actor="bob", reason="for once")
            transaction.submit(commands.SetVariable(shop, "b", Value("1")), why).result()
        for name, reason in (("a", "because"), ("b", "for once")):
            version = provider.get_variable_history(shop, name)[0]
            assert (version.actor, version.reason) == ("ada", reason)

    def test_from_an_event_loop(self, provider: Transacts, shop: str) -> None:
        async def run() -> int:
            transaction = await asyncio.wrap_future(provider.submit_transaction(shop))
            submit = transaction.on_loop(LoopMailbox(asyncio.get_running_loop()))
            await submit(commands.SetVariable(shop, "a", Value("1")))
            history = await submit(commands.GetVariableHistory(shop, "a"))
            assert [version.version for version in history] == [1, 0]
            outcome = await submit(commands.ExecuteTool(shop, "add"))
            assert outcome.success
            return await asyncio.wrap_future(transaction.submit_commit())

        sequence = asyncio.run(run())
        assert provider.get_value(shop, "a") == 2
        assert provider.get_variable_history(shop, "a")[0].sequence == sequence

    # Turns

    def test_it_waits_for_its_turn_in_a_session_that_queues(self, provider: Transacts, shop: str) -> None:
        provider.initialize_session(shop, {"dspex.concurrency": "queue"})
        first = provider.begin_transaction(shop)
        waiting = [provider.submit_transaction(shop) for _ in range(3)]
        tool = provider.submit(commands.ExecuteTool(shop, "add"))
        with pytest.raises(errors.ToolTimedOutError, match="has not had its turn"):
            provider.begin_transaction(shop, timeout_s=0.1)
        assert not tool.done()
        assert not any(each.done() for each in waiting)
        write(first, "a", 1)
        first.commit()
        while waiting:
            done, _ = concurrent.futures.wait(waiting, DEADLINE_S, concurrent.futures.FIRST_COMPLETED)
            (opened,) = done
            waiting.remove(opened)
            with opened.result() as transaction:
                write(transaction, "a", value_in(transaction, "a") + 1)
        assert tool.result(DEADLINE_S).success
        assert provider.get_value(shop, "a") == 5

    def test_a_block_does_not_wait_for_itself(self, provider: Transacts, shop: str) -> None:
        with Context(shop, provider, metadata={"dspex.concurrency": "queue"}) as context:
            with context.transaction() as tx:
                for act in (lambda: context.call("add"), lambda: context.transaction().__enter__()):
                    with pytest.raises(errors.SessionBusyError, match="has called this and waits for it"):
                        act()
                assert tx.call("add") == 1
                with ThreadPoolExecutor(1) as pool:
                    waits = pool.submit(context.call, "add", name="b")
                    tx.commit()
                    assert waits.result(DEADLINE_S) == 1
            assert context.call("add") == 2

            async def run() -> None:
                async with context.transaction() as tx:
                    with pytest.raises(errors.SessionBusyError, match="has called this and waits for it"):
                        await context.call.aio("add")
                    other = asyncio.create_task(context.call.aio("add", name="b"))
                    await tx.set.aio("a", 5)
                assert await other == 2

            asyncio.run(run())
            assert context.get_many("a", "b") == {"a": 5, "b": 2}

    def test_it_is_refused_in_a_session_that_rejects(self, provider: Transacts, shop: str) -> None:
        provider.initialize_session(shop, {"dspex.concurrency": "reject"})
        with provider.begin_transaction(shop) as transaction:
            with pytest.raises(errors.SessionBusyError):
                provider.begin_transaction(shop)
            write(transaction, "a", 1)
        with provider.begin_transaction(shop) as transaction:
            write(transaction, "a", value_in(transaction, "a") + 1)
        assert provider.get_value(shop, "a") == 2

    # Recordings

    def test_what_is_recorded_is_in_the_journal_however_it_ends(self, provider: Transacts, shop: str) -> None:
        def end(each: Transaction, way: str) -> None:
            if way == "commit":
                each.commit()
            else:
                each.abort(ZeroDivisionError("no") if way == "fail" else None)

        expected = {}
        for way, status in (("commit", "committed"), ("abort", "aborted"), ("fail", "failed")):
            recording = provider.begin_recording(shop, f"my {way}", metadata={"run": "7"})
            transaction = provider.begin_transaction(shop)
            for each in (recording, transaction):
                each.record("lm", {"ordinal": 0, "text": "ü", "deep": {"x": [1, None, 0.5]}})
                each.record("lm", {"ordinal": 1})
                each.record("other", {})
                end(each, way)
                assert each.status == status
                with pytest.raises(ENDED):
                    each.record("lm", {})
            expected[recording.execution_id] = (f"my {way}", status)
            expected[transaction.execution_id] = ("transaction", status)
        begun, ended = executions_of(provider, shop)
        lm = [{"ordinal": 0, "text": "ü", "deep": {"x": [1, None, 0.5]}}, {"ordinal": 1}]
        # A recording counts its commits from 1, and so do the ids in it.
        assert [each.rpartition("_")[2] for each in begun] == [each.rpartition("_")[2] for each in expected]
        found = [(begun[each]["tool"], ended[each]["status"]) for each in begun]
        assert found == list(expected.values())
        assert [each["recorded"] for each in ended.values()] == [{"now": [], "lm": lm, "other": [{}]}] * 6
        assert [each["metadata"].get("dspex.part") for each in begun.values()] == ["1", None] * 3
        assert len({each["metadata"].get("dspex.recording") for each in begun.values()}) == 4
        assert next(iter(begun.values()))["metadata"]["run"] == "7"

    @pytest.mark.parametrize("demanded", ["queue", "reject"])
    def test_a_recording_waits_for_nobody_and_nobody_for_it(
        self, provider: Transacts, shop: str, demanded: str
    ) -> None:
        provider.initialize_session(shop, {"dspex.concurrency": demanded})
        with provider.begin_transaction(shop) as transaction:
            within = provider.begin_recording(shop)
            write(transaction, "a", 1)
        assert provider.submit(commands.ExecuteTool(shop, "add")).result().success
        with provider.begin_transaction(shop) as transaction:
            write(transaction, "a", value_in(transaction, "a") + 1)
        within.record("lm", {})
        within.commit()
        assert provider.get_value(shop, "a") == 3

    def test_a_budget_of_the_session_counts_what_was_recorded(self, provider: Transacts, shop: str) -> None:
        provider.initialize_session(shop, {"dspex.max_tokens": "10", "dspex.max_cost": "2.5"})
        call = {"response": {"usage": {"m": {"total_tokens": 4}}}, "cost": 0.5}
        with provider.begin_recording(shop, "first") as recording:
            recording.check_budgets()
            recording.record("lm", call)
            recording.record("other", call)
        with provider.begin_transaction(shop) as transaction, provider.begin_recording(shop) as recording:
            transaction.record("lm", call)
            recording.check_budgets()
            recording.record("lm", {**call, "cached": True})
            recording.check_budgets()
            recording.record("lm", call)
            for each in (transaction, recording):
                with pytest.raises(errors.BudgetExceededError) as caught:
                    each.check_budgets()
        error = caught.value
        assert (error.owner, error.unit, error.budget, error.used) == (f"session '{shop}'", "tokens", 10, 12)
        assert error.setting == "max_tokens"
        provider.initialize_session(shop, {"dspex.max_tokens": "none"})
        with provider.begin_recording(shop) as recording:
            recording.check_budgets()
            recording.record("lm", {"cost": 1.0})
            with pytest.raises(errors.BudgetExceededError) as caught:
                recording.check_budgets()
        assert (caught.value.unit, caught.value.used, caught.value.setting) == ("USD", 2.5, "max_cost")
        with pytest.raises(ENDED):
            recording.check_budgets()

    def test_wrong_recordings_are_refused(self, provider: Transacts, session: str) -> None:
        for wrong in ("", "x" * 10_000, "\x00", "\ud800"):
            with pytest.raises(errors.StateError):
                provider.begin_recording(session, wrong)
        for metadata in WRONG_METADATA:
            with pytest.raises(errors.InvalidArgumentError):
                provider.begin_recording(session, metadata=cast("Any", metadata))
        with pytest.raises(errors.SessionNotFoundError):
            provider.begin_recording("nowhere")
        with provider.begin_recording(session) as recording:
            for kind in ("", "now", *WRONG_TEXTS):
                with pytest.raises(errors.InvalidArgumentError):
                    recording.record(cast("Any", kind), {})
            for entry in ({"x": float("nan")}, {"x": object()}, {"x": "\ud800"}):
                with pytest.raises(errors.StateError):
                    recording.record("lm", entry)
            with pytest.raises(errors.LimitExceededError, match="journal_size_bytes"):
                recording.record("lm", {"x": "x" * 2 * 1024 * 1024})

    # Through a context

    def test_a_block_of_a_context_is_one_commit(self, provider: Transacts, shop: str) -> None:
        context = Context(shop, provider)
        with context.transaction(reason="a sale", actor="ada") as tx:
            tx["a"] = tx["a"] + 1
            tx.update("b", lambda value: value + 2)
            tx.define("d", "new", description="made in it")
            assert (tx.call("add", name="a", amount=10), tx["a"], context["a"]) == (11, 11, 0)
            assert [entry.value for entry in tx.history("a")] == [11, 1, 0]
            assert sorted(tx.variables) == ["a", "b", "c", "d"]
            tx.set("c", 3, reason="for once")
            with pytest.raises(errors.InvalidArgumentError, match="a transaction has one for all that it does"):
                tx.set("c", 4, actor="bob")
        assert context.get_many() == {"a": 11, "b": 2, "c": 3, "d": "new"}
        entries = [context.history(name, 1)[0] for name in "abcd"]
        assert {entry.commit for entry in entries} == {tx.commit_sequence}
        assert {(entry.actor, entry.execution_id) for entry in entries} == {("ada", tx.execution_id)}
        assert [entry.reason for entry in entries] == ["a sale", "a sale", "for once", "a sale"]
        assert (tx.status, tx.attempt) == ("committed", 1)

    def test_a_conflict_of_a_block_is_raised_at_its_end(self, provider: Transacts, shop: str) -> None:
        context = Context(shop, provider)
        with pytest.raises(errors.ExecutionConflictError) as caught, context.transaction() as tx:  # noqa: PT012
            tx["b"] = tx["a"] + 1
            context["a"] = 5
        assert caught.value.changes == "a (was at version 0, is at version 1)"
        assert (tx.status, tx.commit_sequence, context["b"]) == ("conflict", None, 0)
        with context.transaction(isolation="snapshot") as tx:
            tx["b"] = tx["a"] + 1
            context["a"] = 6
        assert context["b"] == 6

    def test_a_block_of_a_context_that_raises_writes_nothing(self, provider: Transacts, shop: str) -> None:
        context = Context(shop, provider)
        with pytest.raises(ZeroDivisionError), context.transaction() as tx:  # noqa: PT012
            tx["a"] = 1
            tx["b"] = 1 // 0
        assert (tx.status, context["a"]) == ("failed", 0)
        with context.transaction() as tx:
            tx["a"] = 1
            tx.abort()
        assert (tx.status, context["a"]) == ("aborted", 0)
        with context.transaction() as tx:
            tx["a"] = 1
            assert tx.commit() == tx.commit_sequence
            with pytest.raises(ENDED) as caught:
                tx["a"] = 2
        assert (tx.status, context["a"]) == ("committed", 1)
        # Whoever writes `with ctx.transaction()` knows nothing of executions.
        assert str(caught.value).startswith("the transaction has ended (committed): ")
        assert "execution" not in str(caught.value)

    @pytest.mark.parametrize("end", ["block", "commit", "abort", "error"])
    def test_closing_the_context_in_a_block_writes_nothing(self, provider: Transacts, shop: str, end: str) -> None:
        context = Context(shop, provider)
        expected = ZeroDivisionError if end == "error" else ContextClosedError

        def use() -> None:
            with context.transaction() as tx:
                tx["a"] = 1
                context.close()
                with pytest.raises(ContextClosedError):
                    tx["a"] = 2
                if end == "error":
                    tx["b"] = 1 // 0
                elif end != "block":
                    getattr(tx, end)()

        with contextlib.nullcontext() if end == "abort" else pytest.raises(expected):
            use()
        assert (provider.get_value(shop, "a"), context.closed) == (0, True)

    def test_closing_the_context_in_an_asynchronous_block(self, provider: Transacts, shop: str) -> None:
        async def use() -> None:
            context = await Context.aopen(shop, provider)
            async with context.transaction() as tx:
                await tx.set.aio("a", 1)
                await context.aclose()
                with pytest.raises(ContextClosedError):
                    await tx.get.aio("a")

        with pytest.raises(ContextClosedError):
            asyncio.run(use())
        assert provider.get_value(shop, "a") == 0

    def test_a_block_is_repeated_after_conflicts(self, provider: Transacts, shop: str) -> None:
        context, attempts = Context(shop, provider), []
        for tx in context.transactions(retries=3):
            with tx:
                attempts.append(tx.attempt)
                tx["b"] = tx["a"]
                if tx.attempt < 3:
                    context["a"] += 1
        assert (attempts, context["b"]) == ([1, 2, 3], 2)
        with pytest.raises(errors.ExecutionConflictError):  # noqa: PT012
            for tx in context.transactions(retries=1):
                with tx:
                    attempts.append(tx.attempt)
                    tx["b"] = tx["a"]
                    context["a"] += 1
        assert (attempts, context["b"]) == ([1, 2, 3, 1, 2], 2)

    def test_many_blocks_at_once_lose_nothing(self, provider: Transacts, shop: str) -> None:
        context = Context(shop, provider)

        def add() -> None:
            for tx in context.transactions(retries=1000):
                with tx:
                    tx["a"] += 1
                    tx["b"] = tx["a"]

        with ThreadPoolExecutor(4) as pool:
            for future in [pool.submit(add) for _ in range(12)]:
                future.result(DEADLINE_S)
        assert (context["a"], context["b"]) == (12, 12)

    def test_an_asynchronous_block(self, provider: Transacts, shop: str) -> None:
        async def run() -> int:
            async with Context.aopen(shop, provider) as context:
                async with context.transaction() as tx:
                    await tx.set.aio("a", 1)
                    assert (await tx.get.aio("a"), await context.get.aio("a")) == (1, 0)
                    assert await tx.call.aio("add", amount=5) == 6
                    assert [entry.version for entry in await tx.history.aio("a")] == [2, 1, 0]
                with pytest.raises(ZeroDivisionError):
                    async with context.transaction() as failed:
                        await failed.set.aio("b", 1 // 0)
                for each in context.transactions(retries=1):
                    async with each:
                        await each.set.aio("b", await each.get.aio("a"))
                        if each.attempt == 1:
                            await context.set.aio("a", 7)
                assert (failed.status, each.attempt) == ("failed", 2)

                async def add() -> None:
                    for again in context.transactions(retries=1000):
                        async with again:
                            await again.set.aio("c", await again.get.aio("c") + 1)

                await asyncio.gather(*(add() for _ in range(10)))
                return int(await context.get.aio("c"))

        assert asyncio.run(run()) == 10
        assert (provider.get_value(shop, "a"), provider.get_value(shop, "b")) == (7, 7)

    def test_many_asynchronous_blocks_in_a_session_that_queues(self, provider: Transacts, shop: str) -> None:
        async def run() -> None:
            async with Context.aopen(shop, provider, metadata={"dspex.concurrency": "queue"}) as context:

                async def add() -> None:
                    async with context.transaction() as tx:
                        await tx.update.aio("a", lambda value: value + 1)

                await asyncio.gather(*(add() for _ in range(40)))

        asyncio.run(run())
        assert provider.get_value(shop, "a") == 40

    def test_a_block_needs_a_new_transaction_on_an_open_context(self, provider: Transacts, shop: str) -> None:
        context = Context(shop, provider)
        tx = context.transaction()
        with pytest.raises(errors.InvalidArgumentError, match="has not begun"):
            tx["a"] = 1
        with tx:
            tx["a"] = 1
        with pytest.raises(errors.InvalidArgumentError, match="each block needs a new one"), tx:
            pass
        context.close()
        with pytest.raises(ContextClosedError), context.transaction():
            pass

    # Arguments

    def test_an_unknown_session_has_none(self, provider: Transacts) -> None:
        with pytest.raises(errors.SessionNotFoundError):
            provider.begin_transaction("unknown")

    @pytest.mark.parametrize(
        ("options", "field"),
        [
            ({"isolation": "chaos"}, "isolation"),
            ({"isolation": None}, "isolation"),
            ({"timeout_s": 0}, "timeout_s"),
            ({"timeout_s": float("nan")}, "timeout_s"),
            ({"timeout_s": "1"}, "timeout_s"),
            ({"origin": "ada"}, "origin"),
            ({"metadata": {"idempotency_key": "k"}}, "idempotency_key"),
        ],
    )
    def test_wrong_options(self, provider: Transacts, shop: str, options: dict[str, Any], field: str) -> None:
        with pytest.raises(errors.InvalidArgumentError) as caught:
            provider.begin_transaction(shop, **options)
        assert caught.value.field == field

    def test_arguments_of_a_wrong_type(self, provider: Transacts, shop: str) -> None:
        untyped = cast(Any, provider)
        for wrong, _ in WRONG_TEXTS:
            with pytest.raises(errors.InvalidArgumentError, match="session_id"):
                untyped.begin_transaction(wrong)
        for wrong, _ in WRONG_METADATA:
            with pytest.raises(errors.InvalidArgumentError, match="metadata"):
                untyped.begin_transaction(shop, metadata=wrong)
