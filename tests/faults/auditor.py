"""A client of the audit service for the fault tests, independent of the product except for the messages."""

from types import TracebackType
from typing import Any, Self

import grpc.aio
from google.protobuf.message_factory import GetMessageClass

from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as pb

_SERVICE = pb.DESCRIPTOR.services_by_name["AuditService"]
_TIMEOUT_S = 60.0


class Auditor:
    """One channel to one server."""

    def __init__(self, port: int) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")

    async def ask(self, name: str, request: Any) -> list[Any]:
        """Call an rpc and return all its messages."""
        method = _SERVICE.methods_by_name[name]
        make = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        call: Any = make(
            f"/{_SERVICE.full_name}/{name}",
            request_serializer=GetMessageClass(method.input_type).SerializeToString,
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        answer = call(request, timeout=_TIMEOUT_S)
        return [part async for part in answer] if method.server_streaming else [await answer]

    async def prune(self, session_id: str, *, keep_versions: int) -> int:
        """Prune the session; returns the number of versions deleted."""
        request = pb.PruneRequest(keep_versions=keep_versions, session_id=session_id, confirm=True)
        return int((await self.ask("Prune", request))[-1].report.versions)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._channel.close()
