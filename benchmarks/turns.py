"""What something costs that can be left out: the same calls without and with it, in turn."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from typing import Final

import grpc

from benchmarks.load import Series, Slice, joined, ratios_of
from benchmarks.plan import Plan
from benchmarks.rpc import Calls, Rpc
from benchmarks.table import Row

_TURNS: Final = 4
"""How often the two take turns in a round: the difference is smaller than what else happens on a machine."""

Both = tuple[Series, Series]
"""The calls without and with it."""


def turns(plan: Plan) -> Iterator[tuple[int, float]]:
    """Yield whose turn it is in a round, 0 or 1, and for how many seconds."""
    for turn in range(_TURNS):
        # The second of two may find the disk busy with what the first has written.
        for which in (0, 1) if turn % 2 else (1, 0):
            yield which, plan.slice_s / _TURNS


def take(both: Both, parts: list[tuple[int, Slice]]) -> None:
    """Add to both what each has done in its turns of a round."""
    for which, each in enumerate(both):
        each.slices.append(joined([part for number, part in parts if number == which]))


async def call_in_turn(plan: Plan, ports: Sequence[int], new_rpc: Callable[[], Rpc], in_flight: int) -> Both:
    """Call the servers at two ports in turn, round by round; each has an rpc of its own."""
    both = Series(), Series()
    async with AsyncExitStack() as stack:
        calls = []
        for port in ports:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{port}"))
            calls.append(Calls(channel, new_rpc(), in_flight))
            if plan.warm_s:
                await calls[-1].run(plan.warm_s)
        for _ in range(plan.rounds):
            take(both, [(which, await calls[which].run(seconds)) for which, seconds in turns(plan)])
    return both


def rows(section: str, key: str, what: str, unit: str, extra: str, both: Both) -> list[Row]:
    """Return the row without, whose key begins with "un", and the one with `extra` and their ratio."""
    without, costing = both
    base = Row.of_rounds(f"{section}.un{key}", what, unit, without.rates)
    ratios = ratios_of(costing.rates, without.rates)
    return [
        base,
        Row.of_rounds(f"{section}.{key}", f"... with {extra}", unit, costing.rates, ratios, ratio_to=base.key),
    ]
