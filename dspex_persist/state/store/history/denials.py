"""Read the refused calls of a file."""

from typing import Final

from sqlalchemy import Connection

from dspex_persist.clock import nearest_time, now, to_micros
from dspex_persist.state.audit import DenialQuery, PointLike, is_glob, parse_point
from dspex_persist.state.denials import Denial
from dspex_persist.state.store.history.points import resolve
from dspex_persist.state.store.history.rows import Conditions, all_rows, first_row, glob_pattern

UNKNOWN: Final = "-"
_COLUMNS: Final = "at, last_at, identity, peer, rpc, session_id, missing, count"


def denials_of(connection: Connection, query: DenialQuery) -> tuple[Denial, ...]:
    """Return the refused calls that a query asks for."""
    conditions = Conditions()
    if query.since:
        conditions.add("last_at > ?", _moment(connection, query.since, "since"))
    if query.until:
        conditions.add("at <= ?", _moment(connection, query.until, "until"))
    for column, wanted in (("session_id", query.session), ("peer", query.peer), ("identity", query.identity)):
        if is_glob(wanted):
            conditions.add(f"{column} GLOB ?", glob_pattern(wanted))
        elif (column, wanted) == ("identity", UNKNOWN):
            conditions.add("identity = ''")
        else:
            conditions.add_equal(column, wanted)
    if query.rpc:
        conditions.add("('.' || rpc) GLOB ?", f"*.{glob_pattern(query.rpc)}")
    order = "DESC" if query.newest_first else ""
    statement = f"SELECT {_COLUMNS} FROM denials{conditions} ORDER BY last_at {order}, denial_key {order} LIMIT ?"
    rows = all_rows(connection, statement, *conditions.parameters, query.limit or -1)
    return tuple(Denial(nearest_time(at), nearest_time(last_at), *rest) for at, last_at, *rest in rows)


def _moment(connection: Connection, point: PointLike, option: str) -> int:
    parsed = parse_point(point, now(), option)
    if parsed.at is not None:
        return to_micros(parsed.at) - parsed.before
    if parsed.sequence is None and not parsed.execution_id:
        return to_micros(now())
    row = first_row(
        connection, "SELECT created_at FROM commits WHERE sequence = ?", resolve(connection, point, option, "")
    )
    return 0 if row is None else int(row[0])
