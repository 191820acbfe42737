"""The headers and trailers that carry, as gRPC metadata, what the protocol's messages have no fields for."""

from collections.abc import Mapping
from typing import Final, TypeAlias

Headers: TypeAlias = tuple[tuple[str, str | bytes], ...]
"""The type of metadata in gRPC."""

BINARY = "-bin"
"""The ending of a key whose value is UTF-8 instead of printable ASCII; any key of a request may have it."""
ACTOR = "x-dspex-actor"
"""Request: who makes the call."""
REASON = "x-dspex-reason"
"""Request: why the call is made; kept with each version that it writes."""
SOURCE = "x-dspex-source"
"""Request: which side makes the call, "python" or "elixir". The metadata of a variable has precedence."""
IDEMPOTENCY_KEY = "x-dspex-idempotency-key"
"""Request: the key under which the server records the outcome of this write."""
OPTIMIZER_ID = "x-dspex-optimizer-id"
"""Request: which optimizer makes the call, for rpcs without a field for it."""
AFTER_SEQUENCE = "x-dspex-after-sequence"
"""Request of a watch: resume after this commit. Trailer of an interrupted watch: where to resume."""
POSITION = "x-dspex-position"
"""Response of a watch: the commit after which it starts."""
BEGAN = "x-dspex-began"
"""Response of a watch: the commit that began the session."""
CONTINUES = "x-dspex-continues"
"""Request of a watch that resumes: the commit that began its session. The server refuses the watch if the session is
another one by now, or if commits that it has missed were pruned."""
INITIAL_VALUES = "x-dspex-initial-values"
"""Response of a watch: how many initial values come first."""
BEFORE_VERSION = "x-dspex-before-version"
"""Request of GetVariableHistory: only versions below this one, to page through a long history. Trailer: the response
has fewer versions than requested, because they are large; continue with those below this one."""
LEFT_OUT = "x-dspex-left-out"
"""Trailer of InitializeSession: how many variables are missing in the response because they would not fit."""
EXPECTED_VERSION = "x-dspex-expected-version"
"""Request of SetVariable: the version that the variable must have. Unlike the field in the message, it can be 0."""
ERRORS, AS_STATUS = "x-dspex-errors", "status"
"""Request of BatchSetVariables with `atomic`: fail with the status of an update that is refused, as SetVariable does,
instead of answering with `errors`."""
RPC_ID = "x-dspex-rpc-id"
"""Request: the client's id for this call, for the server's log."""
RESUMED = "x-dspex-resumed"
"""Trailer of InitializeSession: the session already existed."""
EXECUTION_ID = "x-dspex-execution-id"
"""Request: the tool execution in whose transaction the call reads and writes."""
EXECUTION_STATUS = "x-dspex-execution-status"
"""Trailer of BeginTransaction: how the transaction ended."""
ASKED_BY = "x-dspex-asked-by"
"""Request of ExecuteTool and BeginTransaction: the execution whose code waits for this separate one, which must neither
need its thread nor wait for its turn."""
TOOLS, ALL_TOOLS = "x-dspex-tools", "all"
"""Request of GetExposedElixirTools: list every tool that the session can execute, not only the exposed ones."""
TIMEOUT_S = "x-dspex-timeout-s"
"""Request of ExecuteTool: how long the tool may take. By default, a little less than the deadline of the call."""
HINT = "x-dspex-hint"
"""Trailer of an error: the id of the advice in its details, if that differs from the usual one of this error."""

ARGUMENTS: Final[Mapping[str, str]] = {
    ACTOR: "actor",
    REASON: "reason",
    IDEMPOTENCY_KEY: "idempotency_key",
    OPTIMIZER_ID: "optimizer_id",
    AFTER_SEQUENCE: "after_sequence",
    BEFORE_VERSION: "before",
    EXPECTED_VERSION: "expected_version",
    EXECUTION_ID: "execution_id",
    TIMEOUT_S: "timeout_s",
}
"""The Python arguments that correspond to headers. Errors name the argument in Python, and the header over gRPC."""
