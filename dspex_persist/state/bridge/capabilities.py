"""Capabilities: what a process shows to speak for an execution that runs there, `exec_5_0f3a.SECRET`.

Audits and histories name executions, so that their ids are no secrets.
"""

import hashlib
import hmac
import secrets
from typing import Final

_BETWEEN: Final = "."
_BYTES: Final = 16


class Capabilities:
    """The capabilities of executions that run now. They are computed from a key that only this process has."""

    def __init__(self) -> None:
        self._key = secrets.token_bytes(32)

    def of(self, execution_id: str) -> str:
        """Return what whoever runs the code of an execution gets as its id."""
        return f"{execution_id}{_BETWEEN}{self._secret(execution_id)}"

    def holds(self, shown: str) -> bool:
        """Whether a text is the capability of an execution."""
        execution_id, _, secret = shown.partition(_BETWEEN)
        return hmac.compare_digest(secret.encode(errors="surrogateescape"), self._secret(execution_id).encode())

    def _secret(self, execution_id: str) -> str:
        text = execution_id.encode(errors="surrogateescape")
        return hmac.new(self._key, text, hashlib.sha256).digest()[:_BYTES].hex()


def bare(shown: str) -> str:
    """Return the id of an execution, whether or not its secret is there."""
    return shown.partition(_BETWEEN)[0]
