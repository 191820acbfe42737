"""An adapter as they exist in the field: it imports the package of existing workers, and knows nothing of this one."""

from typing import Any, Dict, List  # noqa: UP035 -- as they are

from snakepit_bridge import SessionContext, VariableNotFoundError, VariableType
from snakepit_bridge.base_adapter import BaseAdapter, tool


class ShopAdapter(BaseAdapter):
    def __init__(self) -> None:
        super().__init__()
        self.session_context: Any = None
        self.ready = False

    def set_session_context(self, session_context: SessionContext) -> None:
        self.session_context = session_context

    async def initialize(self) -> None:
        self.ready = True

    def execute_tool(self, tool_name: str, arguments: Dict[str, Any], context: SessionContext) -> Any:  # noqa: UP006
        if tool_name == "peek":
            return context.get_variable("stock")
        return self.call_tool(tool_name, **arguments)

    @tool(description="Open the shop")
    def open_shop(self, stock: int) -> str:
        return self.session_context.register_variable(
            "stock", VariableType.INTEGER, stock, constraints={"min": 0}, metadata={"unit": "piece"}
        )

    @tool(description="Sell some", required_variables=["stock"])
    def sell(self, amount: int = 1) -> Dict[str, Any]:  # noqa: UP006
        ctx = self.session_context
        ctx.v.stock = ctx.v.stock - amount
        sold = ctx.variable("sold")
        try:
            sold.value = sold.value + amount
        except VariableNotFoundError:
            ctx["sold"] = amount
        return {"left": ctx["stock"], "sold": sold.value, "ready": self.ready}

    @tool(description="Sell several times")
    async def sell_twice(self) -> List[int]:  # noqa: UP006
        return [self.session_context.call_tool("sell")["left"] for _ in range(2)]

    @tool(description="Ask the server for its own tool")
    def price(self) -> Any:
        return [sorted(self.session_context.elixir_tools), self.session_context.call_elixir_tool("price_of", what="a")]

    @tool(supports_streaming=True)
    def count(self, to: int) -> Any:
        for number in range(to):
            self.session_context["stock"] = number
            yield number
