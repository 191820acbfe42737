"""Checking a whole log: that no commit is missing or was changed, and that what is current follows from it."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from dspex_persist.state.errors import DamagedSessionError
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.valkey import codec
from dspex_persist.state.valkey.chain import GENESIS, link
from dspex_persist.state.valkey.keys import Keys
from dspex_persist.state.valkey.reads import Reads

_PAGE: Final = 200


class Problem(NamedTuple):
    """Something that is not as it was stored: where, and what."""

    where: str
    what: str


class Verification:
    """A check of everything up to the commit that was the last one when it began. Servers may write meanwhile.

    Args:
        reads: Reads the store.
        keys: The names of the keys.
        progress: Called now and then with how many commits were checked, and how many there are.

    Attributes:
        commits: How many commits were checked.
    """

    def __init__(self, reads: Reads, keys: Keys, progress: Callable[[int, int], object] = lambda _, __: None) -> None:
        self._reads, self._keys, self._client = reads, keys, reads.client
        self._progress = progress
        self.commits = 0
        self._hash = GENESIS
        self._entries: Counter[str] = Counter()
        self._live: dict[int, str] = {}

    def problems(self) -> Iterator[Problem]:
        """Yield what is wrong, as it is found; nothing if everything is sound.

        Raises:
            redis.RedisError: The store cannot be read.
        """
        sequence, hash_ = self._client.hmget(self._keys.head, ("sequence", "hash"))
        last = int(sequence or 0)
        after = 0
        while rows := self._log_after(after, last):
            for number, row in rows:
                until = int(number.split(b"-")[0])
                since = int(row.get(b"f", until))
                if since != after + 1:
                    yield Problem(f"commit {after + 1}", f"commits {after + 1} to {since - 1} are missing")
                yield from self._range(int(row[b"s"]), since, until, row[b"h"])
                self._note_life(row)
                after = until
            self._progress(after, last)
        if after != last:
            yield Problem(f"commit {after + 1}", f"commits {after + 1} to {last} are missing")
        elif last and self._hash != hash_:
            yield Problem(f"commit {last}", "the head has another hash than the last commit")
        yield from self._beyond()
        yield from self._strays(last)
        yield from self._current()

    def _log_after(self, after: int, last: int) -> Sequence[Any]:
        start = f"({after}-0" if after else "-"
        rows: Sequence[Any] = self._client.xrange(self._keys.log, start, f"{last}-0", count=_PAGE) if last else []
        return rows

    def _note_life(self, row: Mapping[bytes, bytes]) -> None:
        first = int(row[b"s"])
        if b"e" in row:
            self._live.pop(first, None)
        else:
            self._live[first] = codec.text_in(row[b"i"])

    # The chain

    def _range(self, first: int, since: int, until: int, expected: bytes) -> Iterator[Problem]:
        """Check the commits of one session from `since` to `until`, which are all that the log has in between."""
        for begin in range(since, until + 1, _PAGE):
            end = min(begin + _PAGE - 1, until)
            rows = dict(self._client.xrange(self._keys.commits(first), f"{begin}-0", f"{end}-0"))
            for sequence in range(begin, end + 1):
                yield from self._commit(first, sequence, rows.get(f"{sequence}-0".encode()))
        if self._hash != expected:
            yield Problem(f"commit {until}", "the log has another hash than the commit")

    def _commit(self, first: int, sequence: int, row: Mapping[bytes, bytes] | None) -> Iterator[Problem]:
        where = f"commit {sequence}"
        self.commits += 1
        if row is None:
            yield Problem(where, "it is missing")
            return
        self._entries[self._keys.commits(first)] += 1
        try:
            number, own_first, *_, versions = json.loads(row[b"c"])
            names = [self._keys.versions(first, variable_id) for variable_id, _ in versions]
            ids = [codec.version_id(version) for _, version in versions]
        except (LookupError, TypeError, ValueError):
            yield Problem(where, "it cannot be read")
            self._hash = row.get(b"h", b"")
            return
        if (number, own_first) != (sequence, first):
            yield Problem(where, f"it says that it is commit {number} of the session that began with {own_first}")
        parts = [row[b"c"], row.get(b"e", b"")]
        found = self._reads.pipelined(("xrange", name, id_, id_) for name, id_ in zip(names, ids, strict=True))
        for name, id_, entries in zip(names, ids, found, strict=True):
            self._entries[name] += 1
            if not entries:
                yield Problem(where, f"entry {id_} of {name} is missing")
                continue
            parts += (entries[0][1][field] for field in (b"f", b"j", b"b") if field in entries[0][1])
        if link(self._hash, parts) != row.get(b"h"):
            yield Problem(where, "its content, or that of a version, does not match its hash")
        self._hash = row.get(b"h", b"")

    def _beyond(self) -> Iterator[Problem]:
        """Look for commits in the log that are after the one that the head names."""
        # In this order: a group moves both at once.
        newest = self._client.xrevrange(self._keys.log, "+", "-", count=1)
        last = int(self._client.hget(self._keys.head, "sequence") or 0)
        until = int(newest[0][0].split(b"-")[0]) if newest else 0
        if until > last:
            yield Problem("the head", f"it ends the log at commit {last}, but the log goes on to commit {until}")

    def _strays(self, last: int) -> Iterator[Problem]:
        """Look for entries that no commit has."""
        names = list(self._entries)
        lengths = list(self._reads.pipelined(("xlen", name) for name in names))
        for name, length in zip(names, lengths, strict=True):
            # Servers may have written since.
            if length > self._entries[name] and self._is_older(name, last, length - self._entries[name]):
                yield Problem(name, f"it has {length} entries, and {self._entries[name]} are of commits")

    def _is_older(self, name: str, last: int, most: int) -> bool:
        rows = self._client.xrevrange(name, "+", "-", count=most + 1)
        return any(_sequence_in(row) <= last for _, row in rows[:most])

    # What is current

    def _current(self) -> Iterator[Problem]:
        known = {codec.text_in(each): int(first) for each, first in self._client.hgetall(self._keys.live).items()}
        for first, session_id in self._live.items():
            where = f"session {session_id}"
            if known.get(session_id) != first and self._newest(first) is not None:
                if not self._has_ended(first):
                    yield Problem(where, "it has not ended, and is not among the live ones")
                continue
            fault = self._fault_of(session_id, first)
            # A server may have written to it in between.
            if fault and self._fault_of(session_id, first):
                yield Problem(where, fault)

    def _newest(self, first: int) -> Any:
        rows = self._client.xrevrange(self._keys.commits(first), "+", "-", count=1)
        return rows[0][1] if rows else None

    def _has_ended(self, first: int) -> bool:
        row = self._newest(first)
        return row is not None and b'"session_ended"' in row.get(b"e", b"")

    def _fault_of(self, session_id: str, first: int) -> str:
        """Return what of a session does not follow from its history; "" if all of it does."""
        try:
            state = self._reads.load(session_id)
        except DamagedSessionError as error:
            return str(error.reason)
        if state is None or state.session.sequence != first:
            return ""
        row = self._newest(first)
        if row is None or json.loads(row[b"c"])[0] != state.sequence:
            return f"its last commit is not {state.sequence}"
        return self._wrong_variable(state)

    def _wrong_variable(self, state: SessionState) -> str:
        first = state.session.sequence
        wanted = [(each.id, each.version) for each in state.variables.values()]
        for variable, stored in zip(state.variables.values(), self._reads.versions(first, wanted), strict=True):
            expected = None if stored is None else stored.variable(None)
            if expected is None or expected._replace(optimization=None) != variable._replace(optimization=None):
                return f"variable {variable.name} is not as its version {variable.version} left it"
        return ""


def _sequence_in(row: Mapping[bytes, bytes]) -> int:
    """Return the commit that an entry says it is of; 0 if it says none."""
    try:
        document = json.loads(row[b"c"] if b"c" in row else row[b"f"])
        return int(document[0] if b"c" in row else document[9])
    except (LookupError, TypeError, ValueError):
        return 0
