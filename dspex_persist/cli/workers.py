"""dspex-persist workers: the processes in which a running server's tools run."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from dspex_persist.cli.groups import Json, carry_out
from dspex_persist.cli.output import counted, new_table, one_line, say
from dspex_persist.cli.places import url_of

if TYPE_CHECKING:
    from dspex_persist.infra.workers.statistics import PoolStatistics

HELP: Final = (
    "List the processes in which the tools of a running server run, pool by pool.\n\n"
    "With --json, also what each pool has counted since the start of the server."
)
EPILOG: Final = (
    "[bold]Examples[/bold]\n\n"
    "dspex-persist workers --target 127.0.0.1:50051\n\n"
    "watch -n 1 dspex-persist workers --target unix:/run/dspex.sock\n\n"
)
_MIB: Final = 1024 * 1024

Target = Annotated[
    str,
    typer.Option("--target", metavar="ADDRESS", help="The running server: HOST:PORT, unix:PATH or its URL."),
]


def workers(target: Target = "127.0.0.1:50051", as_json: Json = False) -> None:
    """List the workers."""
    url = url_of(target)

    def work(_: object) -> dict[str, Any]:
        from dspex_persist.wiring.connecting import list_workers

        pools = list_workers(url)
        return {"pools": [asdict(pool) for pool in pools] if as_json else pools}

    carry_out(as_json, work, lambda report: _show(report["pools"]))


def _show(pools: "Sequence[PoolStatistics]") -> None:
    if not pools:
        say("the server runs its tools itself: serve --workers starts workers")
    for pool in pools:
        beyond = f", {counted(pool.spares, 'spare')}" if pool.spares else ""
        waiting = f", {counted(pool.queued, 'call')} waiting" if pool.queued else ""
        title = f"{pool.pool}: {pool.state}, {pool.busy} of {counted(pool.size, 'worker')} busy{beyond}{waiting}"
        table = new_table(title, "worker", "pid", "state", "for", "calls", "memory", "age", "session", right=_RIGHT)
        for each in pool.workers:
            table.add_row(
                one_line(each.id),
                str(each.pid),
                f"{each.state}, spare" if each.spare else each.state,
                f"{each.busy_s:.1f} s" if each.state != "idle" else "",
                f"{each.requests:,}",
                f"{each.rss_bytes / _MIB:,.0f} MiB" if each.rss_bytes else "",
                f"{each.age_s:,.0f} s",
                one_line(each.key),
            )
        say(table)
        if pool.last_failure:
            say(f"last failure: {pool.last_failure}")


_RIGHT: Final = ("pid", "for", "calls", "memory", "age")
