"""Programs in tools and transactions: what they read is part of those, in memory, on a file, and on a real server."""

import asyncio
import copy
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from dspex_persist import Context, EmbeddedState, LocalState, StateProvider, ToolContext, tool
from dspex_persist.errors import ExecutionConflictError
from dspex_persist.state.abilities import Recordable
from dspex_persist.testing.server import ServedDatabase
from tests.deadline import within
from tests.late import Late
from tests.receiver import Receiver, lm_on

DEADLINE_S = within(20)
dspy, ours = Late("dspy"), Late("dspex_persist.dspy")
snapshots = Late("dspex_persist.cognitive.dspy.snapshots")


@pytest.fixture(scope="module", params=["memory", "file", "server"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StateProvider | str]:
    path = tmp_path_factory.mktemp("binding") / "bound.db"
    if request.param == "memory":
        with LocalState() as state:
            yield state
    elif request.param == "file":
        with EmbeddedState(path) as state:
            yield state
    else:
        with ServedDatabase(path) as served:
            yield f"grpc://{served.target}"


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    with dspy.context(lm=lm_on(receiver)):
        yield receiver


@tool(retries=1)
def ask(ctx: ToolContext, question: str) -> str:
    program = PROGRAMS[ctx.session_id]
    ctx["answers"] += 1
    return str(program(question=question).answer)


@tool(retries=1)
async def ask_later(ctx: ToolContext, question: str) -> str:
    ctx["answers"] += 1
    return str((await PROGRAMS[ctx.session_id].acall(question=question)).answer)


@tool(retries=1)
def ask_many(ctx: ToolContext, question: str) -> str:
    ctx["answers"] += 1
    examples = [dspy.Example(question=question).with_inputs("question")] * 2
    return str(PROGRAMS[ctx.session_id].batch(examples, num_threads=2, disable_progress_bar=True)[0].answer)


@tool(retries=1)
def ask_in_threads(ctx: ToolContext, question: str) -> str:
    """Each thread makes an outermost call."""
    ctx["answers"] += 1
    program = PROGRAMS[ctx.session_id]
    dspy.Parallel(num_threads=2, disable_progress_bar=True)([(program, {"question": question})])
    found: list[Any] = []
    lm = dspy.settings.lm
    thread = threading.Thread(target=lambda: found.append(program(question=question, lm=lm)))
    thread.start()
    thread.join()
    return str(found[0].answer)


@tool
def ask_for_itself(ctx: ToolContext, question: str) -> str:
    """A copy of the program is bound to the tool's own context."""
    ctx["temperature"] = 0.7
    program = ours.bind(copy.copy(PROGRAMS[ctx.session_id]), ctx, temperature="temperature")
    return str(program(question=question).answer)


@tool
def ask_inside(ctx: ToolContext, question: str) -> str:
    ctx["temperature"] = 0.7
    return str(ctx.call("ask", question=question))


PROGRAMS: dict[str, Any] = {}


@pytest.fixture
def ctx(place: StateProvider | str) -> Iterator[Context]:
    tools = [ask, ask_later, ask_many, ask_in_threads, ask_for_itself, ask_inside]
    on_server = isinstance(place, str)
    with Context(f"binding-{uuid.uuid4().hex}", "local" if on_server else place, tools=tools) as ctx:
        ctx.define_many({"temperature": 0.3, "answers": 0})
        if on_server:
            # Its tools go along, and run here.
            ctx.ensure_bridged(str(place))
        PROGRAMS[ctx.session_id] = ours.bind(dspy.Predict("question -> answer"), ctx, temperature="temperature")
        yield ctx


def reads_of(ctx: Context) -> dict[str, int]:
    """The variables that the last execution has read, with their versions."""
    _, commits = Recordable.of(ctx._backend.provider).record(ctx.session_id)
    bodies = [event.body for commit in commits for event in commit.events if "reads" in event.body]
    return {name: version for name, _, version in bodies[-1]["reads"].values()}


def change_once(receiver: Receiver, place: StateProvider | str, ctx: Context) -> None:
    """Have somebody else change the temperature while the LM is called for the first time."""

    def change() -> None:
        receiver.before = lambda: None
        with Context(ctx.session_id, place) as other:
            other["temperature"] = 0.5

    receiver.before = change


@pytest.mark.parametrize("name", ["ask", "ask_later", "ask_many", "ask_in_threads"])
def test_what_a_program_reads_in_a_tool_is_read_by_the_tool(
    name: str, ctx: Context, place: StateProvider | str, receiver: Receiver
) -> None:
    assert ctx.call(name, question="x") == "42"
    assert reads_of(ctx)["temperature"] == 0
    count = len(receiver.temperatures)
    assert receiver.temperatures == [0.3] * count
    change_once(receiver, place, ctx)
    ctx.call(name, question="x")
    # The first attempt conflicted.
    assert sorted(map(str, receiver.temperatures[count:])) == ["0.3"] * count + ["0.5"] * count
    assert reads_of(ctx)["temperature"] == 1
    assert ctx["answers"] == 2


def test_a_program_in_a_tool_sees_what_the_tool_wrote(ctx: Context, receiver: Receiver) -> None:
    ctx.call("ask_for_itself", question="x")
    ctx["temperature"] = 0.3
    ctx.call("ask_inside", question="x")
    assert receiver.temperatures == [0.7, 0.7]


def test_a_tool_that_a_program_calls_reads_for_itself(
    ctx: Context, place: StateProvider | str, receiver: Receiver
) -> None:
    class Calls(dspy.Module):
        def forward(self, question: str) -> Any:
            ctx["temperature"] = 0.6
            ctx.call("ask", question=question)
            return dspy.Predict("question -> answer")(question=question)

    ours.bind(Calls(), ctx, temperature="temperature")(question="x")
    assert receiver.temperatures == [0.6, 0.3]


def test_a_transaction_conflicts_over_what_a_program_read(
    ctx: Context, place: StateProvider | str, receiver: Receiver
) -> None:
    program = PROGRAMS[ctx.session_id]
    with ctx.transaction() as tx:
        tx["answers"] += 1
        tx["temperature"] = 0.2
        program(question="x")
    assert receiver.temperatures == [0.2]
    ctx["temperature"] = 0.3
    change_once(receiver, place, ctx)
    with pytest.raises(ExecutionConflictError), ctx.transaction() as tx:  # noqa: PT012 -- at the end of the block
        tx["answers"] += 1
        program(question="x")
    assert receiver.temperatures == [0.2, 0.3]
    for tx in ctx.transactions():
        with tx:
            tx["answers"] += 1
            program.batch([dspy.Example(question="x").with_inputs("question")], disable_progress_bar=True)
            dspy.Parallel(disable_progress_bar=True)([(program, {"question": "x"})])
    assert reads_of(ctx)["temperature"] == 3
    assert receiver.temperatures[2:] == [0.5, 0.5]


def test_the_code_after_a_transaction_reads_what_is_current(
    ctx: Context, place: StateProvider | str, receiver: Receiver
) -> None:
    program = PROGRAMS[ctx.session_id]
    with ctx.transaction() as tx:
        program(question="x")
        tx.commit()
        ctx["temperature"] = 0.6
        program(question="x")
    program(question="x")
    assert receiver.temperatures == [0.3, 0.6, 0.6]


def test_other_sessions_are_read_as_usual(ctx: Context, place: StateProvider | str, receiver: Receiver) -> None:
    with Context(f"{ctx.session_id}-2", place) as other, ctx.transaction() as tx:
        other["temperature"] = 0.9
        tx["temperature"] = 0.1
        ours.bind(dspy.Predict("question -> answer"), other, temperature="temperature")(question="x")
    with Context(ctx.session_id) as namesake, ctx.transaction() as tx:
        # The session of this name is on another backend.
        namesake["temperature"] = 0.8
        tx["temperature"] = 0.1
        ours.bind(dspy.Predict("question -> answer"), namesake, temperature="temperature")(question="x")
    assert receiver.temperatures == [0.9, 0.8]


def test_reads_from_asyncio_do_not_block_the_loop(ctx: Context, place: StateProvider | str, receiver: Receiver) -> None:
    program = PROGRAMS[ctx.session_id]

    async def in_transaction() -> None:
        async with ctx.transaction() as tx:
            await tx.set.aio("temperature", 0.2)
            await program.acall(question="x")

    async def run() -> None:
        held, free = threading.Event(), threading.Event()

        def hold() -> None:
            with ctx._backend.gate.hold():
                held.set()
                assert free.wait(DEADLINE_S)

        holder = threading.Thread(target=hold)
        holder.start()
        assert await asyncio.to_thread(held.wait, DEADLINE_S)
        call = asyncio.create_task(program.acall(question="x"))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not call.done()
        free.set()
        await asyncio.wait_for(call, DEADLINE_S)
        await asyncio.to_thread(holder.join)
        await in_transaction()

    asyncio.run(run())
    assert receiver.temperatures == [0.3, 0.2]
    assert "temperature" in reads_of(ctx)


def test_used_and_predictor_say_what_the_running_call_uses(ctx: Context, receiver: Receiver) -> None:
    found = []
    receiver.before = lambda: found.append((snapshots.used(), snapshots.predictor()))
    program = dspy.ChainOfThought("question -> answer")
    ours.bind(program, ctx, temperature="temperature")
    ctx["temperature"] = 0.4
    program(question="x")
    asyncio.run(program.acall(question="x"))
    ours.unbind(program)
    program(question="x")
    PROGRAMS[ctx.session_id](question="x")
    dspy.settings.lm("hello")
    assert found == [
        ({"temperature": 1}, "predict"),
        ({"temperature": 1}, "predict"),
        ({}, "predict"),
        ({"temperature": 1}, "self"),
        ({}, None),
    ]
