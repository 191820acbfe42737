"""The process of `dspex-persist worker`: tools for sessions of a running server."""

from typing import TYPE_CHECKING

from dspex_persist.settings import Settings
from dspex_persist.wiring.access import certificates_of
from dspex_persist.wiring.limits import limits_of
from dspex_persist.wiring.reporting import quiet, traced
from dspex_persist.wiring.tools import load_tools

if TYPE_CHECKING:
    from collections.abc import Sequence


def serve_worker(
    settings: Settings,
    url: str,
    sessions: "Sequence[str]",
    *,
    listen: str = "",
    address: str = "",
    worker_id: str = "",
    insecure: bool = False,
) -> None:
    """Run the tools in `settings` for sessions of a running server, until SIGTERM or SIGINT; see `registered.run`.

    Args:
        settings: The tools, their threads, the limits, the logs, and the files for TLS.
        url: The server, as for `connect`.
        sessions: The sessions to register the tools for.
        listen: Where to serve; by default on a free port, or a socket if the server has one.
        address: Where the server reaches it; by default where it listens.
        worker_id: How the worker is called in the session; by default by the name of this machine.
        insecure: Allow an address that other machines can reach without TLS.

    Raises:
        SettingsError: The address is invalid, or can be reached from other machines without TLS or `insecure`; or a
            file cannot be used.
        ToolLoadError: There are no tools.
        ListenError: The address is in use, or cannot be bound.
        StateError: The server cannot be reached, or refuses the tools.
    """
    quiet(settings)
    # Imports gRPC, which is quiet only if it was told so before.
    from dspex_persist import registered

    options = registered.WorkerOptions(
        url,
        registered.check_sessions(sessions),
        listen,
        address,
        worker_id,
        certificates_of(settings),
        insecure,
        settings.tool_threads,
        int(settings.max_message_bytes),
        limits_of(settings),
    )
    with traced(settings):
        registered.run(options, load_tools(settings))
