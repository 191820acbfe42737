"""What holds for all tests."""

import gc
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from freezegun import freeze_time
from freezegun.api import FrozenDateTimeFactory

from dspex_persist.infra import forks, process
from tests import engines
from tests.engines import (  # noqa: F401 - fixtures of all tests
    own_postgres,
    own_valkey,
    postgres,
    postgresql_url,
    valkey,
    valkey_prefix,
)
from tests.prepared import Started

# Containers often forbid bytecode next to the sources. Without it, every run would rewrite the assertions of all tests
# first, and every process that a test starts would compile the whole package.
if sys.dont_write_bytecode:
    sys.dont_write_bytecode = False
    sys.pycache_prefix = str(Path(__file__).resolve().parents[1] / ".pytest_cache" / "bytecode")
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix

# A shell has what it starts in the background ignore Ctrl-C, and so would all that the tests start in turn.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Plain stubs, which tests use as clients in the field do, heed the environment's proxies even on their own machine.
for _name in ("grpc_proxy", "https_proxy", "http_proxy", "all_proxy"):
    os.environ.pop(_name, None)
    os.environ.pop(_name.upper(), None)

# An example may take long on a machine that does other things, too: what must not hang has the limit of its test.
hypothesis.settings.register_profile("dspex_persist", deadline=None)
hypothesis.settings.load_profile("dspex_persist")

# Servers, which are most of the processes that the tests start, are forks.
process.Popen = Started  # type: ignore[misc]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect no garbage meanwhile: all that is made stays, and looking through it takes a quarter of the time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    """Have the collector never look at what was collected: it would take half a second each time, and copy its pages
    in each process that a test forks.
    """
    gc.collect()
    gc.freeze()


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        engines.begin_run()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """End the process that prepares commands, if tests have used it, and the engines, once no worker runs any more."""
    if "tests.prepared" in sys.modules:
        sys.modules["tests.prepared"].close()
    if not hasattr(session.config, "workerinput"):
        engines.end_run()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Fail the test after which a thread stays in a critical section, not the next one that forks."""
    # Commands that have run in this process may have set it: they are all that a process does.
    logging.getLogger("dspex_persist").setLevel(logging.NOTSET)
    deadline = time.monotonic() + 10
    while forks.inside() and time.monotonic() < deadline:
        time.sleep(0.01)
    if left := forks.inside():
        names = {each.ident: each.name for each in threading.enumerate()}
        frames = sys._current_frames()
        where = ["".join([f"{names.get(each)}:\n", *traceback.format_stack(frames[each])]) for each in left]
        pytest.fail("threads are in critical sections after the test:\n" + "\n".join(where), pytrace=False)


@pytest.fixture(scope="module")
def own_interpreters() -> Iterator[None]:
    """For modules about the start of a server, or its memory: each server gets a new interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Started, "own_interpreters", True)
        yield


@pytest.fixture(scope="session")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with every kind of event and version, large contents and bytes. Only to be read, or copied."""
    # Not at the beginning: tests that need no database do not pay for the store.
    from tests.assets.make_database import fill

    path = tmp_path_factory.mktemp("filled") / "filled.db"
    fill(path)
    return path


@pytest.fixture(scope="class")
def standing_clock() -> Iterator[FrozenDateTimeFactory]:
    """A clock that only moves when a test moves it; pytest's continues. Stopping it is slow: do it once for a class."""
    with freeze_time("2030-01-01", ignore=["_pytest"]) as frozen:
        assert isinstance(frozen, FrozenDateTimeFactory)
        yield frozen


@pytest.fixture
def frozen(standing_clock: FrozenDateTimeFactory) -> FrozenDateTimeFactory:
    """The clock, put back to the beginning of 2030."""
    standing_clock.move_to("2030-01-01")
    return standing_clock
