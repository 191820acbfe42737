"""A client of the shop, in another process than the server: python examples/call_shop.py [HOST:PORT]

Start the server first, in the folder above this one: dspex-persist serve --tools examples.shop
"""

import sys
from uuid import uuid4

import dspex_persist


def main(target: str) -> None:
    """Call the shop's tools at `target`."""
    with dspex_persist.BridgedState(target) as state:
        shop = dspex_persist.Context("shop", state)
        print("tools:", [spec.name for spec in state.list_tools("shop")])
        shop.call("open_shop")
        print("bread for", shop.call("sell", article="bread"))

        # A client that does not know whether a sale happened repeats it with the same key: it happens once.
        key = str(uuid4())
        for _ in range(2):
            outcome = state.execute_tool("shop", "sell", {"article": "apples"}, idempotency_key=key)
            print(f"apples: {outcome.status}, commit {outcome.commit_sequence}, repeated: {outcome.repeated}")

        try:
            shop.call("sell", article="cheese")
        except dspex_persist.DspexError as error:
            print("refused:", error)

        # Each chunk arrives as soon as the tool has yielded it.
        for line in state.stream_tool("shop", "report"):
            print("report:", line)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051")
