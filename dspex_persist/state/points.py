"""Points of a history, and which of several sessions lived then: what all audit sources share."""

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import NamedTuple

from dspex_persist import clock
from dspex_persist.state.audit import PointLike, parse_point
from dspex_persist.state.errors import InvalidArgumentError, quote


class Life(NamedTuple):
    """A session: the numbers of the commits that began and ended it (None while it lives), and when it began."""

    began: int
    ended: int | None
    created_at: datetime


def resolve_point(
    point: PointLike, option: str, head: int, of_execution: Callable[[str], int], until: Callable[[datetime], int]
) -> int:
    """Return the number of the last commit up to a point; 0 if that is before the first.

    Args:
        point: The point.
        option: The name of the argument, for errors.
        head: The number of the newest commit.
        of_execution: Returns the commit that ended an execution, or that began it while it runs.
        until: Returns the last commit up to a time.

    Raises:
        InvalidArgumentError: It is not a point, or names a commit that is not there yet.
    """
    parsed, sequence = parse_point(point, clock.now(), option), head
    if parsed.execution_id:
        sequence = of_execution(parsed.execution_id)
    elif parsed.at is not None:
        sequence = until(parsed.at)
    elif parsed.sequence is not None:
        sequence = parsed.sequence
        if sequence > head:
            raise InvalidArgumentError(option, f"there is no commit {sequence} yet; the newest is {head}")
    return max(sequence - 1, 0) if parsed.before else sequence


def living_at(session: str, lives: Sequence[Life], sequence: int) -> int:
    """Return which of the sessions with an id was live at a commit, as an index into `lives`.

    Args:
        session: The id.
        lives: The sessions that had it, oldest first.
        sequence: The commit.

    Raises:
        InvalidArgumentError: None of them was.
    """
    for place in reversed(range(len(lives))):
        began, ended, _ = lives[place]
        if began <= sequence and (ended is None or ended > sequence):
            return place
    if sequence < lives[0].began:
        raise not_begun(session, lives[0])
    spans = ", ".join(f"from commit {began} to {'now' if ended is None else ended}" for began, ended, _ in lives)
    ends = [ended for _, ended, _ in lives if ended is not None]
    hint = f"; {ends[-1]}^ is right before it ended" if ends else ""
    raise InvalidArgumentError("at", f"session {quote(session)} was not live at commit {sequence}, but {spans}{hint}")


def not_begun(session: str, life: Life) -> InvalidArgumentError:
    """Return the error for a point before a session began."""
    when = f"{life.created_at:%Y-%m-%d %H:%M:%S} UTC"
    reason = f"session {quote(session)} had not begun by then; it began at commit {life.began}, {when}"
    return InvalidArgumentError("at", reason)
