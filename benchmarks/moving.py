"""Moves of a session from memory or a server to a file: how long its callers have to wait."""

import sys
from itertools import count
from pathlib import Path
from typing import Final

from benchmarks.plan import Plan
from benchmarks.rpc import start_server
from benchmarks.table import Row, Target
from dspex_persist import Context

_VARIABLES: Final = 100
"""Variables of the session with many versions."""
_PATIENCE_S: Final = 30


def measure(plan: Plan, folder: Path) -> list[Row]:
    """Move sessions, each to a new file, and check what has arrived."""
    files = (folder / f"moved{number}.db" for number in count())
    # One-time work of the process, such as imports, happens before the first round.
    _move_variables(2, next(files))
    waits_ms: list[float] = []
    away_ms: list[float] = []
    rates: list[float] = []
    for number in range(plan.linear_rounds):
        print(f"cognitive: moves, round {number + 1} of {plan.linear_rounds}", file=sys.stderr, flush=True)
        waits_ms.append(1000 * _move_variables(plan.moved_variables, next(files)))
        away_ms.append(1000 * _move_away(plan.moved_variables, next(files), next(files)))
        rates.append(plan.moved_versions / _move_versions(plan.moved_versions, next(files)))
    return [
        Row.of_rounds(
            "cognitive.move.variables",
            f"move of {plan.moved_variables:,} variables, memory to a file",
            "ms",
            waits_ms,
            target=Target("value", "at most", 50),
        ),
        Row.of_rounds(
            "cognitive.move.away",
            f"move of {plan.moved_variables:,} variables, a server to a file",
            "ms",
            away_ms,
        ),
        Row.of_rounds(
            "cognitive.move.versions",
            f"move of {plan.moved_versions:,} versions, memory to a file",
            "versions/s",
            rates,
        ),
    ]


def _move_variables(variables: int, path: Path) -> float:
    """Move a session whose variables were defined one by one; return for how long callers waited, in seconds."""
    with Context("bench-move") as ctx:
        for number in range(variables):
            ctx.define(f"v{number:04d}", number / 4)
        return _move(ctx, path)


def _move_away(variables: int, served: Path, path: Path) -> float:
    """Do the same with a session on a server."""
    with start_server(served) as process:
        with Context("bench-move", f"grpc://127.0.0.1:{process.port}") as ctx:
            for number in range(variables):
                ctx.define(f"v{number:04d}", number / 4)
            took_s = _move(ctx, path)
        process.terminate(_PATIENCE_S)
    return took_s


def _move_versions(versions: int, path: Path) -> float:
    """Do the same with a session of many versions, a hundred to a commit."""
    with Context("bench-move") as ctx:
        ctx.define_many({f"v{number:02d}": 0.0 for number in range(_VARIABLES)})
        for commit in range(1, versions // _VARIABLES):
            ctx.update_many({f"v{number:02d}": commit / 4 for number in range(_VARIABLES)})
        return _move(ctx, path)


def _move(ctx: Context, path: Path) -> float:
    before = ctx.get_many()
    ctx.move_to(path)
    (switch,) = ctx.backend.switches
    if ctx.get_many() != before or switch.variables != len(before):
        raise RuntimeError(f"{switch} arrived, and not {len(before)} variables")
    return switch.took_s
