"""The pytest plugin: real servers, sessions and recordings for the tests of those who build on this package.

It comes with the package and is found by its entry point; what is heavy is imported by the fixture that needs it.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from freezegun.api import FrozenDateTimeFactory, StepTickTimeFactory, TickingDateTimeFactory

    from dspex_persist.cognitive.context import Context
    from dspex_persist.state.embedded import EmbeddedState
    from dspex_persist.testing.cassettes import Cassette
    from dspex_persist.testing.server import ServedDatabase

    Clock = FrozenDateTimeFactory | StepTickTimeFactory | TickingDateTimeFactory

MODES: Final = ("none", "once", "new_episodes", "all")
_MARKERS: Final = (
    "dspex_tools(*references): the tools (module[:name]) of dspex_server, dspex_provider and dspex_session",
    "dspex_replay(tape, tools=..., drive=None): replay the recording before the test; it fails where anything comes "
    "out differently. `tape` is beside the test; `drive(context)` plays the client when it is recorded",
)
_REPLAY: Final = "dspex_replay"
_USAGE: Final = "dspex_replay(tape, tools='package.module', drive=function)"
_ALL_SHOWN: Final = 2
"""From which verbosity on (-vv) all differences are shown."""
_SESSION: Final = "session"
_REAL_TIME: Final = ("_pytest", "xdist", "execnet", "grpc", "uvloop")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--dspex-record`."""
    group = parser.getgroup("dspex-persist")
    group.addoption(
        "--dspex-record",
        choices=MODES,
        default=None,
        help="when tests marked dspex_replay record anew: none (never), once (where there is no recording), "
        "new_episodes (also where calls have been added), all. Default: once, and none where CI is set.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known."""
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)


def _mode_of(config: pytest.Config) -> str:
    chosen = config.getoption("--dspex-record")
    return str(chosen or ("none" if os.environ.get("CI") else "once"))


def _references_of(request: pytest.FixtureRequest) -> tuple[str, ...]:
    marker = request.node.get_closest_marker("dspex_tools")
    return tuple(marker.args) if marker is not None else ()


@pytest.fixture
def dspex_server(request: pytest.FixtureRequest, tmp_path: Path) -> "Iterator[ServedDatabase]":
    """A real server, a process of its own on a free port, with the tools of the marker `dspex_tools`.

    It has `url` (for `dspex_persist.connect`), `target` (for gRPC), `path` (of its file), `kill`, `stop`, `restart`.
    """
    from dspex_persist.testing.server import ServedDatabase

    references = _references_of(request)
    settings = {"tools": ",".join(references)} if references else {}
    # A child inherits no sys.path: what the test can import, its server has to be able to.
    with ServedDatabase(tmp_path / "served.db", settings, import_from=request.config.rootpath) as server:
        yield server


@pytest.fixture
def dspex_provider(request: pytest.FixtureRequest, tmp_path: Path) -> "Iterator[EmbeddedState]":
    """The engine in this process, on a fresh file, with the tools of the marker `dspex_tools`."""
    from dspex_persist.testing.cassettes import open_engine

    with open_engine(tmp_path / "sessions.db", _references_of(request)) as provider:
        yield provider


@pytest.fixture
def dspex_session(dspex_provider: "EmbeddedState") -> "Context":
    """A fresh session of `dspex_provider`."""
    from dspex_persist.cognitive.context import Context

    return Context(dspex_provider, _SESSION)


@pytest.fixture
def dspex_clock() -> "Iterator[Clock]":
    """The time, frozen by freezegun where it stands; `tick` and `move_to` change it.

    Event loops, threads that wait, and gRPC keep the real time: without that, calls would never end.
    """
    try:
        from freezegun import freeze_time
    except ImportError:
        pytest.fail("the fixture dspex_clock needs freezegun: pip install 'dspex-persist[test]'", pytrace=False)
    with freeze_time(real_asyncio=True, ignore=list(_REAL_TIME)) as frozen:
        yield frozen


@pytest.fixture
def dspex_replay(request: pytest.FixtureRequest, tmp_path: Path) -> "Cassette | _Failed | Callable[..., Cassette]":
    """What the marker `dspex_replay` says, replayed: `report`, and `state`, the recorded variables at the end.

    In a test without the marker: a function that replays `(tape, tools=..., drive=None)` when it is called.
    """
    from dspex_persist.testing.cassettes import check

    config = request.config

    def replayed(
        tape: str | Path, tools: str | Sequence[str] = (), drive: Callable[..., Any] | None = None
    ) -> "Cassette":
        if not isinstance(tape, str | Path):
            pytest.fail(f"the tape is the path of a file, not {tape!r}; write {_USAGE}", pytrace=False)
        references = (tools,) if isinstance(tools, str) else tuple(tools)
        path = request.path.parent / tape
        show_all = config.get_verbosity() >= _ALL_SHOWN
        return check(path, references, drive, _mode_of(config), tmp_path, request.node.nodeid, show_all=show_all)

    marker = request.node.get_closest_marker(_REPLAY)
    if marker is None:
        return replayed
    try:
        _check_marker(request.node, marker, replayed)
        return replayed(*marker.args, **marker.kwargs)
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 -- the test fails of it, when its turn comes
        failed = request.node.stash[_FAILED] = _Failed(error)
        return failed


def _check_marker(node: pytest.Item, marker: pytest.Mark, replayed: Callable[..., object]) -> None:
    if sum(each.name == _REPLAY for each in node.own_markers) > 1:
        advice = "in a test without the marker, the fixture dspex_replay is a function that may be called often"
        pytest.fail(f"the test has the marker {_REPLAY} more than once: {advice}", pytrace=False)
    try:
        inspect.signature(replayed).bind(*marker.args, **marker.kwargs)
    except TypeError as error:
        pytest.fail(f"the marker {_REPLAY} has wrong arguments ({error}); write {_USAGE}", pytrace=False)


class _Failed:
    """What a test has in place of its tape when that does not hold. It never gets to see it, only its fixtures may."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error

    def fail(self) -> None:
        """Let the test fail as it should."""
        raise self._error


_FAILED: Final = pytest.StashKey[_Failed]()


@pytest.fixture(autouse=True)
def _dspex_replay_where_marked(request: pytest.FixtureRequest) -> None:
    """A marked test replays whether or not it asks for the fixture."""
    if request.node.get_closest_marker(_REPLAY) is not None:
        request.getfixturevalue(_REPLAY)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Fail a marked test whose recording does not hold: a failure of the test, no error of its set-up."""
    failed = item.stash.get(_FAILED, None)
    if failed is not None:
        failed.fail()
