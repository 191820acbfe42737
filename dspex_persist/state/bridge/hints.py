"""The texts of hints for clients over gRPC: they name rpcs, headers and, for work on the server, commands."""

from collections.abc import Mapping
from typing import Final

from dspex_persist.state.bridge.headers import AFTER_SEQUENCE, EXECUTION_ID, IDEMPOTENCY_KEY
from dspex_persist.state.errors import Hint

IN_RPCS: Final[Mapping[str, str]] = {
    Hint.ASK_OWNER: (
        "its owner, or an administrator, can add a rule: InitializeSession with the metadata access_control_json"
    ),
    Hint.ADD_SCOPE: "add the scope to its line in the token file of the server, or use another token",
    Hint.ANOTHER_FILE: "give the server another --db",
    Hint.OPEN_THERE: "connect to it there, and repeat the call",
    Hint.ANOTHER_SESSION_ID: "use another id for the new one, or end that session first with CleanupSession",
    Hint.ANOTHER_TOOL_NAME: "use another name",
    Hint.BEGIN_SESSION: "it never began, or has ended: begin it first, with InitializeSession",
    Hint.CALL_ITS_SERVER: (
        f"send the call, with its {EXECUTION_ID}, to the server that runs it; `serve --advertise HOST:PORT` on each "
        "server tells the others where that is"
    ),
    Hint.CALL_LESS_OFTEN: "repeat in {retry_in_s:.2g} s, or raise rate= or inflight= on its line in the token file",
    Hint.CHECK_FILE: (
        "check it with `dspex-persist db check`, then start the server again; to let several programs write, have "
        "them all call the server"
    ),
    Hint.CHECK_DATABASE: (
        "`dspex-persist db check --db URL` names what is wrong, while servers go on; end the session, or put a copy of "
        "the database in its place"
    ),
    Hint.CHECK_OR_RESTORE: (
        "check the file with `dspex-persist db check`, or restore a backup with `dspex-persist db restore`"
    ),
    Hint.BEGIN_DATABASE: (
        "`dspex-persist serve` begins a log there; if there is one elsewhere, name its schema (?schema=NAME) or prefix "
        "(?prefix=NAME) with --db"
    ),
    Hint.CHECK_ADDRESS: "see whether the database runs, and whether each part of --db of the server is right",
    Hint.GRANT_CREATE: "let the user of the server create tables there (GRANT CREATE ON SCHEMA)",
    Hint.GRANT_COMMANDS: "have the user of the server allowed the keys, the channels and the commands that it needs",
    Hint.GRANT_ACCESS: "have the owner of its tables grant the user of the server access to them",
    Hint.CLOSE_FIRST: "use that one, or close it first",
    Hint.CLOSE_WATCHES: "close some of them and repeat",
    Hint.CONNECT_AFTER_FORK: (
        "start processes with multiprocessing's 'spawn'; those that share a database reach it through the server"
    ),
    Hint.CONNECT_PLAINLY: "connect without TLS, or start it with --tls-cert and --tls-key",
    Hint.CONNECT_WITH_TLS: "connect with TLS",
    Hint.CONNECT_IN_MEMORY: "give the server a file with --db",
    Hint.EXPORT_REVEALED: "export the session with the values of sensitive variables",
    Hint.KEEP_WAL: "everything acknowledged is safe in {path}-wal: keep the two files together",
    Hint.LIST_EXECUTIONS: "ListExecutions lists them",
    Hint.LIST_VERSIONS: "GetVariableHistory lists the remaining versions",
    Hint.MAKE_FILE: "`dspex-persist serve` creates one",
    Hint.MAKE_TABLES: "`dspex-persist db upgrade` creates its tables",
    Hint.MEND_FILE: "`dspex-persist db upgrade` repairs it",
    Hint.NAME_BACKUP: "name a copy made by `dspex-persist db backup`",
    Hint.NAME_CERTIFIED_HOST: "connect to a name or an address that the certificate has (subjectAltName)",
    Hint.NEW_KEY: "a key belongs to one request: use a new one",
    Hint.NEW_TRANSACTION: "begin another one, with BeginTransaction",
    Hint.OPEN_AGAIN: "everything acknowledged has been moved into the file: start the server again",
    Hint.PRUNE_ON_SERVER: "have its server prune it: with Prune, or by itself with a retention setting",
    Hint.PUT_BACK_DATABASE: (
        "put the copy of the database that has them in its place; or, to accept the loss, end all its servers, delete "
        "their anchors (anchor_dir), and start them again"
    ),
    Hint.PUT_BACK_FILE: (
        "put the original file back, with its -wal, or restore a backup with `dspex-persist db restore`, and start "
        "the server again; what was written since the last check may be lost"
    ),
    Hint.RAISE_SERVER_BUDGET: "raise the server's setting max_tokens or max_cost, which holds for each of its sessions",
    Hint.RAISE_SESSION_BUDGET: "raise it with InitializeSession: metadata dspex.{setting}, a number or none",
    Hint.RAISE_TOOL_BUDGET: "raise it where the tool is defined: @tool(max_tokens=..., max_cost=...)",
    Hint.READ_AGAIN: "read it again and repeat",
    Hint.READ_ONLY: "to read it anyway, use `dspex-persist audit` or `db check`, which only read",
    Hint.RECORD_FROM_BACKUP: "record it from an earlier backup",
    Hint.REGISTER_VARIABLES: "register them with RegisterVariable",
    Hint.RENEW_CERTIFICATE: "compare its dates with this machine's clock, or renew it: the server reads the new file",
    Hint.REPEAT_CALL: "repeat the call",
    Hint.REPEAT_LATER: "repeat later",
    Hint.REPEAT_WHEN_BACK: "repeat the call when it is back",
    Hint.REPEAT_WITH_KEY: (
        f"repeat the call with the same idempotency key ({IDEMPOTENCY_KEY}), or read before you repeat it"
    ),
    Hint.RESTORE_BACKUP: (
        "restore a backup: dspex-persist db restore BACKUP --db {path}; or, to accept the loss, delete {path}.anchor "
        "and start the server again"
    ),
    Hint.RESTORE_OVER: "put a backup in place with dspex-persist db restore BACKUP --db {path}",
    Hint.RESUME_WATCH: f"resume with {AFTER_SEQUENCE}: {{after_sequence}}",
    Hint.RUN_AGAIN: "run it again",
    Hint.RUNNING_EXECUTION: f"leave {EXECUTION_ID} out, or name a running execution",
    Hint.SHARE_BY_SERVER: "stop it, or use another file; several programs share one through a server",
    Hint.SAME_USER: "run it as the user of the server: it answers no others at this address",
    Hint.SEND_TOKEN: "send the header `authorization: Bearer TOKEN`, with a token of the server's token file",
    Hint.SHOW_CERTIFICATE: "if it demands certificates of clients, show one",
    Hint.STORE_LESS: (
        "end some of its sessions with CleanupSession, or prune their history, or raise sessions= or bytes= on its "
        "line in the token file"
    ),
    Hint.TRUST_CA: "trust the one that issued it",
    Hint.UPGRADE_FILE: "`dspex-persist db upgrade` upgrades it",
    Hint.UPGRADE_PACKAGE: "upgrade dspex-persist",
    Hint.WAIT_FOR_OPTIMIZER: (
        'its holder writes with metadata["optimizer_id"], others wait or stop it with StopOptimization and force'
    ),
    Hint.WATCH_ANEW: "begin a new watch, which starts with the current values",
}
"""The texts in the details of a status."""
