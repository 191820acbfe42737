"""What type checkers refuse: each line that ends with "error" is one."""

from dspex_persist import Context


async def wrong(ctx: Context) -> None:
    ctx.set("x")  # error
    ctx.set(1, 2)  # error
    ctx.set("x", 1, raeson="why")  # error
    await ctx.set.aio("x")  # error
    await ctx.history.aio("x", limit="all")  # error
    ctx.handle("t", float).value = "hot"  # error
    ctx.handle("t", float).set("hot")  # error
    await ctx.handle("t", float).set.aio("hot")  # error
    ctx.handle("t", float).update(lambda t: str(t))  # error
    len(ctx.set("x", 1))  # error
    await Context.aopen("s", ttl_s="60")  # error
