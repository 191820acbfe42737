"""Clients that execute tools on one session concurrently, and record what each saw, when, and how it ended."""

import asyncio
import itertools
import math
import time
from random import Random

import grpc
import grpc.aio

from tests.concurrency.serializability import Operation, Status, Transaction
from tests.faults.bridge import CALL_TIMEOUT_S, Bridge, ToolAnswer, is_refusal

SESSION = "histories"
PAIRS, HOT = 3, 2
"""The number of pairs of lists for write skew, and of lists that all clients append to."""
NAMES = [*(f"{side}{pair}" for pair in range(PAIRS) for side in ("left", "right")), *(f"hot{n}" for n in range(HOT))]


async def set_up(bridge: Bridge) -> None:
    """Begin the session with empty lists."""
    await bridge.begin(SESSION)
    for name in NAMES:
        await bridge.register(SESSION, name, "string", "", {})


async def record(bridge: Bridge, *, clients: int, executions: int, seed: int, tool: str) -> list[Transaction]:
    """Return the history of concurrent clients with `executions` each; a last execution reads everything."""
    parts = await asyncio.gather(
        *(_record_one(bridge, number, executions, Random(f"{seed}/{number}"), tool) for number in range(clients))
    )
    # The last execution starts after all others have ended on the server, too.
    await asyncio.sleep(0.2)
    last = await _execute(bridge, tool, tuple(map(Operation, NAMES)), 0.0, CALL_TIMEOUT_S)
    return [*itertools.chain.from_iterable(parts), last]


async def _record_one(bridge: Bridge, number: int, executions: int, random: Random, tool: str) -> list[Transaction]:
    history = []
    for count in range(executions):
        operations = _draw(random, f"{number}.{count}")
        # A few clients give up while the tool runs, so they do not know its outcome.
        timeout_s = random.uniform(0.002, 0.03) if random.random() < 0.05 else CALL_TIMEOUT_S
        history.append(await _execute(bridge, tool, operations, random.choice([0.0, 0.001, 0.004]), timeout_s))
    return history


def _draw(random: Random, element: str) -> tuple[Operation, ...]:
    kind = random.random()
    if kind < 0.45:
        # An execution that reads both lists of a pair and appends to one is half of a write skew.
        pair = random.randrange(PAIRS)
        one, other = random.sample([f"left{pair}", f"right{pair}"], 2)
        return Operation(one), Operation(other), Operation(one, element)
    if kind < 0.7:
        names = random.sample(NAMES, 3)
        return tuple(Operation(name, f"{element}.{place}") for place, name in enumerate((*names, names[0])))
    if kind < 0.85:
        return tuple(map(Operation, random.sample(NAMES, 4)))
    return (Operation(f"hot{random.randrange(HOT)}", element),)


async def _execute(
    bridge: Bridge, tool: str, operations: tuple[Operation, ...], pause_s: float, timeout_s: float
) -> Transaction:
    texts = [f"{each.name}+{each.element}" if each.element else each.name for each in operations]
    began = time.monotonic()
    try:
        answer = await bridge.execute(SESSION, tool, {"operations": texts, "pause_s": pause_s}, timeout_s=timeout_s)
    except grpc.aio.AioRpcError as error:
        status: Status = "failed" if is_refusal(error) else "unknown"
        return Transaction(operations, began, math.inf, status)
    ended = time.monotonic()
    if answer.code:
        assert answer.code in ("CONFLICT", "TIMED_OUT"), answer
        return Transaction(operations, began, ended, "failed")
    return Transaction(_with_results(operations, answer), began, ended, "ok")


def _with_results(operations: tuple[Operation, ...], answer: ToolAnswer) -> tuple[Operation, ...]:
    return tuple(
        each._replace(found=tuple(text.split(",")) if text else ())
        for each, text in zip(operations, answer.result, strict=True)
    )
