"""The demo's tool: it takes its time over variables that have to fit together."""

import time

from dspex_persist import ToolContext, tool


@tool(description="Move to another address: three variables that have to fit together.")
def move(ctx: ToolContext, street: str, postcode: str, town: str) -> str:
    """It writes one variable after the other, and says through `steps_done` how far it is."""
    pause_s = ctx["seconds_a_step"]
    for step, (name, text) in enumerate((("street", street), ("postcode", postcode), ("town", town)), 1):
        ctx[name] = text
        ctx.publish("steps_done", step)
        ctx.log("wrote a part of the address", name=name)
        deadline = time.monotonic() + pause_s * (1 if step < 3 else 1_000)
        while time.monotonic() < deadline and not ctx.cancelled:
            time.sleep(0.01)
    return f"{street}, {postcode} {town}"
