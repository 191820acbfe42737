"""The contract of tools on a server whose tools run in workers."""

from typing import Any, ClassVar

from dspex_persist.testing.stream_contract import StreamContract
from dspex_persist.testing.tool_contract import ToolContract
from tests.contract.test_bridged import Bridged, served

__all__ = ["served"]


class TestPooledTools(Bridged, ToolContract, StreamContract):
    """The contract of tools, also of those that stream, on a server with two workers."""

    settings: ClassVar[dict[str, Any]] = {
        "tools": "dspex_persist.testing.contract_tools",
        "workers": 2,
        # Each write is a call here: as many as by default would take seconds.
        "execution_writes": 1_000,
    }
