"""A worker of `serve --workers`: `python -m dspex_persist.working OPTIONS LISTEN CALLBACK`, started by the server.

It imports as little as possible, because a server with many workers waits for all of them: neither the command line nor
the settings, which the server has checked. `Options` is what it needs of them.
"""

import asyncio
import gc
import json
import logging
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from typing import Final

from dspex_persist.errors import DspexError
from dspex_persist.infra import streams
from dspex_persist.infra.exits import end_in_time
from dspex_persist.infra.interrupts import interrupts
from dspex_persist.infra.logs import JsonLines, LogHandler, LogLevel, quiet_grpc, quiet_libraries
from dspex_persist.infra.stopping import End, loop_factory, spare_the_collector
from dspex_persist.state.limits import Limits

# When the garbage of the start is looked for, in seconds after it; the collector does not run before.
_COLLECT_S: Final = 2.0
# How long a worker lets code go on when the server ends it.
_GRACE_S: Final = 1.0
# How long a worker may take at the end to send the last traces.
_FLUSH_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Options:
    """What a worker of ours is told.

    Attributes:
        tools: The modules with the tools.
        record_lm: Whether to keep the LM calls of all tools in the journal.
        tool_threads: How many tools that are not asynchronous run at a time.
        max_message_bytes: The largest message.
        log_level: The lowest level to write.
        limits: The limits of parameters, results and journals.
        otel: Whether to send traces.
        version: The version of this package, which they name.
    """

    tools: tuple[str, ...]
    record_lm: bool
    tool_threads: int
    max_message_bytes: int
    log_level: LogLevel
    limits: Limits
    otel: bool = False
    version: str = ""

    def written(self) -> str:
        """Return them as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> "Options":
        """Return what `written` has written."""
        fields = json.loads(text)
        return cls(**{**fields, "tools": tuple(fields["tools"]), "limits": Limits(**fields["limits"])})


def main() -> None:
    """Run the tools for the server that has started this process; see `run`."""
    # The modules that it imports are not garbage.
    gc.disable()
    streams.prepare()
    text, listen, callback = sys.argv[1:]
    code = 0
    try:
        run(Options.read(text), listen, callback)
    except DspexError as error:
        streams.print_error(f"error: {error}")
        code = 1
    code = streams.finish(code)
    end_in_time(code)
    sys.exit(code)


def run(options: Options, listen: str, callback: str) -> None:
    """Run tools for a server, until SIGTERM.

    Prints `GRPC_READY:<port>` on stdout when it is ready; logs go to stderr.

    Args:
        options: The tools, and how they run.
        listen: Where to serve.
        callback: The address at which the server answers this process.

    Raises:
        ToolLoadError: There are no tools.
        ListenError: The address is in use, or cannot be bound.
    """
    quiet_grpc()
    # With it, gRPC would restart its threads in processes that tools fork, on the worker's sockets, and crash there.
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
    _write_logs(options.log_level)
    with _traced(options), asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(_serve(options, listen, callback))


def _traced(options: Options) -> AbstractContextManager[object]:
    if not options.otel:
        return nullcontext()
    from dspex_persist.otel import Tracing

    return Tracing(options.version, _FLUSH_S)


async def _serve(options: Options, listen: str, callback: str) -> None:
    from dspex_persist.cognitive.toolbox import Toolbox
    from dspex_persist.infra import server
    from dspex_persist.state.bridge.codec import BRIDGE_SERVICE
    from dspex_persist.state.bridge.status import status_of
    from dspex_persist.state.bridge.traced import OF_THE_SERVER
    from dspex_persist.state.bridge.workers.service import WorkerServicer
    from dspex_persist.state.bridge.workers.session import Callback

    end = End(asyncio.get_running_loop())
    tools = Toolbox.of(options.tools, record_lm=options.record_lm)
    if "structlog" in sys.modules:
        # What tools log with it goes where all other events go.
        from dspex_persist.infra.log_output import configure_logs

        configure_logs(options.log_level, "json")

    def on_ready(port: int) -> None:
        streams.print_line(f"GRPC_READY:{port}")
        # It looks at all objects, and others may be starting.
        asyncio.get_running_loop().call_later(_COLLECT_S, partial(spare_the_collector, had_tools=True))

    with Callback(callback) as state:
        servicer = WorkerServicer(state, tools, threads=options.tool_threads, limits=options.limits)
        end.on_signals()
        try:
            await server.serve(
                server.ServerOptions(
                    listen, max_message_bytes=options.max_message_bytes, grace_s=_GRACE_S, reflection=False
                ),
                [server.Service(BRIDGE_SERVICE, servicer)],
                status_of=status_of,
                on_ready=on_ready,
                stop=end.stop,
                # The server decides what still runs.
                belongs=lambda _: True,
                spans=OF_THE_SERVER,
            )
        finally:
            interrupts.take_from_loop()
            servicer.close()


def _write_logs(level: LogLevel) -> None:
    """Write what `configure_logs` would, without the library that it takes, which is a fifth of this start."""
    handler = LogHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    quiet_libraries(logging.getLevelNamesMapping()[level.upper()])


if __name__ == "__main__":
    main()
