"""Recordings of sessions at an address: read from a file or a server, and imported into one."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspex_persist.addresses import DatabaseUrl
from dspex_persist.state.limits import Limits
from dspex_persist.state.provider import Progress, silent
from dspex_persist.wiring.connecting import bridged
from dspex_persist.wiring.databases import database_at
from dspex_persist.wiring.places import Address, place_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dspex_persist.state.recording import Header, RecordedCommit
    from dspex_persist.state.store.maintenance.transfer import ImportReport


@contextlib.contextmanager
def open_recording(
    url: Address, session_id: str, *, started: int | None = None, reveal: bool = False, **options: Any
) -> "Iterator[tuple[Header, Iterator[RecordedCommit]]]":
    """Read a session's whole log, as (header, commits). The commits are read lazily, while you iterate over them.

    A file is only read, so a server may have it open, and a backup works, too.

    Args:
        url: An address as for `open_audit`.
        session_id: The session.
        started: The number of the commit that began the session, if several sessions had this id; by default the
            newest of them.
        reveal: Include the values of sensitive variables. A server allows this only if it was started with
            `audit_reveal`.
        options: For a server only: `timeout_s` (seconds), `actor`.

    Raises:
        OpenError: The file is not a database of this package.
        NotInHistoryError: There never was such a session.
        InvalidArgumentError: The address is invalid.
    """
    place = place_of(url)
    if isinstance(place, Path):
        from dspex_persist.state.store import maintenance

        with maintenance.open_recording(place, session_id, started=started, reveal=reveal) as recording:
            yield recording
    elif isinstance(place, DatabaseUrl):
        with database_at(place).recording(session_id, started=started, reveal=reveal) as recording:
            yield recording
    else:
        with bridged(place, **options) as state:
            yield state.record(session_id, started=started, reveal=reveal)


def import_session(
    url: Address,
    lines: "Iterable[str]",
    *,
    name: str = "the recording",
    session_id: str | None = None,
    limits: Limits | None = None,
    progress: Progress = silent,
    **options: Any,
) -> "ImportReport":
    """Import a recorded session with its whole history into a database file, a database or a server, atomically.

    To import into a provider that is open, call its `import_session`.

    Args:
        url: An address as for `open_audit`. A file is created if missing, and this process owns it during the import.
        lines: The lines of the recording.
        name: The name of the recording in errors.
        session_id: The id of the imported session; by default its recorded id.
        limits: The limits that the session must respect; a server has its own.
        progress: Is called with the progress.
        options: For a server only: `timeout_s` (seconds), `actor`.

    Raises:
        RecordingError: The recording is incomplete or invalid, or exceeds a limit.
        SessionExistsError: A live session has the id.
        OpenError: The file cannot be opened.
    """
    from dspex_persist.state.store.maintenance import transfer

    place = place_of(url)
    if not isinstance(place, Path):
        if isinstance(place, DatabaseUrl):
            opened: Any = database_at(place).connect(**({} if limits is None else {"limits": limits}), **options)
        else:
            opened = bridged(place, **options)
        with opened as state:
            where = str(place if isinstance(place, DatabaseUrl) else url)
            return transfer.import_into(state, where, lines, name=name, session_id=session_id, progress=progress)
    from dspex_persist.state.store.session_store import StoreOptions

    store_options = StoreOptions(limits=limits or Limits())
    return transfer.import_session(
        place, lines, name=name, session_id=session_id, options=store_options, progress=progress
    )
