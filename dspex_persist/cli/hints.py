"""Errors as the command line words them: it names commands and options."""

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Final

from dspex_persist.errors import DspexError

if TYPE_CHECKING:
    from collections.abc import Mapping

# By the hint's id, as the state layer is only imported once there is an error to report.
IN_COMMANDS: "Final[Mapping[str, str]]" = {
    "add_scope": "add the scope to its line in the token file of the server, or use another token",
    "ask_owner": "its owner, or an administrator, can add a rule",
    "another_file": "give another --db",
    "open_there": "open it there, and repeat the command",
    "another_session_id": "use another id for the new one (of an import: --as ID), or end that session first",
    "another_tool_name": "use another name",
    "begin_session": "it never began, or has ended: begin it first",
    "call_its_server": (
        "use the server that runs it; `dspex-persist serve --advertise HOST:PORT` on each server tells the others "
        "where that is"
    ),
    "call_less_often": "repeat in {retry_in_s:.2g} s, or raise rate= or inflight= on its line in the token file",
    "begin_database": (
        "`dspex-persist serve` begins a log there; if there is one elsewhere, name its schema (?schema=NAME) or prefix "
        "(?prefix=NAME) in --db"
    ),
    "check_address": (
        "see whether the database runs, and whether host, port, user, password and database in --db are right"
    ),
    "grant_create": "let this user create tables there (GRANT CREATE ON SCHEMA), at least until they are there",
    "grant_commands": "have this user allowed the keys, the channels and the commands that docs/valkey.md lists",
    "grant_access": "have the owner of its tables grant this user access to them, or name the owner in --db",
    "check_database": (
        "`dspex-persist db check` names what is wrong, while its servers go on; end the session, or put a copy of the "
        "database in its place"
    ),
    "check_file": (
        "check it with `dspex-persist db check`, then open it again; to let several programs write, have them all "
        "use `dspex-persist serve`"
    ),
    "check_or_restore": "check it with `dspex-persist db check`, or restore a backup with `dspex-persist db restore`",
    "close_first": "close it first",
    "close_watches": "end some of them and repeat",
    "connect_after_fork": (
        "start processes with multiprocessing's 'spawn'; those that share a database reach it through "
        "`dspex-persist serve`"
    ),
    "connect_plainly": "name it as grpc://HOST:PORT, or start it with --tls-cert and --tls-key",
    "connect_with_tls": "name it as grpcs://HOST:PORT",
    "connect_in_memory": "name a file with --db",
    "export_revealed": "export the session with --reveal",
    "keep_wal": "everything acknowledged is safe in {path}-wal: keep the two files together",
    "list_executions": "audit executions lists them",
    "list_versions": "audit history lists the remaining versions",
    "make_file": "`dspex-persist serve --db {path}` creates one",
    "make_tables": "`dspex-persist db upgrade --db {path}` creates its tables",
    "mend_file": "`dspex-persist db upgrade --db {path}` repairs it",
    "name_backup": "name a copy made by `dspex-persist db backup`",
    "name_certified_host": "name a host or an address that the certificate has (subjectAltName)",
    "new_key": "a key belongs to one request: use a new one",
    "new_transaction": "begin another one",
    "open_again": "everything acknowledged has been moved into the file: open it again",
    "prune_on_server": (
        "stop that server to prune it now, or have the server do it: with --target ADDRESS, or by itself with the "
        "settings retention_keep_versions, retention_age_s, retention_ended_sessions_s"
    ),
    "put_back_database": (
        "put the copy of the database that has them in its place; or, to accept the loss, end all its servers, delete "
        "their anchors (--anchor-dir), and start them again"
    ),
    "put_back_file": (
        "put the original file back, with its -wal, or restore a backup with `dspex-persist db restore`, and open "
        "it again; what was written since the last check may be lost"
    ),
    "raise_server_budget": "raise the server's setting max_tokens or max_cost, which holds for each of its sessions",
    "raise_session_budget": "raise the metadata dspex.{setting} of the session, a number or none",
    "raise_tool_budget": "raise it where the tool is defined: @tool(max_tokens=..., max_cost=...)",
    "read_again": "read it again and repeat",
    "read_only": "to read it anyway, use `dspex-persist audit` or `db check`, which only read",
    "record_from_backup": "export it from an earlier backup, with --db BACKUP",
    "register_variables": "register them",
    "renew_certificate": "compare its dates with this machine's clock, or renew it: the server reads the new file",
    "repeat_call": "repeat the command",
    "repeat_later": "repeat later",
    "repeat_when_back": "repeat the command when it is back",
    "repeat_with_key": "check what was written before you repeat it",
    "restore_backup": (
        "restore a backup: dspex-persist db restore BACKUP --db {path}; or, to accept the loss, delete {path}.anchor "
        "and start again"
    ),
    "restore_over": "put a backup in place with dspex-persist db restore BACKUP --db {path}",
    "resume_watch": "continue with --since {after_sequence}",
    "run_again": "run it again",
    "running_execution": "name a running one",
    "share_by_server": (
        "stop it, or use another --db. Several programs share one through a server: `dspex-persist serve`, and "
        "connect('grpc://HOST:PORT')"
    ),
    "same_user": "run it as the user of the server: it answers no others at this address",
    "send_token": "set DSPEX_PERSIST_TOKEN to a token of the server's token file",
    "show_certificate": (
        "if it demands certificates of clients, name this one's in DSPEX_PERSIST_CERT and its key in DSPEX_PERSIST_KEY"
    ),
    "store_less": (
        "end some of its sessions (`dspex-persist sessions end`), or prune their history (`db prune`), "
        "or raise sessions= or bytes= on its line in the token file"
    ),
    "trust_ca": "name the certificate of the one that issued it in DSPEX_PERSIST_CA",
    "upgrade_file": "`dspex-persist db upgrade --db {path}` upgrades it",
    "upgrade_package": "upgrade dspex-persist",
    "wait_for_optimizer": "wait until the optimization ends",
    "watch_anew": "run it again: it begins with the current values",
}
"""The advice of each hint, for a person at a command line."""

_OTHER_NAMES: Final = {
    "after_sequence": "since",
    "ended_before": "ended-sessions",
    "execution_id": "execution",
    "idempotency_key": "key",
    "metadata": "meta",
    "path": "db",
    "session_id": "session",
    "url": "db",
}
"""The options of arguments that the library calls by another name."""
_options: "Final[ContextVar[Mapping[str, str]]]" = ContextVar("dspex_persist_options")


class ExplainedError(DspexError):
    """An error, its cause, with the advice of one command. The exit code is that of its cause."""

    def __init__(self, sentence: str, advice: str) -> None:
        super().__init__(f"{sentence}; {advice}")


class ToldError(DspexError):
    """An error of which a command has printed the JSON itself. The exit code is that of its cause."""


def use_options_of(command: Any) -> None:
    """Have errors about an invalid argument name the option of this command that has it: --at instead of at."""
    options = {max(each.opts, key=len): each.name for each in command.params if each.param_type_name == "option"}
    names = {key: option for option, name in options.items() for key in (name, option[2:].replace("-", "_"))}
    others = {key: f"--{other}" for key, other in _OTHER_NAMES.items() if f"--{other}" in options}
    _options.set({**others, **names})


def text_of(error: BaseException | str) -> str:
    """Return the message of an error with its advice, worded for the command line."""
    from dspex_persist.state.errors import InvalidArgumentError, StateError
    from dspex_persist.wiring.ending import StorageFailedError

    if isinstance(error, StorageFailedError):
        return error.in_words(text_of)
    if isinstance(error, InvalidArgumentError):
        option = _options.get({}).get(error.field, error.field)
        error = InvalidArgumentError(option, error.reason).advising(error.advice)
    return error.in_words(IN_COMMANDS) if isinstance(error, StateError) else str(error)
