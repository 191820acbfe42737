"""dspex-persist program: the DSPy programs of a session. None of this needs DSPy."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from dspex_persist.cli import completing
from dspex_persist.cli.groups import Json, carry_out, new_group
from dspex_persist.cli.live.opening import Place
from dspex_persist.cli.live.options import Actor, Reveal, Session, Target, Why
from dspex_persist.cli.output import counted, plain, say
from dspex_persist.cli.places import Db
from dspex_persist.spelling import shorten

if TYPE_CHECKING:
    from collections.abc import Mapping

    from dspex_persist.cognitive.programs.catalog import At, Catalog, ProgramInfo, ProgramVersion
    from dspex_persist.cognitive.programs.diff import ProgramDiff
    from dspex_persist.cognitive.programs.documents import SavedPredictor, SavedProgram

_WIDTH: Final = 100

HELP: Final = (
    "Look at the DSPy programs of a session, compare their versions, tag them, and go back to one.\n\n"
    "Programs are what ctx.programs.save saves. VERSION is a number (they count from 0) or a tag. list, history, show "
    "and diff read a database, even while a server has it open, or ask a running server (--target).\n\n"
)
EPILOG: Final = (
    "[bold]Examples[/bold]\n\n"
    "dspex-persist program list support --target 127.0.0.1:50051\n\n"
    "dspex-persist program diff support answer 3 production\n\n"
    "dspex-persist program rollback support answer 3 --why 'worse on refunds'\n\n"
    "dspex-persist program tag support answer production 3\n\n"
    "[bold]Exit codes[/bold]\n\n"
    "0  success, also without any programs or differences\n\n"
    "1  no such session, program, version or tag; what is stored is no program; or the server cannot be reached\n\n"
    "2  wrong usage, or an invalid setting\n\n"
    "4  rollback, tag: another process, such as a server, has the file open\n\n"
    "5  no such file, not a dspex-persist database, another schema, or acknowledged commits are missing\n\n"
    "With --json, stdout has exactly one JSON object, also after an error; the exit codes are the same.\n\n"
)

app = new_group(HELP, EPILOG)

Name = Annotated[
    str,
    typer.Argument(metavar="NAME", help="The program's name.", show_default=False, autocompletion=completing.programs),
]
_VERSION: Final = "The number of a version, or a tag."


@contextmanager
def _reading(place: Place, session: str, reveal: bool = False) -> "Iterator[Catalog]":
    """Open the programs of a live session, for reading."""
    from dspex_persist.cli.live.program_access import OfHistory, OfState
    from dspex_persist.cognitive.programs.catalog import Catalog

    if place.has_history:
        with place.explaining(session), place.history(reveal=reveal) as source:
            yield Catalog(OfHistory(source, session), session)
    else:
        with place.read() as state, place.explaining(session):
            yield Catalog(OfState(state, reveal=reveal), session)


@contextmanager
def _writing(place: Place, session: str) -> "Iterator[Catalog]":
    from dspex_persist.cli.live.program_access import OfState
    from dspex_persist.cognitive.programs.catalog import Catalog

    with place.opened() as state, place.explaining(session):
        yield Catalog(OfState(state, reveal=True), session)


def _at(text: str | None) -> "At":
    """Return a version as it was typed: a number, or a tag."""
    return int(text) if text is not None and text.isascii() and text.isdigit() else text


@app.command("list", help="List the programs of a session, oldest first.\n\n")
def list_(session: Session, db: Db = None, target: Target = None, as_json: Json = False) -> None:
    """List programs."""
    place = Place.of(target, db)

    def work(_: object) -> dict[str, Any]:
        with _reading(place, session) as programs:
            infos = programs.list()
        return {"session_id": session, "programs": [each.as_dict() for each in infos] if as_json else infos}

    carry_out(as_json, work, lambda report: _show_list(report["programs"]))


def _show_list(infos: "Sequence[ProgramInfo]") -> None:
    from dspex_persist.cli.audit.rendering import Column, Renderer, Table

    if not infos:
        say("no programs")
        return
    look = Renderer(is_utc=False)
    rows = [each.as_dict() for each in infos]
    columns: list[Column[dict[str, Any]]] = [
        Column("program", lambda row: plain(row["name"]), least=10, most=200),
        Column("v", lambda row: str(row["version"]), least=3, right=True),
        Column("tags", lambda row: _tags(row["tags"]), least=8, most=60),
        Column("class", lambda row: plain(row.get("class") or row.get("error", "")), least=12, most=60),
        Column("demos", lambda row: str(row.get("demos", "")), least=5, right=True),
        Column("dspy", lambda row: plain(row.get("dspy", "")), least=5, most=12),
    ]
    Table(look, columns).print(rows)


def _tags(tags: "Mapping[str, int]") -> str:
    return ", ".join(f"{plain(tag)}: {version}" for tag, version in tags.items())


@app.command(
    "history",
    help="List the versions of a program, newest first: who saved each, when and why. It may be deleted.\n\n",
)
def history(
    session: Session,
    name: Name,
    limit: Annotated[
        int, typer.Option("--limit", metavar="N", min=1, help="How many versions at most.", show_default=True)
    ] = 100,
    reveal: Reveal = False,
    db: Db = None,
    target: Target = None,
    as_json: Json = False,
) -> None:
    """List versions."""
    place = Place.of(target, db)

    def work(_: object) -> dict[str, Any]:
        with _reading(place, session, reveal) as programs:
            versions = programs.history(name, limit)
        shown = [each.as_dict() for each in versions] if as_json else versions
        return {"session_id": session, "name": name, "versions": shown}

    carry_out(as_json, work, lambda report: _show_history(report["versions"]))


def _show_history(versions: "Sequence[ProgramVersion]") -> None:
    from dspex_persist.cli.audit.rendering import Column, Renderer, Table

    look = Renderer(is_utc=False)
    columns: list[Column[ProgramVersion]] = [
        Column("v", lambda row: str(row.version), least=3, right=True),
        Column("saved", lambda row: look.time(row.at), least=look.time_width),
        Column("by", lambda row: plain(row.actor), least=8, most=60),
        Column("kind", lambda row: row.kind.value.replace("_", " "), least=6),
        Column("tags", lambda row: plain(", ".join(row.tags)), least=8, most=60),
        Column("demos", lambda row: str(row.as_dict().get("demos", "")), least=5, right=True),
        Column("why", lambda row: plain(row.reason or ""), least=10, most=200),
    ]
    Table(look, columns).print(versions)


@app.command(
    "show",
    help=(
        "Show a version of a program: its predictors with instructions, configuration and demos.\n\n"
        "With --json, the program is in full as it is stored (program).\n\n"
    ),
)
def show(
    session: Session,
    name: Name,
    version: Annotated[
        str | None, typer.Argument(metavar="VERSION", help=f"{_VERSION} [dim](the newest)[/dim]", show_default=False)
    ] = None,
    reveal: Reveal = False,
    db: Db = None,
    target: Target = None,
    as_json: Json = False,
) -> None:
    """Show a program."""
    place = Place.of(target, db)

    def work(_: object) -> dict[str, Any]:
        with _reading(place, session, reveal) as programs:
            found = programs.get(name, _at(version))
        if as_json:
            return {"session_id": session, "name": name, **found.as_dict(), "program": found.document}
        return {"version": found, "saved": found.saved}

    carry_out(as_json, work, lambda report: _show(report["version"], report["saved"]))


def _show(version: "ProgramVersion", saved: "SavedProgram") -> None:
    from dspex_persist.cli.audit.rendering import Renderer

    look = Renderer(is_utc=False)
    tags = f" [{plain(', '.join(version.tags))}]" if version.tags else ""
    say(f"{plain(version.name)}, version {version.version}{tags}: {plain(saved.kind)}, DSPy {plain(saved.dspy)}")
    why = f', "{plain(version.reason)}"' if version.reason else ""
    say(f"saved {look.time(version.at)} by {plain(version.actor)}{why}")
    for path, module in saved.modules.items():
        facts = {**module.settings, **({"tools": list(module.tools)} if module.tools else {})}
        if facts:
            say(f"{plain(path)}: {_facts(facts)}")
    for path, predictor in saved.predictors.items():
        _show_predictor(path, predictor)
    for path, k in saved.retrievers.items():
        say("", f"{plain(path)}: k={k}")
    for binding in saved.bindings:
        said = [binding.options, *binding.per.values()]
        say("", f"variables of {plain(binding.path)}: {'; '.join(_facts(each) for each in said if each)}")
    for left in saved.left_out:
        say("", f"not saved: option {plain(left.what)} of {plain(left.path)}")


def _show_predictor(path: str, predictor: "SavedPredictor") -> None:
    from dspex_persist.cognitive.programs.diff import plain_value

    sides = [
        ", ".join(f"{each.name}: {each.type}" for each in predictor.signature.fields if each.role == role)
        for role in ("input", "output")
    ]
    say("", f"{plain(path)}: {plain(' -> '.join(sides))}{' (frozen)' if predictor.frozen else ''}")
    for line in predictor.signature.instructions.splitlines():
        say(f"    {plain(line)}")
    if predictor.config:
        say(f"  config: {_facts(predictor.config)}")
    if predictor.lm is not None:
        say(f"  LM: {plain(predictor.lm.name or predictor.lm.model)}")
    if predictor.demos:
        say(f"  {counted(len(predictor.demos), 'demo')}")
    for demo in predictor.demos:
        text = _facts({field: plain_value(value) for field, value in demo.values})
        say(f"    {shorten(text, _WIDTH)}")


def _facts(facts: "Mapping[str, Any]") -> str:
    import json

    return ", ".join(f"{plain(key)}={plain(json.dumps(each, ensure_ascii=False))}" for key, each in facts.items())


@app.command(
    "diff",
    help=(
        "Compare two versions of a program: instructions as a text diff, demos, configuration, all the rest.\n\n"
        "Without versions it compares the newest with the one before; with one, that with the newest.\n\n"
    ),
)
def diff(
    session: Session,
    name: Name,
    before: Annotated[str | None, typer.Argument(metavar="BEFORE", help=_VERSION, show_default=False)] = None,
    after: Annotated[
        str | None, typer.Argument(metavar="AFTER", help=f"{_VERSION} [dim](the newest)[/dim]", show_default=False)
    ] = None,
    reveal: Reveal = False,
    db: Db = None,
    target: Target = None,
    as_json: Json = False,
) -> None:
    """Compare versions."""
    place = Place.of(target, db)

    def work(_: object) -> dict[str, Any]:
        with _reading(place, session, reveal) as programs:
            found = programs.diff(name, _at(before), _at(after))
        return {"session_id": session, **found.as_dict()} if as_json else {"diff": found}

    carry_out(as_json, work, lambda report: _show_diff(report["diff"]))


def _show_diff(found: "ProgramDiff") -> None:
    for line in found.lines():
        say(plain(line))


@app.command(
    "rollback",
    help=(
        "Make an earlier version of a program the newest again, as a new version.\n\n"
        "Its tags stay where they are. A running server owns its file: reach it with --target.\n\n"
    ),
)
def rollback(
    session: Session,
    name: Name,
    version: Annotated[str, typer.Argument(metavar="VERSION", help=_VERSION, show_default=False)],
    why: Why = None,
    actor: Actor = None,
    db: Db = None,
    target: Target = None,
    as_json: Json = False,
) -> None:
    """Go back to a version."""
    place = Place.of(target, db)

    def work(_: object) -> dict[str, Any]:
        with _writing(place, session) as programs:
            number = programs.rollback(name, _at(version), reason=why, actor=actor)
        return {"session_id": session, "name": name, "version": number, "rolled_back_to": version}

    carry_out(as_json, work, lambda report: say(f"{plain(name)} is as in {plain(version)} (v{report['version']})"))


@app.command(
    "tag",
    help=(
        "Put a tag on a version of a program, and take it off any other; without a tag, list them.\n\n"
        "A running server owns its file: reach it with --target.\n\n"
    ),
)
def tag(
    session: Session,
    name: Name,
    tag: Annotated[
        str | None, typer.Argument(metavar="TAG", help="The tag, such as production.", show_default=False)
    ] = None,
    version: Annotated[
        str | None, typer.Argument(metavar="VERSION", help=f"{_VERSION} [dim](the newest)[/dim]", show_default=False)
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Take the tag off.")] = False,
    why: Why = None,
    actor: Actor = None,
    db: Db = None,
    target: Target = None,
    as_json: Json = False,
) -> None:
    """Tag a version."""
    place = Place.of(target, db)
    if remove and (tag is None or version is not None):
        raise typer.BadParameter("--remove takes a tag, and no version")

    def work(_: object) -> dict[str, Any]:
        if tag is None:
            with _reading(place, session) as programs:
                return {"session_id": session, "name": name, "tags": programs.tags(name)}
        with _writing(place, session) as programs:
            if remove:
                programs.untag(name, tag, reason=why, actor=actor)
            else:
                programs.tag(name, tag, _at(version), reason=why, actor=actor)
            return {"session_id": session, "name": name, "tags": programs.tags(name)}

    carry_out(as_json, work, lambda report: say(_tags(report["tags"]) or "no tags"))
