"""The pytest plugin: real servers, sessions and recordings for the tests of programs that use this package.

pytest finds it by its entry point. Each fixture imports what it needs only when it is used.
"""

import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from freezegun.api import FrozenDateTimeFactory, StepTickTimeFactory, TickingDateTimeFactory

    from dspex_persist.cognitive.context import Context
    from dspex_persist.dspy import Playback
    from dspex_persist.state.embedded import EmbeddedState
    from dspex_persist.testing.cassettes import Cassette
    from dspex_persist.testing.server import ServedDatabase

    Clock = FrozenDateTimeFactory | StepTickTimeFactory | TickingDateTimeFactory

MODES: Final = ("none", "once", "new_episodes", "all")
_MARKERS: Final = (
    "dspex_tools(*references): the tools (module[:name]) of dspex_server, dspex_provider and dspex_session",
    "dspex_replay(tape, tools=..., drive=None): replay the recording before the test, which fails on any difference. "
    "`tape` is relative to the test's folder; `drive(context)` plays the client to make the recording",
)
_REPLAY: Final = "dspex_replay"
_USAGE: Final = "dspex_replay(tape, tools='package.module', drive=function)"
_ALL_SHOWN: Final = 2
"""The verbosity (-vv) from which all differences are shown."""
_SESSION: Final = "session"
_REAL_TIME: Final = ("_pytest", "xdist", "execnet", "grpc", "uvloop")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--dspex-record`."""
    group = parser.getgroup("dspex-persist")
    group.addoption(
        "--dspex-record",
        choices=MODES,
        default=None,
        help="when tests marked dspex_replay make their recordings: none (never), once (if the recording is missing), "
        "new_episodes (also if calls were added), all (every time). Default: once; if CI is set, none.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers."""
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
    """A server in a separate process, on a free port, with the tools of the marker `dspex_tools`.

    It has `url` (for `dspex_persist.connect`), `target` (for gRPC), `path` (its file), `kill`, `stop` and `restart`.
    """
    from dspex_persist.testing.server import ServedDatabase

    references = _references_of(request)
    settings = {"tools": ",".join(references)} if references else {}
    # A child process does not inherit sys.path, but the server must be able to import the same tools as the test.
    with ServedDatabase(tmp_path / "served.db", settings, import_from=request.config.rootpath) as server:
        yield server


@pytest.fixture
def dspex_provider(request: pytest.FixtureRequest, tmp_path: Path) -> "Iterator[EmbeddedState]":
    """The engine in this process, on a new file, with the tools of the marker `dspex_tools`."""
    from dspex_persist.testing.cassettes import open_engine

    with open_engine(tmp_path / "sessions.db", _references_of(request)) as provider:
        yield provider


@pytest.fixture
def dspex_session(dspex_provider: "EmbeddedState") -> "Context":
    """The `Context` of a new session of `dspex_provider`."""
    from dspex_persist.cognitive.context import Context

    return Context(_SESSION, dspex_provider)


@pytest.fixture
def dspex_clock() -> "Iterator[Clock]":
    """The clock, frozen at the current time by freezegun; `tick` and `move_to` change it.

    Event loops, waiting threads and gRPC keep the real time: otherwise calls would never end.
    """
    try:
        from freezegun import freeze_time
    except ImportError:
        from dspex_persist.extras import how_to_install

        pytest.fail(f"the fixture dspex_clock needs freezegun: {how_to_install('test')}", pytrace=False)
    with freeze_time(real_asyncio=True, ignore=list(_REAL_TIME)) as frozen:
        yield frozen


@pytest.fixture
def dspex_replay(request: pytest.FixtureRequest, tmp_path: Path) -> "Cassette | _Failed | Callable[..., Cassette]":
    """The replayed recording of the marker `dspex_replay`, with `report`, and `state`, its variables at the end.

    In a test without the marker, a function `(tape, tools=..., drive=None)` that replays a recording.
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
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 -- raised again when the test itself runs
        failed = request.node.stash[_FAILED] = _Failed(error)
        return failed


@pytest.fixture
def dspex_lm(request: pytest.FixtureRequest) -> "Iterator[Callable[..., Playback]]":
    """A function `(recorded, place, live=False)` that plays recorded LM calls until the end of the test.

    `recorded` is the id of an execution or a recording, `place` what `recorded_calls` accepts; a relative path is that
    of a file in the test's folder. The test fails if its program makes other calls than recorded, or not all of them.
    """
    with ExitStack() as stack:
        played = request.node.stash[_PLAYED] = _Played(stack)

        def play(recorded: str, place: Any, *, live: bool = False) -> "Playback":
            from dspex_persist.dspy import playing, recorded_calls

            if isinstance(place, Path) or (isinstance(place, str) and _is_path(place)):
                place = request.path.parent / place
            playback = stack.enter_context(playing(recorded_calls(recorded, place), live=live))
            played.playbacks.append(playback)
            return playback

        yield play


def _is_path(place: str) -> bool:
    from dspex_persist.addresses import scheme_of

    return scheme_of(place) is None and not place.lower().startswith("grpc+unix:")


class _Played:
    """The playbacks of a test, which end with it."""

    def __init__(self, stack: ExitStack) -> None:
        self.playbacks: list[Playback] = []
        self._stack = stack

    def check(self) -> None:
        """End them, and fail if the test's LM calls are not the recorded ones."""
        self._stack.close()
        told = [str(divergence) for playback in self.playbacks for divergence in playback.divergences]
        if told:
            pytest.fail("the LM calls are not the recorded ones\n\n" + "\n\n".join(told), pytrace=False)


def _check_marker(node: pytest.Item, marker: pytest.Mark, replayed: Callable[..., object]) -> None:
    if sum(each.name == _REPLAY for each in node.own_markers) > 1:
        advice = "in a test without the marker, the fixture dspex_replay is a function that can be called repeatedly"
        pytest.fail(f"the test has the marker {_REPLAY} more than once: {advice}", pytrace=False)
    try:
        inspect.signature(replayed).bind(*marker.args, **marker.kwargs)
    except TypeError as error:
        pytest.fail(f"the marker {_REPLAY} has wrong arguments ({error}); write {_USAGE}", pytrace=False)


class _Failed:
    """Takes the place of a recording that failed. The test fails before it can use it, but its fixtures may try."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __getattr__(self, name: str) -> Any:
        raise self._error

    def fail(self) -> None:
        """Raise the error of the replay."""
        raise self._error


_FAILED: Final = pytest.StashKey[_Failed]()
_PLAYED: Final = pytest.StashKey[_Played]()


@pytest.fixture(autouse=True)
def _dspex_replay_where_marked(request: pytest.FixtureRequest) -> None:
    """Replay for every marked test, even if it does not use the fixture."""
    if request.node.get_closest_marker(_REPLAY) is not None:
        request.getfixturevalue(_REPLAY)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a marked test whose replay failed, and one whose LM calls differ: as a failure, not an error around it."""
    failed = item.stash.get(_FAILED, None)
    if failed is not None:
        failed.fail()
    yield
    played = item.stash.get(_PLAYED, None)
    if played is not None:
        played.check()
