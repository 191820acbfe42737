"""The protocols of a server, for workers and clients that speak them without this package's API.

    from dspex_persist.protocol import snakepit_bridge_pb2 as pb, snakepit_bridge_pb2_grpc as bridge

The modules are generated from the files in `folder()`. A process has either these or its own: see `compat.install`.
"""

import shutil
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from dspex_persist.state.bridge.stubs import dspex_persist_audit_pb2 as dspex_persist_audit_pb2
    from dspex_persist.state.bridge.stubs import dspex_persist_audit_pb2_grpc as dspex_persist_audit_pb2_grpc
    from dspex_persist.state.bridge.stubs import snakepit_bridge_pb2 as snakepit_bridge_pb2
    from dspex_persist.state.bridge.stubs import snakepit_bridge_pb2_grpc as snakepit_bridge_pb2_grpc

_GENERATED: Final = (
    "dspex_persist_audit_pb2",
    "dspex_persist_audit_pb2_grpc",
    "snakepit_bridge_pb2",
    "snakepit_bridge_pb2_grpc",
)

__all__ = [*_GENERATED, "copy_to", "folder"]


def __getattr__(name: str) -> Any:
    # On first access: who only wants to know where the files are needs no gRPC.
    if name not in _GENERATED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("dspex_persist.state.bridge.stubs"), name)


def folder() -> Path:
    """Return the folder with the `.proto` files: in the package if it was installed, else at the top of the clone."""
    package = Path(__file__).resolve().parent
    installed = package / "proto"
    return installed if installed.is_dir() else package.parent / "proto"


def copy_to(target: Path) -> list[Path]:
    """Copy the `.proto` files to a folder, which is made if it is missing, and return the copies."""
    target.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(each, target / each.name)) for each in sorted(folder().glob("*.proto"))]
