"""The command `dspex-persist`, and python -m dspex_persist."""

import os
import sys


def main() -> None:
    """Run the command line.

    A health check is repeated every few seconds, so it has a way of its own, without the imports of the others.
    """
    words = sys.argv[1:]
    if words[:1] == ["health"] and "_DSPEX_PERSIST_COMPLETE" not in os.environ:
        from dspex_persist import healthcheck

        code = healthcheck.run(words[1:])
        if code is not None:
            sys.exit(code)
    from dspex_persist import cli

    cli.main()


if __name__ == "__main__":
    main()
