"""A shop as a session: tools that sell, order, restock and report. Each call is one transaction.

    python examples/shop.py             # on a temporary file
    python examples/shop.py shop.db     # on a permanent file: run it twice

The same tools, served to every client (see call_shop.py):

    dspex-persist serve --tools examples.shop
"""

import asyncio
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import dspex_persist
from dspex_persist import ToolContext, tool

SESSION = "shop"
Article = Literal["apples", "bread", "milk"]
PRICES = {"apples": 3, "bread": 5, "milk": 2}

visitors: list[Callable[[], object]] = []
"""What other clients do while `count_shelves` runs: `main` fills it to cause a conflict."""


@tool
def open_shop(ctx: ToolContext) -> list[str]:
    """Define the missing variables of the shop; return the names of all."""
    for article in PRICES:
        ctx.define(article, 10, constraints={"min": 0})
    for name in ("cash", "counted"):
        ctx.define(name, 0)
    return sorted(ctx)


@tool(retries=5)
def sell(ctx: ToolContext, article: Article, amount: int = 1) -> int:
    """Sell some of an article; return the price.

    Args:
        article: The article to sell.
        amount: How many of it.
    """
    if amount < 1:
        raise ValueError(f"cannot sell {amount}: it must be above 0")
    # A stock below the minimum of 0 is refused, which undoes the whole sale.
    ctx[article] -= amount
    price = amount * PRICES[article]
    ctx["cash"] += price
    return price


@tool(retries=5)
def order(ctx: ToolContext, basket: dict[Article, int]) -> dict[str, str]:
    """Sell the articles of a basket, each completely or not at all; return the result for each."""
    became: dict[str, str] = {}
    for article, amount in basket.items():
        try:
            became[article] = f"sold for {ctx.call(sell, article=article, amount=amount)}"
        except dspex_persist.DspexError as error:
            # Only the writes of the failed sale are undone.
            became[article] = str(error)
    return became


@tool(retries=5)
async def restock(ctx: ToolContext, article: Article, amount: int) -> int:
    """Restock a shelf; return its stock. Waiting for the delivery blocks no other tool."""
    await asyncio.sleep(0.05)
    there = int(ctx[article]) + amount
    ctx[article] = there
    return there


@tool(isolation="snapshot")
def report(ctx: ToolContext) -> Iterator[dict[str, object]]:
    """Stream the stock of each article from one snapshot. It writes nothing, so sales in between cause no conflict."""
    for article, price in PRICES.items():
        yield {"article": article, "there": ctx[article], "worth": ctx[article] * price}


def count_shelves(ctx: ToolContext) -> int:
    """Count the stock on all shelves, and store the sum."""
    counted = sum(int(ctx[article]) for article in PRICES)
    while visitors:
        visitors.pop()()
    ctx["counted"] = counted
    return counted


count_once = tool(name="count_once")(count_shelves)
count = tool(name="count", retries=3)(count_shelves)


def main(path: Path) -> None:
    """Open the shop, and show how executions can end."""
    tools = dspex_persist.Toolbox()
    for each in (open_shop, sell, order, restock, report, count_once, count):
        tools.add(each)
    with dspex_persist.connect(path, tools=tools) as state:
        shop = dspex_persist.Context(SESSION, state)
        print("variables:", shop.call("open_shop"))
        print("bread for", shop.call("sell", article="bread", amount=2))
        print("order:", shop.call("order", basket={"apples": 1, "milk": 99}))
        print("apples now:", shop.call("restock", article="apples", amount=5))
        print("report:", shop.call("report"))

        def buy_milk() -> None:
            shop.call("sell", article="milk")

        for name in ("count_once", "count"):
            visitors.append(buy_milk)
            outcome = state.execute_tool(SESSION, name)
            answer = outcome.result.json if outcome.result is not None else str(outcome.error)
            print(f"{name}: {answer} (attempts: {outcome.attempts})")
        for entry in shop.history("cash", limit=3):
            print(f"cash: version {entry.version}, written by execution {entry.cause}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder, "shop.db"))
