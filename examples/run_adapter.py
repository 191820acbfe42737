"""The tools of an adapter for existing workers, without the package that it was written for.

python examples/run_adapter.py                                  # here, in memory
dspex-persist serve --tools examples.run_adapter:tools          # on a server
dspex-persist call shop open_shop stock=5 --target 127.0.0.1:50051
"""

import sys
from pathlib import Path

from dspex_persist import Context, ToolFailedError, compat

# Before the adapter is imported: it finds here what it imports.
compat.install()

# It is beside this file, from wherever that is run.
sys.path.insert(0, str(Path(__file__).parent))

from adapter import ShopAdapter  # noqa: E402

tools = compat.toolbox(ShopAdapter)


def main() -> None:
    """Run the tools in memory."""
    with Context("shop", tools=tools) as shop:
        print(shop.call("report"))
        shop.call("open_shop", stock=5)
        print(shop.call("sell", amount=2))
        try:
            shop.call("sell", amount=9)
        except ToolFailedError as error:
            print(error)
        print(shop.call("report"), "and", shop["sold"], "sold")
        print(shop.call("sell_out"))


if __name__ == "__main__":
    main()
