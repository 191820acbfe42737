"""The Datasette plugin that makes the site: permissions, links from cells to pages, and the pages themselves."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Final
from urllib.parse import urlencode

from datasette.utils.asgi import Response
from datasette.views.base import DatasetteError
from markupsafe import Markup
from pluggy import HookimplMarker

from dspex_persist.audit.comparing import compare_calls, compare_versions
from dspex_persist.audit.drawing import MASKED, Links, render_template
from dspex_persist.audit.pictures import Chart, chart, lineage
from dspex_persist.audit.report import gather
from dspex_persist.audit.web.questions import DATABASE, QUERIES, VIEWS
from dspex_persist.state.audit import (
    AuditSource,
    ExecutionDetail,
    ExecutionQuery,
    ExecutionSummary,
    HistoryEntry,
    HistoryQuery,
    LineageNode,
    SessionQuery,
)
from dspex_persist.state.errors import (
    InvalidArgumentError,
    NotInHistoryError,
    StateError,
    VersionNotFoundError,
    quote,
)
from dspex_persist.state.lm_calls import lm_calls_of
from dspex_persist.state.model import ChangeKind
from dspex_persist.state.store.history import views

hookimpl = HookimplMarker("datasette")

_SESSIONS: Final = 200
_VERSIONS: Final = 300
_CHARTED: Final = 200_000
_DEPTH: Final = 2
_FAILED: Final = 500
_INVALID_ADDRESS: Final = "this page cannot be shown: its address is invalid"
_QUERY_ERRORS: Final = (ValueError, KeyError, views.SqlError)
_MOST_READ: Final = 200
_QUOTING: Final = frozenset({"error", "options", "messages", "answer", "hash"})
"""The columns of LM calls that may quote sensitive values."""
_LONGEST_NUMBER: Final = 9
_LARGE: Final = (1_080, 260)
_LOOPBACK: Final = frozenset({"127.0.0.1", "localhost", "[::1]"})
_STYLE: Final = "/-/dspex-persist.css"
_App = Callable[[Mapping[str, Any], Any, Any], Awaitable[None]]


def _address(page: str, **parts: str) -> str:
    return f"/{page}?{urlencode(parts, errors='replace')}"


LINKS: Final = Links(
    lambda session: _address("session", id=session),
    lambda session, name: _address("variable", session=session, name=name),
    lambda execution_id: _address("execution", id=execution_id),
    lambda before, after: _address("compare", before=before, after=after),
    lambda session, name, before, after: _address(
        "versions", session=session, name=name, before=str(before), after=str(after)
    ),
)


class Site:
    """A Datasette plugin."""

    __name__ = "dspex_persist.audit.web"
    """Datasette expects it of every plugin, as most are modules."""

    def __init__(self, source: AuditSource) -> None:
        self._source = source

    # Permissions

    @hookimpl(trylast=True)
    def permission_allowed(self, action: str, resource: Any) -> bool | None:
        """Allow the views. Tables and arbitrary SQL show sensitive values, so they need `reveal`.

        Runs last, because the last plugin that answers decides.
        """
        if action == "view-table":
            database, table = resource
            return database == DATABASE and (self._source.reveal or table in VIEWS)
        if action == "execute-sql":
            return self._source.reveal and resource == DATABASE
        return False if action == "view-database-download" else None

    @hookimpl
    def asgi_wrapper(self) -> Callable[[_App], _App]:
        """Refuse requests that this site does not serve."""

        def wrap(app: _App) -> _App:
            async def guarded(scope: Mapping[str, Any], receive: Any, send: Any) -> None:
                refusal = _refusal(scope) if scope["type"] == "http" else None
                if refusal is not None:
                    await refusal.asgi_send(send)
                else:
                    await app(scope, receive, send)

            return guarded

        return wrap

    @hookimpl
    def prepare_connection(self, conn: Any, database: str) -> None:
        """Add the reasons of commits and, with `reveal`, sensitive values.

        The views that have them take precedence over those of the file.
        """
        if database != DATABASE:
            return
        views.explain_commits(conn)
        if self._source.reveal:
            views.reveal_values(conn)

    @hookimpl(hookwrapper=True)
    def handle_exception(self, request: Any, exception: Exception) -> Generator[None, Any, None]:
        """Answer 400 to a mistake in a query, such as sorting by an unknown column.

        Wraps Datasette's own handler, which would log a traceback.
        """
        answers = yield
        sentence = _mistake(request.path, exception)
        if sentence is not None:
            answers.force_result([Response.html(render_template("web_sorry.html", sentence=sentence), status=400)])

    # Datasette's own pages

    @hookimpl
    def extra_css_urls(self) -> list[str]:
        """Add a style sheet, for dark mode on Datasette's own pages."""
        return [_STYLE]

    @hookimpl
    def render_cell(self, row: Any, value: Any, column: str) -> Markup | None:
        """Show names and ids as links, and masked values as such."""
        cells = {key: row[key] for key in row.keys()}  # noqa: SIM118 - SQLite's rows are not mappings
        if column == "value" and value is None and cells.get("sensitive"):
            return Markup('<span title="the value of a sensitive variable">{}</span>').format(MASKED)
        if (
            column in _QUOTING
            and value is None
            and cells.get("masked")
            and (column != "error" or cells.get("error_type"))
        ):
            return Markup('<span title="the session has sensitive variables: see the execution">{}</span>').format(
                MASKED
            )
        url = _page_of(column, value, cells)
        return Markup('<a href="{}">{}</a>').format(url, value) if url else None

    @hookimpl
    def register_routes(self) -> list[tuple[str, Any]]:
        """Register the additional pages."""
        return [
            (r"^/$", self._home),
            (r"^/session$", self._session),
            (r"^/variable$", self._variable),
            (r"^/execution$", self._execution),
            (r"^/compare$", self._compare),
            (r"^/versions$", self._versions),
            (rf"^{_STYLE}$", self._style),
        ]

    # Pages. Methods that read the file run on a thread, so that they do not block the event loop.

    async def _home(self) -> Any:
        return await _page(self._home_text)

    async def _session(self, request: Any) -> Any:
        return await _page(self._session_text, request.args.get("id") or "")

    async def _variable(self, request: Any) -> Any:
        return await _page(self._variable_text, request.args.get("session") or "", request.args.get("name") or "")

    async def _execution(self, request: Any) -> Any:
        return await _page(self._execution_text, request.args.get("id") or "")

    async def _compare(self, request: Any) -> Any:
        return await _page(self._compare_text, request.args.get("before") or "", request.args.get("after") or "")

    async def _versions(self, request: Any) -> Any:
        parts = (request.args.get(name) or "" for name in ("session", "name", "before", "after"))
        return await _page(self._versions_text, *parts)

    async def _style(self) -> Any:
        return Response(render_template("datasette.css"), content_type="text/css; charset=utf-8")

    def _home_text(self) -> str:
        queries = [(f"/{DATABASE}/{name}", query["title"], query["description"]) for name, query in QUERIES.items()]
        sessions = list(self._source.iterate(SessionQuery(limit=_SESSIONS + 1)))
        return render_template(
            "web_home.html",
            LINKS,
            sessions=sessions[:_SESSIONS],
            has_more=len(sessions) > _SESSIONS,
            views=[(f"/{DATABASE}/{name}", view.title, view.description) for name, view in VIEWS.items()],
            questions=queries,
        )

    def _session_text(self, session: str) -> str:
        report = gather(self._source, session)
        tables = [(title, _filtered(view, session_id=session)) for title, view in _TABLES_OF_A_SESSION]
        return render_template("web_session.html", LINKS, report=report, tables=tables)

    def _variable_text(self, session: str, name: str) -> str:
        query = HistoryQuery(session=session, variable=name, limit=_VERSIONS + 1)
        entries = list(self._source.iterate(query))
        shown = entries[:_VERSIONS]
        return render_template(
            "web_variable.html",
            LINKS,
            session=session,
            name=name,
            entries=shown,
            has_more=len(entries) > _VERSIONS,
            chart=self._chart(session, name),
            lineage=lineage(nodes) if (nodes := self._blame(session, shown)) else None,
            table=_filtered("v_variable_history", session_id=session, name=name),
        )

    def _chart(self, session: str, name: str) -> Chart | None:
        """Return the chart of all versions, or of the newest if there are very many."""
        query = HistoryQuery(session=session, variable=name, limit=_CHARTED)
        return chart(self._source.iterate(query), *_LARGE, newest_first=True)

    def _blame(self, session: str, entries: Sequence[HistoryEntry]) -> tuple[LineageNode, ...]:
        """Return which versions the newest one was derived from."""
        newest = entries[0] if entries else None
        if newest is None or newest.execution_id is None or newest.kind is ChangeKind.DELETED:
            return ()
        return self._source.blame(session, newest.variable_id, str(newest.sequence), _DEPTH)

    def _execution_text(self, execution_id: str) -> str:
        one = self._source.execution(execution_id)
        return render_template(
            "web_execution.html",
            LINKS,
            one=one,
            read_versions=dict(self._read_by(one)),
            others=list(self._comparable(one.summary)) if one.recorded.get("lm") else [],
        )

    def _comparable(self, one: ExecutionSummary) -> Iterator[tuple[str, str]]:
        """Yield the executions of the same tool in the session to compare an execution with, and what they are."""
        before = {"until": str(one.began_sequence - 1), "newest_first": True}
        after = {"since": str(one.began_sequence), "newest_first": False}
        for title, place in (("the execution before", before), ("the one after", after)):
            query = ExecutionQuery(session=one.session_id, tool=one.tool, limit=1, **place)  # type: ignore[arg-type]
            # The names may be patterns that match others, too.
            others = (
                each
                for each in self._source.iterate(query)
                if (each.session_id, each.tool) == (one.session_id, one.tool)
            )
            yield from ((title, other.execution_id) for other in others)

    def _compare_text(self, before: str, after: str) -> str:
        one, other = map(self._source.execution, (before, after))
        calls = (lm_calls_of(each, children=True) for each in (one, other))
        return render_template("web_compare.html", LINKS, before=one, after=other, pairs=compare_calls(*calls))

    def _versions_text(self, session: str, name: str, before: str, after: str) -> str:
        numbers = (_version_number(each) for each in (before, after))
        versions = compare_versions(self._source, session, name, *numbers)
        return render_template("web_versions.html", LINKS, versions=versions)

    def _read_by(self, one: ExecutionDetail) -> Iterator[tuple[tuple[str, int], HistoryEntry]]:
        """Yield the versions that it and the executions it called read: the first ones, without those pruned."""
        session = one.summary.session_id
        for read in islice(one.all_reads(), _MOST_READ):
            if read.variable_id is not None and read.version is not None:
                with suppress(VersionNotFoundError, NotInHistoryError):
                    entry = self._source.version(session, read.variable_id, read.version)
                    yield (read.variable_id, read.version), entry


_TABLES_OF_A_SESSION: Final = (
    ("all versions", "v_variable_history"),
    ("all executions", "v_executions"),
    ("all commits", "v_commits"),
)


def _version_number(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > _LONGEST_NUMBER:
        raise InvalidArgumentError("version", f"{quote(text)} is not the number of a version")
    return int(text)


def _filtered(view: str, **conditions: str) -> str:
    exact = {f"{column}__exact": wanted for column, wanted in conditions.items()}
    return f"/{DATABASE}/{view}?{urlencode(exact, errors='replace')}"


def _mistake(path: str, exception: Exception) -> str | None:
    """Return the mistake in a request to Datasette, or None if the site itself failed.

    Datasette's pages raise Python's and SQLite's errors for an invalid address, such as letters instead of a number.
    """
    if isinstance(exception, DatasetteError):
        return exception.message or _INVALID_ADDRESS if exception.status == _FAILED else None
    is_datasettes = re.match(rf"/{DATABASE}(?![^/.])", path) is not None
    return _INVALID_ADDRESS if is_datasettes and isinstance(exception, _QUERY_ERRORS) else None


async def _page(text: Callable[..., str], *parts: str) -> Any:
    try:
        return Response.html(await asyncio.to_thread(text, *parts))
    except StateError as error:
        return Response.html(render_template("web_sorry.html", sentence=str(error)), status=404)


def _refusal(scope: Mapping[str, Any]) -> Any:
    """Return the response to a request that is refused, or None.

    Refused are requests for another host name (DNS rebinding would let other sites read this one), methods that would
    change something, and Datasette's pages about itself, which reveal where the file is.
    """
    path = str(scope["path"])
    if not _is_local(scope["headers"]):
        return Response.text("this site answers to 127.0.0.1 and localhost only", status=403)
    if scope["method"] not in ("GET", "HEAD"):
        return Response.text("this site only answers queries: use GET", status=405, headers={"allow": "GET, HEAD"})
    if path.startswith("/-/") and path != _STYLE and not path.startswith("/-/static"):
        return Response.text("there is no such page", status=404)
    return None


def _is_local(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    host = next((text.decode("latin-1") for name, text in headers if name == b"host"), "")
    return host.lower().rpartition(":")[0] in _LOOPBACK or host.lower() in _LOOPBACK


def _page_of(column: str, value: Any, row: Mapping[str, Any]) -> str:
    """Return the link of a cell, or "" for none."""
    if not isinstance(value, str) or not value:
        return ""
    if column == "session_id":
        return LINKS.session(value)
    if column in ("execution_id", "parent_id") or (column == "cause" and value.startswith("exec_")):
        return LINKS.execution(value)
    if column == "name" and isinstance(session := row.get("session_id"), str):
        return LINKS.variable(session, value)
    return ""
