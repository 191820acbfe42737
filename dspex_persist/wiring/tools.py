"""The tools of a server: those of its own process, and the pools of workers that run them."""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspex_persist.settings import PoolSettings, Settings, SettingsError, flag_of
from dspex_persist.wiring.limits import limits_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from dspex_persist.infra.workers.worker import WorkerCommand
    from dspex_persist.state.bridge.workers.pools import PoolPlan
    from dspex_persist.state.tools.ports import ToolCode
    from dspex_persist.working import Options as WorkerOptions


def load_tools(settings: Settings) -> "Mapping[str, ToolCode]":
    """Import the tools of the settings."""
    if not settings.tools:
        return {}
    from dspex_persist.cognitive.errors import DspyMissingError
    from dspex_persist.cognitive.toolbox import Toolbox

    try:
        return Toolbox.of(settings.tools, record_lm=settings.record_lm)
    except DspyMissingError as error:
        raise SettingsError("record_lm", str(error)) from error


def plans_of(settings: Settings, here: Path) -> "list[PoolPlan]":
    """Return the pools that the settings ask for."""
    from dspex_persist.infra.workers.options import PoolOptions
    from dspex_persist.infra.workers.worker import WorkerCommand
    from dspex_persist.state.bridge.workers.existing import ENVIRONMENT
    from dspex_persist.state.bridge.workers.pools import OWN, PoolPlan

    given = dict(settings.pools)
    own = given.pop(OWN, PoolSettings.model_validate({}))
    for name in ("command", "size", "tools", "streaming"):
        if getattr(own, name):
            reason = "it is the pool of this server's own tools: see the settings tools and workers"
            raise SettingsError(f"pools.{OWN}.{name}", reason)

    def options(pool: PoolSettings, size: int) -> PoolOptions:
        names = [each.name for each in dataclasses.fields(PoolOptions) if each.name in PoolSettings.model_fields]
        given = {name: getattr(pool, name) for name in names if name in pool.model_fields_set}
        return PoolOptions(**{**given, "size": size})

    def timeouts(pool: PoolSettings) -> dict[str, Any]:
        return {"ready_timeout_s": pool.ready_timeout_s, "stop_timeout_s": pool.stop_timeout_s}

    plans: list[PoolPlan] = []
    if settings.workers and settings.tools:
        command = dataclasses.replace(_worker_command(settings, here), **timeouts(own))
        named = {"size": f"workers ({flag_of('workers')})", "command": f"tools ({flag_of('tools')})"}
        plans.append(PoolPlan(OWN, command, options(own, settings.workers), settings=named))
    for name, pool in given.items():
        if not pool.command or not pool.command[0]:
            raise SettingsError(f"pools.{name}.command", "name the command line that starts a worker")
        env = {**ENVIRONMENT, **pool.env}
        command = WorkerCommand(pool.command, env=env, cwd=here / (pool.cwd or ""), **timeouts(pool))
        names = tuple(dict.fromkeys((*pool.tools, *pool.streaming)))
        more: Any = {"streaming": frozenset(pool.streaming), "takes_binary": pool.binary}
        plans.append(PoolPlan(name, command, options(pool, pool.size or 2), names, **more))
    return plans


def check_names(plans: "Iterable[PoolPlan]", tools: "Iterable[str]") -> None:
    """Refuse two tools of one name."""
    known = dict.fromkeys(tools, "tools")
    for plan in plans:
        for name in plan.tools:
            if name in known:
                raise SettingsError(f"pools.{plan.name}.tools", f"there is a tool {name!r} in {known[name]} already")
            known[name] = f"pools.{plan.name}"


def _worker_command(settings: Settings, here: Path) -> "WorkerCommand":
    """Return how a worker of ours is started: a new interpreter, which imports the tools by itself."""
    from dspex_persist.infra.workers.worker import WorkerCommand

    options = _worker_options(settings).written()
    argv = (sys.executable, "-m", "dspex_persist.working", options, "unix:{socket}", "{callback}")
    return WorkerCommand(argv, "unix:{socket}", cwd=here)


def _worker_options(settings: Settings) -> "WorkerOptions":
    from dspex_persist import __version__
    from dspex_persist.working import Options

    return Options(
        tools=settings.tools,
        record_lm=settings.record_lm,
        tool_threads=settings.tool_threads,
        max_message_bytes=int(settings.max_message_bytes),
        log_level=settings.log_level,
        otel=settings.otel,
        version=__version__,
        limits=limits_of(settings),
    )
