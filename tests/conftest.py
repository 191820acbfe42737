"""What holds for all tests."""

import os
import signal
import sys
from pathlib import Path

# Containers like to forbid bytecode beside the sources. Without any, every run would write all assertions of the tests
# anew before the first of them, and every process that a test starts would compile the whole package.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

# A shell has what it starts in the background ignore Ctrl-C, and so would all that the tests start in turn.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Plain stubs, which tests use as clients in the field do, heed the environment's proxies even on their own machine.
for _name in ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy"):
    os.environ.pop(_name, None)
    os.environ.pop(_name.upper(), None)
