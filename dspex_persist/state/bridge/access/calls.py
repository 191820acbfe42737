"""GuardedCall: a call as the services see it, with the headers that its caller may send."""

import hashlib
from typing import Any, Final

from dspex_persist.infra.access.tokens import Identity
from dspex_persist.state.access import Access
from dspex_persist.state.bridge.headers import ASKED_BY, BINARY, EXECUTION_ID, IDEMPOTENCY_KEY
from dspex_persist.state.bridge.incoming import Context
from dspex_persist.state.tools.requests import IDEMPOTENCY_KEY as KEY_IN_METADATA
from dspex_persist.state.tools.session import ToolSession

_OF_EXECUTION: Final = frozenset((EXECUTION_ID, ASKED_BY, EXECUTION_ID + BINARY, ASKED_BY + BINARY))
_TOOL_NAME: Final = "tool_name"
_SEPARATOR: Final = "|"
"""Between the name of an identity, which cannot have it, and an idempotency key."""


class GuardedCall:
    """A call whose headers are read once, and may be changed.

    Attributes:
        identity: Who makes it.
        access: The rules of its session by which it was admitted.
        execution: The execution that it is part of.
        has_shown: Whether it has shown the capability of that.
    """

    def __init__(self, context: Context, identity: Identity) -> None:
        self.identity = identity
        self.access: Access | None = None
        self._context = context
        self._metadata: tuple[tuple[str, str | bytes], ...] = tuple(context.invocation_metadata() or ())
        self.execution: ToolSession | None = None
        self.has_shown = False

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return the headers."""
        return self._metadata

    @property
    def speaks_for(self) -> tuple[ToolSession | None, bool]:
        """The execution, and whether its capability was shown."""
        return self.execution, self.has_shown

    @property
    def names_execution(self) -> bool:
        """Whether a header names an execution."""
        return any(key in _OF_EXECUTION for key, _ in self._metadata)

    @property
    def has_key(self) -> bool:
        """Whether it has an idempotency key."""
        return any(key.removesuffix(BINARY) == IDEMPOTENCY_KEY for key, _ in self._metadata)

    def put(self, header: str, text: str | None) -> None:
        """Set a header, or remove it."""
        kept = tuple(entry for entry in self._metadata if entry[0].removesuffix(BINARY) != header)
        self._metadata = kept if text is None else (*kept, (header + BINARY, text.encode(errors="replace")))

    def use_own_keys(self, identity: Identity, request: Any, longest: int) -> None:
        """Keep the idempotency keys of an identity apart from those of others: it may not read their outcomes."""

        def own(key: str) -> str:
            kept = f"{identity.name}{_SEPARATOR}{key}"
            if len(kept) > longest >= len(key):
                # It would be too long with the name.
                kept = f"{identity.name}{_SEPARATOR}{hashlib.sha256(key.encode(errors='replace')).hexdigest()}"
            return kept

        self._metadata = tuple(
            (key, own(content) if isinstance(content, str) else own(content.decode(errors="replace")).encode())
            if key.removesuffix(BINARY) == IDEMPOTENCY_KEY
            else (key, content)
            for key, content in self._metadata
        )
        if _TOOL_NAME in request.DESCRIPTOR.fields_by_name and request.metadata.get(KEY_IN_METADATA):
            request.metadata[KEY_IN_METADATA] = own(request.metadata[KEY_IN_METADATA])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)
