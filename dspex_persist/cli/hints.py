"""What to do next, in the words of the command line: its commands and options."""

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

# By the hint's id: nothing of the state layer is imported before an error is to be said.
IN_COMMANDS: "Final[Mapping[str, str]]" = {
    "another_file": "give another --db",
    "another_session_id": "use another id for the new one (of an import: --as ID), or end that session first",
    "another_tool_name": "use another name",
    "begin_session": "it was never begun, or has ended: begin it first",
    "check_file": (
        "look at it with `dspex-persist db check`, then open it again; to let several programs write, have them all "
        "use `dspex-persist serve`"
    ),
    "check_or_restore": "look at it with `dspex-persist db check`, or restore a backup with `dspex-persist db restore`",
    "close_first": "close it first",
    "close_watches": "end some and repeat",
    "connect_after_fork": (
        "start processes with multiprocessing's 'spawn'; those that share a database reach it through "
        "`dspex-persist serve`"
    ),
    "export_revealed": "export the session with --reveal",
    "keep_wal": "everything acknowledged is safe in {path}-wal: keep the two files together",
    "list_executions": "audit executions lists them",
    "list_versions": "audit history lists the versions that are left",
    "make_file": "`dspex-persist serve --db {path}` makes one",
    "make_tables": "`dspex-persist db upgrade --db {path}` makes its tables",
    "mend_file": "`dspex-persist db upgrade --db {path}` makes it whole",
    "name_backup": "name a copy that `dspex-persist db backup` has made",
    "new_key": "a key belongs to one request: use a new one",
    "open_again": "all that was acknowledged has been brought into the file: open it again",
    "prune_on_server": (
        "stop that server to prune it now, or have the server do it: with --target ADDRESS, or by itself with the "
        "settings retention_keep_versions, retention_age_s, retention_ended_sessions_s"
    ),
    "put_back_file": (
        "put back the file that it was, with its -wal, or restore a backup with `dspex-persist db restore`, and open "
        "it again; what was written since the last check may be lost"
    ),
    "read_again": "read it again and repeat",
    "read_only": "to read it all the same, use `dspex-persist audit` or `db check`, which only read",
    "record_from_backup": "export it from a backup that was made before, with --db BACKUP",
    "register_variables": "register them",
    "repeat_call": "repeat the command",
    "repeat_later": "repeat later",
    "repeat_when_back": "repeat the command when it is back",
    "repeat_with_key": "look at what is there before you repeat it",
    "restore_backup": (
        "restore a backup: dspex-persist db restore BACKUP --db {path}; or, to accept the loss, delete {path}.anchor "
        "and start again"
    ),
    "restore_over": "put a backup in place with dspex-persist db restore BACKUP --db {path}",
    "resume_watch": "go on with --since {after_sequence}",
    "run_again": "run it again",
    "running_execution": "name one that runs",
    "share_by_server": (
        "stop it, or use another --db. Several programs share one through a server: `dspex-persist serve`, and "
        "connect('grpc://HOST:PORT')"
    ),
    "upgrade_file": "`dspex-persist db upgrade --db {path}` upgrades it",
    "upgrade_package": "upgrade dspex-persist",
    "wait_for_optimizer": "wait until the optimization ends",
}
"""What a command says of an error."""


def text_of(error: BaseException | str) -> str:
    """What is true and what to do, for somebody at a command line."""
    from dspex_persist.state.errors import StateError
    from dspex_persist.wiring import StorageFailedError

    if isinstance(error, StorageFailedError):
        return error.in_words(text_of)
    return error.in_words(IN_COMMANDS) if isinstance(error, StateError) else str(error)
