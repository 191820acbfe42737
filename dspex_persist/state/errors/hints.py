"""Hints: ids of the advice that errors carry. Python, gRPC and the command line each have a text for every hint."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


class Hint(StrEnum):
    """The advice of an error. Its text may refer to the fields of the error."""

    ADD_SCOPE = "add_scope"
    ANOTHER_FILE = "another_file"
    """The file belongs to another program."""
    ANOTHER_SESSION_ID = "another_session_id"
    OPEN_THERE = "open_there"
    ANOTHER_TOOL_NAME = "another_tool_name"
    ASK_OWNER = "ask_owner"
    BEGIN_SESSION = "begin_session"
    GRANT_ACCESS = "grant_access"
    """The user of the database may not use its tables."""
    GRANT_CREATE = "grant_create"
    """The user of the database may not create tables."""
    GRANT_COMMANDS = "grant_commands"
    """The user of a store may not use a command, a key or a channel."""
    CALL_ITS_SERVER = "call_its_server"
    CALL_LESS_OFTEN = "call_less_often"
    BEGIN_DATABASE = "begin_database"
    """No server has made a database there yet."""
    CHECK_ADDRESS = "check_address"
    """The database at an address was not reached when it was opened."""
    CHECK_DATABASE = "check_database"
    """A database that servers share has damaged rows or keys."""
    CHECK_FILE = "check_file"
    """Another program has written to the file while it was open."""
    CHECK_OR_RESTORE = "check_or_restore"
    CLOSE_FIRST = "close_first"
    """This process has the database open already."""
    CLOSE_WATCHES = "close_watches"
    CONNECT_AFTER_FORK = "connect_after_fork"
    CONNECT_PLAINLY = "connect_plainly"
    CONNECT_WITH_TLS = "connect_with_tls"
    CONNECT_IN_MEMORY = "connect_in_memory"
    """The path of a file is `:memory:`."""
    EXPORT_REVEALED = "export_revealed"
    """The recording lacks the values of sensitive variables."""
    KEEP_WAL = "keep_wal"
    LIST_EXECUTIONS = "list_executions"
    LIST_VERSIONS = "list_versions"
    MAKE_FILE = "make_file"
    MAKE_TABLES = "make_tables"
    """The file is an empty database."""
    MEND_FILE = "mend_file"
    """A crash has left the file half made."""
    NAME_CERTIFIED_HOST = "name_certified_host"
    NAME_BACKUP = "name_backup"
    """There is no such backup."""
    NEW_KEY = "new_key"
    NEW_TRANSACTION = "new_transaction"
    OPEN_AGAIN = "open_again"
    """Everything acknowledged is in the file."""
    PRUNE_ON_SERVER = "prune_on_server"
    PUT_BACK_DATABASE = "put_back_database"
    """A database that servers share has lost commits."""
    PUT_BACK_FILE = "put_back_file"
    RAISE_SERVER_BUDGET = "raise_server_budget"
    RAISE_SESSION_BUDGET = "raise_session_budget"
    RAISE_TOOL_BUDGET = "raise_tool_budget"
    READ_AGAIN = "read_again"
    READ_ONLY = "read_only"
    """This user may not write to the file or its folder."""
    RECORD_FROM_BACKUP = "record_from_backup"
    REGISTER_VARIABLES = "register_variables"
    RENEW_CERTIFICATE = "renew_certificate"
    REPEAT_CALL = "repeat_call"
    REPEAT_LATER = "repeat_later"
    REPEAT_WHEN_BACK = "repeat_when_back"
    """The server is shutting down."""
    REPEAT_WITH_KEY = "repeat_with_key"
    """The outcome of the write is unknown."""
    RESTORE_BACKUP = "restore_backup"
    """Acknowledged commits are gone."""
    RESTORE_OVER = "restore_over"
    """A file was put in the database's place by hand."""
    RESUME_WATCH = "resume_watch"
    RUN_AGAIN = "run_again"
    RUNNING_EXECUTION = "running_execution"
    SHARE_BY_SERVER = "share_by_server"
    """Another process owns the database."""
    SAME_USER = "same_user"
    SEND_TOKEN = "send_token"
    SHOW_CERTIFICATE = "show_certificate"
    STORE_LESS = "store_less"
    TRUST_CA = "trust_ca"
    UPGRADE_FILE = "upgrade_file"
    UPGRADE_PACKAGE = "upgrade_package"
    WAIT_FOR_OPTIMIZER = "wait_for_optimizer"
    WATCH_ANEW = "watch_anew"
    """The watch has a gap."""


_MAINTENANCE: Final = "dspex_persist.state.store.maintenance"

IN_PYTHON: Final[Mapping[str, str]] = {
    Hint.ASK_OWNER: (
        "its owner, or an administrator, can add a rule: initialize_session(session_id, access_control(rules))"
    ),
    Hint.ADD_SCOPE: "add the scope to its line in the token file of the server, or use another token",
    Hint.ANOTHER_FILE: "give another path",
    Hint.OPEN_THERE: "open it there, and repeat the call",
    Hint.ANOTHER_SESSION_ID: "use another session_id for the new one, or end that session first (cleanup_session)",
    Hint.ANOTHER_TOOL_NAME: "register it under another name",
    Hint.BEGIN_SESSION: "it never began, or has ended: begin it first, with Context(...) or initialize_session",
    Hint.CALL_ITS_SERVER: (
        "use it through the server that runs it, connect('grpc://HOST:PORT'); the setting advertise of each server "
        "tells the others where that is"
    ),
    Hint.CALL_LESS_OFTEN: "repeat in {retry_in_s:.2g} s, or raise rate= or inflight= on its line in the token file",
    Hint.BEGIN_DATABASE: (
        "connect(url) begins a log there; if there is one elsewhere, name its schema (?schema=NAME) or prefix "
        "(?prefix=NAME)"
    ),
    Hint.CHECK_ADDRESS: "see whether the database runs, and whether each part of the address is right",
    Hint.CHECK_DATABASE: (
        "a check of the database names what is wrong, while its servers go on; end the session, or put a copy of the "
        "database in its place"
    ),
    Hint.CHECK_FILE: (
        f"check it with {_MAINTENANCE}.check(path), then open it again; several programs write to one database "
        "through a server: connect('grpc://HOST:PORT')"
    ),
    Hint.CHECK_OR_RESTORE: (
        f"check the file with {_MAINTENANCE}.check(path), or restore a backup with its restore(backup, path)"
    ),
    Hint.CLOSE_FIRST: "use that one, or close() it first",
    Hint.CLOSE_WATCHES: "close some of them and repeat",
    Hint.CONNECT_AFTER_FORK: (
        "fork before you connect(), or start this process with multiprocessing's 'spawn', and connect() in it; "
        "processes that share a database reach it through a server: connect('grpc://HOST:PORT')"
    ),
    Hint.CONNECT_PLAINLY: "connect('grpc://HOST:PORT'), or start it with tls_cert and tls_key",
    Hint.CONNECT_WITH_TLS: "connect('grpcs://HOST:PORT')",
    Hint.CONNECT_IN_MEMORY: "use LocalState() or connect('memory:') instead",
    Hint.EXPORT_REVEALED: "export the session with reveal=True",
    Hint.GRANT_CREATE: "let this user create tables there (GRANT CREATE ON SCHEMA), at least until they are there",
    Hint.GRANT_COMMANDS: "have this user allowed the keys, the channels and the commands that docs/valkey.md lists",
    Hint.GRANT_ACCESS: "have the owner of its tables grant this user access to them, or name the owner in the URL",
    Hint.KEEP_WAL: "everything acknowledged is safe in {path}-wal: keep the two files together",
    Hint.LIST_EXECUTIONS: "an ExecutionQuery lists them",
    Hint.LIST_VERSIONS: "its history lists the remaining versions",
    Hint.MAKE_FILE: "connect(path) creates one",
    Hint.MAKE_TABLES: f"{_MAINTENANCE}.upgrade(path) creates its tables",
    Hint.MEND_FILE: f"{_MAINTENANCE}.upgrade(path) repairs it",
    Hint.NAME_BACKUP: f"name a copy made by {_MAINTENANCE}.backup(path, copy)",
    Hint.NAME_CERTIFIED_HOST: "connect to a name or an address that the certificate has (subjectAltName)",
    Hint.NEW_KEY: "a key belongs to one request: use a new idempotency_key",
    Hint.NEW_TRANSACTION: "begin another one, with ctx.transaction() or begin_transaction",
    Hint.OPEN_AGAIN: "everything acknowledged has been moved into the file: open it again",
    Hint.PRUNE_ON_SERVER: (
        "stop that server to prune it now, or have the server do it: connect('grpc://HOST:PORT').prune(...), or by "
        "itself with the settings retention_keep_versions, retention_age_s, retention_ended_sessions_s"
    ),
    Hint.PUT_BACK_DATABASE: (
        "put the copy of the database that has them in its place; or, to accept the loss, end all its servers, delete "
        "their anchors (anchor_dir), and start them again"
    ),
    Hint.PUT_BACK_FILE: (
        f"put the original file back, with its -wal, or restore a backup with {_MAINTENANCE}.restore(backup, path), "
        "and open it again; what was written since the last check may be lost"
    ),
    Hint.RAISE_SERVER_BUDGET: "raise the server's setting max_tokens or max_cost, which holds for each of its sessions",
    Hint.RAISE_SESSION_BUDGET: (
        "raise it with Context(session_id, {setting}=...), or lift it with the metadata dspex.{setting}: 'none'"
    ),
    Hint.RAISE_TOOL_BUDGET: "raise it where the tool is defined: @tool(max_tokens=..., max_cost=...)",
    Hint.READ_AGAIN: "read it again and repeat",
    Hint.READ_ONLY: "dspex_persist.open_audit(path), which only reads, may still open it",
    Hint.RECORD_FROM_BACKUP: "record it from an earlier backup: open_recording(backup, ...)",
    Hint.REGISTER_VARIABLES: "register them",
    Hint.RENEW_CERTIFICATE: "compare its dates with this machine's clock, or renew it: the server reads the new file",
    Hint.REPEAT_CALL: "repeat the call",
    Hint.REPEAT_LATER: "repeat later",
    Hint.REPEAT_WHEN_BACK: "repeat the call when it is back",
    Hint.REPEAT_WITH_KEY: "repeat the call with the same idempotency_key, or read before you repeat it",
    Hint.RESTORE_BACKUP: (
        f"restore a backup with {_MAINTENANCE}.restore(backup, path); or, to accept the loss, delete {{path}}.anchor "
        "and open it again"
    ),
    Hint.RESTORE_OVER: f"put a backup in place with {_MAINTENANCE}.restore(backup, path)",
    Hint.RESUME_WATCH: "resume with after_sequence={after_sequence}",
    Hint.RUN_AGAIN: "run it again",
    Hint.RUNNING_EXECUTION: "call outside of it, or in a running one",
    Hint.SHARE_BY_SERVER: (
        "end that process, or open another file; several programs share one through a server: "
        "dspex_persist.serve(settings), and connect('grpc://HOST:PORT')"
    ),
    Hint.SAME_USER: "run it as the user of the server: it answers no others at this address",
    Hint.SEND_TOKEN: "connect(url, token=...), or set DSPEX_PERSIST_TOKEN, to a token of the server's token file",
    Hint.SHOW_CERTIFICATE: "if it demands certificates of clients: connect(url, cert='client.pem', key='client.key')",
    Hint.STORE_LESS: (
        "end some of its sessions (cleanup_session), or prune their history, or raise sessions= or bytes= on its "
        "line in the token file"
    ),
    Hint.TRUST_CA: "trust the one that issued it: connect(url, ca='ca.pem')",
    Hint.UPGRADE_FILE: f"{_MAINTENANCE}.upgrade(path) upgrades it",
    Hint.UPGRADE_PACKAGE: "upgrade dspex-persist",
    Hint.WAIT_FOR_OPTIMIZER: (
        'its holder writes with metadata["optimizer_id"], others wait or break the lock with '
        "optimize(..., force=True) or stop_optimization(..., force=True)"
    ),
    Hint.WATCH_ANEW: "begin a new watch, which starts with the current values",
}
"""The texts of hints in Python, as in `str(error)`."""
