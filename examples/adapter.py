"""An adapter as they are written for existing workers: it knows nothing of this package. See run_adapter.py."""

from typing import Any

from snakepit_bridge import SessionContext, VariableNotFoundError
from snakepit_bridge.base_adapter import BaseAdapter, tool


class ShopAdapter(BaseAdapter):
    """Sells apples."""

    session_context: Any = None

    def set_session_context(self, session_context: SessionContext) -> None:
        """Say for which session the next tool runs."""
        self.session_context = session_context

    @tool(description="Open the shop")
    def open_shop(self, stock: int = 10) -> str:
        """Register what the shop needs."""
        ctx = self.session_context
        ctx.register_variable("sold", "integer", 0)
        return str(ctx.register_variable("stock", "integer", stock, constraints={"min": 0}))

    @tool(description="Sell apples")
    def sell(self, amount: int = 1) -> dict[str, Any]:
        """Take them from the stock, and count them."""
        ctx = self.session_context
        ctx["sold"] += amount
        # If there are not enough, this is refused, and nothing was sold either.
        ctx["stock"] -= amount
        return {"left": ctx["stock"], "sold": ctx.variable("sold").value}

    @tool(description="Count the stock down", supports_streaming=True)
    def sell_out(self) -> Any:
        """Sell them one by one."""
        while self.session_context.v.stock:
            yield self.sell()["left"]

    @tool(description="Say what is going on")
    def report(self) -> str:
        """Describe the shop."""
        try:
            return f"{self.session_context.get_variable('stock')} left"
        except VariableNotFoundError:
            return "closed"
