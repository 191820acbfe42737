"""What travels beside the messages, in gRPC metadata, because the protocol has no field for it."""

from collections.abc import Mapping
from typing import Final, TypeAlias

Headers: TypeAlias = tuple[tuple[str, str | bytes], ...]
"""As gRPC takes them."""

BINARY = "-bin"
"""What a key ends in whose value is UTF-8 beyond plain ASCII; any of the keys of a request may have it."""
ACTOR = "x-dspex-actor"
"""Who calls."""
SOURCE = "x-dspex-source"
"""Which side calls, "python" or "elixir", where the metadata of the variable does not say."""
IDEMPOTENCY_KEY = "x-dspex-idempotency-key"
"""Under which key the outcome of this write is recorded."""
OPTIMIZER_ID = "x-dspex-optimizer-id"
"""Which optimizer calls, where the request has no field for it."""
AFTER_SEQUENCE = "x-dspex-after-sequence"
"""Request of a watch: resume after this commit. Trailer of one that was cut: resume after that commit."""
POSITION = "x-dspex-position"
"""Response of a watch: the commit from which it goes on."""
INITIAL_VALUES = "x-dspex-initial-values"
"""Response of a watch: how many initial values come first."""
BEFORE_VERSION = "x-dspex-before-version"
"""Request of GetVariableHistory: only versions below this one, to page through a long history. Trailer: fewer came than
were asked for, because they are large, and the next ones are those below this one."""
LEFT_OUT = "x-dspex-left-out"
"""Trailer of InitializeSession: of so many variables there is no initial value, because one message cannot hold all."""
EXPECTED_VERSION = "x-dspex-expected-version"
"""Request of SetVariable: the version that the variable must have, 0 included, which the message cannot say."""
RPC_ID = "x-dspex-rpc-id"
"""The client's name for this call, for the server's log."""
RESUMED = "x-dspex-resumed"
"""Trailer of InitializeSession: the session was there already."""
EXECUTION_ID = "x-dspex-execution-id"
"""Inside which tool execution's transaction the call reads and writes."""
ASKED_BY = "x-dspex-asked-by"
"""Which tool execution's code waits for this tool, which is executed apart, and must not wait for that one's thread."""
TOOLS, ALL_TOOLS = "x-dspex-tools", "all"
"""Request of GetExposedElixirTools: every tool that the session can execute, not the exposed ones alone."""
TIMEOUT_S = "x-dspex-timeout-s"
"""Request of ExecuteTool: how long the tool may take. Without it, a little less than the call's deadline leaves."""
HINT = "x-dspex-hint"
"""Trailer of an error: the id of the advice in its details, where not all errors of its kind have that one."""

ARGUMENTS: Final[Mapping[str, str]] = {
    ACTOR: "actor",
    IDEMPOTENCY_KEY: "idempotency_key",
    OPTIMIZER_ID: "optimizer_id",
    AFTER_SEQUENCE: "after_sequence",
    BEFORE_VERSION: "before",
    EXPECTED_VERSION: "expected_version",
    EXECUTION_ID: "execution_id",
    TIMEOUT_S: "timeout_s",
}
"""What programs in Python call what such a header says: errors name the one here, and the other over the wire."""
