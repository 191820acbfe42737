"""What holds for all tests."""

import os
import signal

# A shell has what it starts in the background ignore Ctrl-C, and so would all that the tests start in turn.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Plain stubs, which tests use as clients in the field do, heed the environment's proxies even on their own machine.
for _name in ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy"):
    os.environ.pop(_name, None)
    os.environ.pop(_name.upper(), None)
