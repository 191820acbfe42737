"""A tiny worker for tests: answers pings with its process id, and misbehaves as its flags say.

It imports nothing that takes long. Requests and answers are lines over a socket.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path


def main() -> None:
    arguments = _arguments()
    if arguments.exit is not None:
        print("no adapter", file=sys.stderr, flush=True)
        sys.exit(arguments.exit)
    if arguments.exit_until and _starts(arguments.exit_until) <= arguments.exit_times:
        sys.exit("not yet")
    if arguments.exit_from and 1 < _starts(arguments.exit_from) <= 1 + arguments.exit_times:
        sys.exit("not now")
    if arguments.ignore_term:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if arguments.garbage:
        # Megabytes without a line's end, which are no text either.
        for stream in (sys.stdout, sys.stderr):
            stream.buffer.write(b"\xff" * arguments.garbage + b"GRPC_READY:1\n\0\n")
            stream.flush()
    server = _listen(arguments)
    if not arguments.never_ready:
        _say_ready(arguments, 0 if arguments.socket else server.getsockname()[1])
    while True:
        connection, _ = server.accept()
        threading.Thread(target=_serve, args=(connection, arguments), daemon=True).start()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket")
    parser.add_argument("--ready", choices=["stdout", "stderr", "file"], default="stdout")
    parser.add_argument("--never-ready", action="store_true")
    parser.add_argument("--nonsense", action="store_true")
    parser.add_argument("--ignore-term", action="store_true")
    parser.add_argument("--garbage", type=int, default=0)
    parser.add_argument("--exit", type=int)
    # The first starts fail, or those after the first one; they are counted in this file.
    parser.add_argument("--exit-until", type=Path)
    parser.add_argument("--exit-from", type=Path)
    parser.add_argument("--exit-times", type=int, default=1)
    return parser.parse_args()


def _starts(file: Path) -> int:
    with file.open("ab", buffering=0) as counted:
        counted.write(b"x")
        # Its end after this write: others may have written since.
        return counted.tell()


def _listen(arguments: argparse.Namespace) -> socket.socket:
    if not arguments.socket:
        return socket.create_server(("127.0.0.1", 0))
    server = socket.socket(socket.AF_UNIX)
    server.bind(arguments.socket)
    server.listen()
    return server


def _say_ready(arguments: argparse.Namespace, port: int) -> None:
    match arguments.ready:
        case "stdout":
            print(f"GRPC_READY:{port}", flush=True)
        case "stderr":
            print(f"2026-01-01 INFO grpc_server: GRPC_READY:{port}", file=sys.stderr, flush=True)
        case "file":
            file = Path(os.environ["SNAKEPIT_READY_FILE"])
            file.with_suffix(".new").write_text(str(port))
            file.with_suffix(".new").rename(file)


def _serve(connection: socket.socket, arguments: argparse.Namespace) -> None:
    with connection, connection.makefile("rw") as lines:
        for line in lines:
            answer = "?" if arguments.nonsense else _answer(*line.split())
            arguments.nonsense = arguments.nonsense or line == "nonsense\n"
            lines.write(f"{answer}\n")
            lines.flush()


_kept: list[object] = []


def _answer(what: str, argument: str = "") -> object:
    match what:
        case "ping":
            return os.getpid()
        case "hang":
            threading.Event().wait()
        case "exit":
            print("last words", file=sys.stderr, flush=True)
            os._exit(int(argument))
        case "leak":
            _kept.append(b"x" * int(argument))
        case "warn":
            print(argument, file=sys.stderr, flush=True)
        case "print":
            print(argument, flush=True)
        case "flood":
            sys.stdout.write("y\n" * int(argument))
            sys.stdout.flush()
        case "child" | "daemon":
            # It ignores SIGTERM, and a daemon leaves the group.
            code = "import signal; signal.signal(15, signal.SIG_IGN); print('up', flush=True); signal.pause()"
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", code], start_new_session=what == "daemon", stdout=subprocess.PIPE
            )
            _kept.append(child)
            assert child.stdout is not None
            child.stdout.readline()
            return child.pid
    return "ok"


if __name__ == "__main__":
    main()
