"""The tools of an adapter that knows nothing of this package, for `serve --tools tests.workers.shop_tools:tools`."""

from dspex_persist import Toolbox, compat, tool

compat.install()

from tests.workers.old_adapter import ShopAdapter  # noqa: E402 -- it imports what has just been installed


@tool(exposed=True)
def price_of(what: str) -> int:
    """Return a price."""
    return len(what) * 3


tools = Toolbox()
tools.add(price_of)
tools.add(compat.toolbox(ShopAdapter, commands=["peek"]))
