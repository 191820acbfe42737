"""The demo's tool: slowly writes variables that belong together."""

import time

from dspex_persist import ToolContext, tool


@tool(description="Change the address: three variables that belong together.")
def move(ctx: ToolContext, street: str, postcode: str, town: str) -> str:
    """Write one variable after the other, and publish the progress in `steps_done`."""
    pause_s = ctx["seconds_a_step"]
    for step, (name, text) in enumerate((("street", street), ("postcode", postcode), ("town", town)), 1):
        ctx[name] = text
        ctx.publish("steps_done", step)
        ctx.log("wrote a part of the address", name=name)
        deadline = time.monotonic() + pause_s * (1 if step < 3 else 1_000)
        while time.monotonic() < deadline and not ctx.cancelled:
            time.sleep(0.01)
    return f"{street}, {postcode} {town}"
