"""What a process that serves reports: its logs and traces."""

import contextlib
import logging
import os
from typing import Final

from dspex_persist.extras import how_to_install
from dspex_persist.infra.logs import quiet_grpc
from dspex_persist.settings import Settings, SettingsError

# How long it may take at the end to send the last traces.
_FLUSH_S: Final = 3.0


def traced(settings: Settings) -> contextlib.AbstractContextManager[object]:
    """Return what makes spans of what this process does, if the settings ask for that, and sends them."""
    if not settings.otel:
        return contextlib.nullcontext()
    try:
        from dspex_persist import otel
    except ImportError as error:
        reason = f"it needs OpenTelemetry, which is not installed: {how_to_install('otel')}"
        raise SettingsError("otel", reason) from error
    from dspex_persist import __version__

    try:
        return otel.Tracing(__version__, _FLUSH_S)
    except otel.TracingError as error:
        raise SettingsError("otel", str(error)) from error


def quiet(settings: Settings) -> None:
    """Configure the logs, and keep libraries from writing what nobody needs."""
    from dspex_persist.infra.log_output import configure_logs

    quiet_grpc()
    # With it, gRPC would restart its threads in processes that tools fork, on the server's sockets, and crash there.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    configure_logs(settings.log_level, settings.log_style)
    # Alembic logs each of its plugins at INFO. Only the upgrade of a file is worth reporting.
    logging.getLogger("alembic.runtime.plugins").setLevel(logging.WARNING)
    logging.getLogger("alembic.runtime.migration").addFilter(lambda record: str(record.msg).startswith("Running"))
