"""What adapters of existing workers are written against: SessionContext and what they import beside it.

With it an adapter runs, and is tested, without the package that it was written for. See `install` and `toolbox`.
"""

try:
    from dspex_persist.compat.base_adapter import (
        BaseAdapter,
        ThreadSafeAdapter,
        ToolMetadata,
        thread_safe_method,
        tool,
        toolbox,
    )
    from dspex_persist.compat.installing import install
    from dspex_persist.compat.session_context import (
        BatchUpdater,
        ElixirTool,
        SessionContext,
        VariableNamespace,
        VariableProxy,
        VariableType,
    )
    from dspex_persist.state.bridge.stubs import BridgeServiceStub
    from dspex_persist.state.errors import VariableNotFoundError
except TypeError as error:
    # As protobuf reports that another module has registered the same file with other contents.
    if "descriptor pool" not in str(error):
        raise
    raise ImportError(
        "another version of snakepit_bridge.proto is loaded in this process, which cannot have both: run the adapter "
        "without the package that it was written for; dspex_persist.compat.install() takes its place"
    ) from error

__all__ = [
    "BaseAdapter",
    "BatchUpdater",
    "BridgeServiceStub",
    "ElixirTool",
    "SessionContext",
    "ThreadSafeAdapter",
    "ToolMetadata",
    "VariableNamespace",
    "VariableNotFoundError",
    "VariableProxy",
    "VariableType",
    "install",
    "thread_safe_method",
    "tool",
    "toolbox",
]
