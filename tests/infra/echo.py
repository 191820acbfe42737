"""A helper that replies with what it is asked."""

import os
import sys
import time

from dspex_persist.infra.helpers import reply, requests


def main() -> None:
    for request in requests():
        match request:
            case "pid":
                reply(os.getpid())
            case "path":
                reply(sys.path)
            case "gibberish":
                print("gibberish", flush=True)
            case "busy":
                reply("busy")
                while True:
                    time.sleep(1)
            case _:
                reply("working")
                reply(request)
