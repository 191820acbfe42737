"""The programs of a session as data: their versions, what differs between them, their tags."""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from html import escape
from typing import Any, Final, TypeAlias

from dspex_persist.cognitive.programs.diff import ProgramDiff, compare
from dspex_persist.cognitive.programs.documents import (
    MARK,
    PROGRAMS,
    TAGS,
    SavedProgram,
    SavedTag,
    hash_of,
    parse,
    parse_tags,
    tags_variable_of,
    variable_of,
)
from dspex_persist.cognitive.programs.errors import DamagedProgramError, ProgramNotFoundError
from dspex_persist.cognitive.steps import Runs, Step, Steps, Terms, ask, verb
from dspex_persist.spelling import closest, did_you_mean, quote
from dspex_persist.state import arguments, commands, values
from dspex_persist.state.errors import (
    InvalidArgumentError,
    VariableExistsError,
    VariableNotFoundError,
    VariableReplacedError,
    VersionConflictError,
)
from dspex_persist.state.model import ChangeKind, Value, Variable, VariableVersion

At: TypeAlias = int | str | None
"""Which version of a program: its number, a tag, or None for the newest."""

_TAG: Final = re.compile(r"[A-Za-z][\w.+-]{0,63}", re.ASCII)
_NEWEST: Final = "latest"
_RETRIES: Final = 100
_MAP: Final = "map"


class ProgramVersion:
    """A version of a program. What it consists of is read when it is asked for.

    Attributes:
        name: The name of the program.
        version: The number of the version; counts from 0.
        at: When it was saved (UTC).
        actor: Who saved it.
        reason: Why, if that was said.
        kind: What made it, such as "set" or "rolled_back".
        tags: The tags that are on it.
        execution_id: The execution that saved it; None outside of tools.
        commit: The number of its commit.
    """

    def __init__(self, name: str, record: VariableVersion, tags: Sequence[str]) -> None:
        self._record = record
        self.name = name
        self.version: int = record.version
        self.at: datetime = record.created_at
        self.actor: str = record.actor
        self.reason: str | None = record.reason
        self.kind: ChangeKind = record.kind
        self.tags = tuple(tags)
        self.execution_id: str | None = record.execution_id
        self.commit: int = record.sequence

    @property
    def document(self) -> Any:
        """The JSON of the program; None if this is its deletion."""
        return None if self._record.value is None else values.decode(self._record.type, self._record.value)

    @property
    def saved(self) -> SavedProgram:
        """What the program consists of.

        Raises:
            DamagedProgramError: It is no program that this release can read.
        """
        return parse(self.name, self.version, self.document)

    def as_dict(self) -> dict[str, Any]:
        """Return what it is as plain data, without the program itself."""
        return {
            "version": self.version,
            "at": self.at.isoformat(),
            "actor": self.actor,
            "reason": self.reason,
            "kind": str(self.kind),
            "tags": list(self.tags),
            "execution_id": self.execution_id,
            "commit": self.commit,
            **_facts(self),
        }

    def __repr__(self) -> str:
        tags = f" [{', '.join(self.tags)}]" if self.tags else ""
        made = f"{self.kind} by {self.actor}, {self.at:%Y-%m-%d %H:%M:%S}"
        return f"<version {self.version} of program {self.name!r}{tags}: {made}>"


def _facts(version: ProgramVersion) -> dict[str, Any]:
    try:
        saved = version.saved
    except DamagedProgramError as error:
        return {"error": error.reason}
    return {"class": saved.kind, "dspy": saved.dspy, "predictors": len(saved.predictors), "demos": saved.demos}


class ProgramHistory(list[ProgramVersion]):
    """Versions of a program, newest first: a list, and in a notebook a table."""

    def _repr_html_(self) -> str:
        """Return the table for a notebook. Texts come from anywhere, so all of them are escaped."""
        head = "".join(
            f"<th style='text-align:left'>{each}</th>" for each in ("version", "tags", "demos", "when", "who", "why")
        )
        rows = []
        for each in self:
            facts = _facts(each)
            when = f"{each.at:%Y-%m-%d %H:%M:%S}"
            cells = (each.version, ", ".join(each.tags), facts.get("demos", ""), when, each.actor, each.reason or "")
            rows.append("".join(f"<td style='text-align:left'>{escape(str(cell))}</td>" for cell in cells))
        return f"<table><thead><tr>{head}</tr></thead><tbody><tr>{'</tr><tr>'.join(rows)}</tr></tbody></table>"


class ProgramInfo:
    """A program at one moment.

    Attributes:
        name: Its name.
        version: The number of its newest version.
        updated_at: When that was saved (UTC).
        tags: Its tags, and the versions that they are on.
    """

    def __init__(self, name: str, record: Variable, tags: Mapping[str, int]) -> None:
        self._record = record
        self.name = name
        self.version: int = record.version
        self.updated_at: datetime = record.updated_at
        self.tags = dict(tags)

    @property
    def saved(self) -> SavedProgram:
        """What the program consists of; see `ProgramVersion.saved`."""
        return parse(self.name, self.version, values.decode(self._record.type, self._record.value))

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data, without the program itself."""
        facts: dict[str, Any] = {
            "name": self.name,
            "version": self.version,
            "updated_at": self.updated_at.isoformat(),
            "tags": self.tags,
        }
        try:
            saved = self.saved
        except DamagedProgramError as error:
            return {**facts, "error": error.reason}
        return {
            **facts,
            "class": saved.kind,
            "dspy": saved.dspy,
            "predictors": len(saved.predictors),
            "demos": saved.demos,
        }

    def __repr__(self) -> str:
        tags = "".join(f", {tag}: {version}" for tag, version in self.tags.items())
        return f"<program {self.name!r}: version {self.version}{tags}>"


class Catalog(Runs):
    """The programs of a session, as far as that needs no DSPy.

    Args:
        owner: Runs the steps: a context, a tool's context or a transaction.
        session_id: The session.
    """

    def __init__(self, owner: Runs, session_id: str) -> None:
        self._owner = owner
        self._session_id = session_id

    def __repr__(self) -> str:
        return f"<programs of session {self._session_id!r}>"

    def _run_step(self, step: Step) -> Any:
        """See `Runs`."""
        return self._owner._run_step(step)

    async def _run_step_aio(self, step: Step) -> Any:
        """See `Runs`."""
        return await self._owner._run_step_aio(step)

    @verb
    def list(self) -> Steps[tuple[ProgramInfo, ...]]:
        """Return the programs of the session, oldest first."""
        records = yield from ask(commands.ListVariables(self._session_id, f"{PROGRAMS}*"))
        tagged = yield from ask(commands.ListVariables(self._session_id, f"{TAGS}*"))
        tags = {each.name.removeprefix(TAGS): _tags_in(each) for each in tagged}
        infos = []
        for record in filter(_is_program, records):
            name = record.name.removeprefix(PROGRAMS)
            infos.append(ProgramInfo(name, record, {tag: each.version for tag, each in tags.get(name, {}).items()}))
        return tuple(infos)

    @verb
    def history(self, name: str, limit: int = 0, *, before: int | None = None) -> Steps[ProgramHistory]:
        """Return versions of a program, newest first, also of one that was deleted.

        Args:
            name: The name of the program.
            limit: How many versions at most; 0 means 100.
            before: Only versions with lower numbers.

        Raises:
            ProgramNotFoundError: There never was such a program.
        """
        records = yield from self._versions(name, limit, before)
        tags = yield from self._tags(name)
        return ProgramHistory(ProgramVersion(name, record, _on(tags, record)) for record in records)

    @verb
    def get(self, name: str, version: At = None) -> Steps[ProgramVersion]:
        """Return a version of a program as data.

        Args:
            name: The name of the program.
            version: The number of the version, or a tag; None for the newest.

        Raises:
            ProgramNotFoundError: There is no such program, version or tag.
        """
        number, _ = yield from self._find(name, version)
        record = (yield from self._versions(name, 1, number + 1))[0]
        return ProgramVersion(name, record, _on((yield from self._tags(name)), record))

    @verb
    def diff(self, name: str, before: At = None, after: At = None) -> Steps[ProgramDiff]:
        """Compare two versions of a program: instructions, demos, configuration and all the rest.

        Args:
            name: The name of the program.
            before: The first version: its number or a tag; None for the one before `after`.
            after: The second version; None for the newest.

        Returns:
            What differs: print it, let a notebook show it, or take its `as_dict()`.

        Raises:
            ProgramNotFoundError: There is no such program, version or tag.
            DamagedProgramError: One of the versions is no program that this release can read.
        """
        second, value = yield from self._find(name, after)
        if before is None:
            if second == 0:
                raise ProgramNotFoundError(name, "version 0 is its first, so there is none to compare it with")
            before = second - 1
        first, earlier = yield from self._find(name, before)
        return compare(name, (first, self._read(name, first, earlier)), (second, self._read(name, second, value)))

    @verb
    def rollback(self, name: str, version: At, *, reason: str | None = None, actor: str | None = None) -> Steps[int]:
        """Make an earlier version the newest again, as a new version.

        Args:
            name: The name of the program.
            version: The number of the version, or a tag.
            reason: Why. The history keeps it.
            actor: Who asks for it; by default the actor of the context.

        Returns:
            The number of the new version.

        Raises:
            ProgramNotFoundError: There is no such program, version or tag.
        """
        if version is None:
            raise InvalidArgumentError("version", "it must say to which version: a number or a tag")
        target, _ = yield from self._find(name, version)
        command = commands.RollbackVariable(self._session_id, variable_of(name), target)
        record = yield from ask(command, _terms(actor, reason))
        return int(record.version)

    @verb
    def delete(self, name: str, *, reason: str | None = None, actor: str | None = None) -> Steps[None]:
        """Delete a program and its tags. Its history is kept.

        Raises:
            ProgramNotFoundError: There is no such program.
        """
        yield from self._current(name)
        found = yield from ask(commands.GetVariables(self._session_id, (tags_variable_of(name),)))
        # The tags first: those of a program that is gone would be taken for those of the next one of the name.
        for variable in (*found.variables, variable_of(name)):
            yield from ask(commands.DeleteVariable(self._session_id, variable), _terms(actor, reason))

    # Tags

    @verb
    def tag(
        self, name: str, tag: str, version: At = None, *, reason: str | None = None, actor: str | None = None
    ) -> Steps[int]:
        """Put a tag on a version, such as "production", and take it off any other.

        Args:
            name: The name of the program.
            tag: The tag: a letter, then letters, digits and `_.+-`.
            version: The number of the version, or another tag; None for the newest.
            reason: Why. The history of the variable `program-tags/NAME` keeps it.
            actor: Who asks for it; by default the actor of the context.

        Returns:
            The number of the version that has the tag now.

        Raises:
            ProgramNotFoundError: There is no such program, version or tag.
            InvalidArgumentError: It cannot be a tag.
        """
        checked_tag(tag)
        number, value = yield from self._find(name, version)
        saved = SavedTag(version=number, hash=hash_of(value))
        yield from self._update_tags(name, lambda tags: {**tags, tag: saved}, _terms(actor, reason))
        return number

    @verb
    def untag(self, name: str, tag: str, *, reason: str | None = None, actor: str | None = None) -> Steps[None]:
        """Take a tag off.

        Raises:
            ProgramNotFoundError: There is no such program or tag.
        """

        def without(tags: Mapping[str, SavedTag]) -> dict[str, SavedTag]:
            if tag not in tags:
                raise _no_tag(name, tag, tags)
            return {each: saved for each, saved in tags.items() if each != tag}

        yield from self._current(name)
        yield from self._update_tags(name, without, _terms(actor, reason))

    @verb
    def tags(self, name: str) -> Steps[dict[str, int]]:
        """Return the tags of a program, and the numbers of the versions that they are on.

        Raises:
            ProgramNotFoundError: There is no such program.
        """
        yield from self._current(name)
        tags = yield from self._tags(name)
        return {tag: saved.version for tag, saved in tags.items()}

    def _tags(self, name: str) -> Steps[dict[str, SavedTag]]:
        variable = tags_variable_of(name)
        record = (yield from ask(commands.GetVariables(self._session_id, (variable,)))).variables.get(variable)
        return {} if record is None else _tags_in(record)

    def _update_tags(
        self, name: str, function: Callable[[Mapping[str, SavedTag]], Mapping[str, SavedTag]], terms: Terms | None
    ) -> Steps[None]:
        variable = tags_variable_of(name)
        for attempt in range(_RETRIES + 1):
            record = (yield from ask(commands.GetVariables(self._session_id, (variable,)))).variables.get(variable)
            before = {} if record is None else _tags_in(record)
            document = {tag: saved.model_dump() for tag, saved in function(before).items()}
            try:
                yield from self._write(variable, document, None if record is None else record.version, terms)
            except (VersionConflictError, VariableReplacedError, VariableNotFoundError, VariableExistsError):
                if attempt == _RETRIES:
                    raise
            else:
                return

    # Versions

    def _write(self, variable: str, document: object, version: int | None, terms: Terms | None) -> Steps[int]:
        """Write a variable whose version is `version`, or define it if that is None; returns the new version."""
        value = values.encode(document, _MAP, name=variable)
        mark = {MARK: "1"}
        if version is None:
            yield from ask(commands.RegisterVariable(self._session_id, variable, _MAP, value, "", mark), terms)
            # Registering what exists already writes nothing.
            found = yield from ask(commands.GetVariable(self._session_id, variable))
            first = found.value
            if found.version:
                records = yield from ask(commands.GetVariableHistory(self._session_id, variable, 1, 1))
                first = records[0].value if records else None  # type: ignore[assignment]
            if first != value:
                raise VersionConflictError(variable, -1, found.version)
            return 0
        return (yield from ask(commands.SetVariable(self._session_id, variable, value, mark, version), terms))

    def _current(self, name: str) -> Steps[Variable]:
        variable = variable_of(name)
        record = (yield from ask(commands.GetVariables(self._session_id, (variable,)))).variables.get(variable)
        if record is None or not _is_program(record):
            raise (yield from self._no_program(name, record is not None))
        return record

    def _current_or_none(self, name: str) -> Steps[int | None]:
        """Return the version of a program that is about to be saved; None if there is none yet."""
        variable = variable_of(name)
        record = (yield from ask(commands.GetVariables(self._session_id, (variable,)))).variables.get(variable)
        if record is not None and not _is_program(record):
            raise (yield from self._no_program(name, is_there=True))
        return None if record is None else record.version

    def _no_program(self, name: str, is_there: bool) -> Steps[ProgramNotFoundError]:
        if is_there:
            reason = f"the variable {quote(variable_of(name))} is no program: its metadata has no {MARK!r}"
            return ProgramNotFoundError(name, reason)
        records = yield from ask(commands.ListVariables(self._session_id, f"{PROGRAMS}*"))
        known = [record.name.removeprefix(PROGRAMS) for record in records if _is_program(record)]
        near = did_you_mean(closest(name, known)) or ("" if known else "the session has none: ctx.programs.save")
        return ProgramNotFoundError(name, f"there is no such program{near and f'; {near}'}")

    def _versions(self, name: str, limit: int, before: int | None) -> Steps[Sequence[VariableVersion]]:
        try:
            return (yield from ask(commands.GetVariableHistory(self._session_id, variable_of(name), limit, before)))
        except VariableNotFoundError:
            raise (yield from self._no_program(name, is_there=False)) from None

    def _find(self, name: str, version: At) -> Steps[tuple[int, Value]]:
        """Return the number and the value of a version of a live program."""
        current = yield from self._current(name)
        if isinstance(version, str):
            return (yield from self._find_tagged(name, version))
        if version is None or arguments.short_number("version", version) == current.version:
            # In a transaction, the history does not have it yet.
            return current.version, current.value
        value = yield from self._value(name, version)
        if value is None:
            if 0 <= version <= current.version:
                raise ProgramNotFoundError(name, f"version {version} was pruned")
            raise ProgramNotFoundError(name, f"there is no version {version}; they are 0 to {current.version}")
        return version, value

    def _read(self, name: str, version: int, value: Value) -> SavedProgram:
        return parse(name, version, values.decode(_MAP, value))

    def _value(self, name: str, version: int) -> Steps[Value | None]:
        if version < 0:
            return None
        records = yield from self._versions(name, 1, version + 1)
        return records[0].value if records and records[0].version == version else None

    def _find_tagged(self, name: str, tag: str) -> Steps[tuple[int, Value]]:
        tags = yield from self._tags(name)
        saved = tags.get(tag)
        if saved is None:
            raise _no_tag(name, tag, tags)
        value = yield from self._value(name, saved.version)
        if value is not None and hash_of(value) == saved.hash:
            return saved.version, value
        current = yield from self._current(name)
        if hash_of(current.value) == saved.hash:
            return current.version, current.value
        # In a fork, versions have other numbers.
        before: int | None = None
        while True:
            records = yield from self._versions(name, 0, before)
            for each in records:
                if each.value is not None and hash_of(each.value) == saved.hash:
                    return each.version, each.value
            if not records or records[-1].version == 0:
                break
            before = records[-1].version
        reason = (
            f"the version with the tag {tag!r} is not in this session, which was forked, or went back, to a point "
            f"without it: put the tag on another version, ctx.programs.tag({name!r}, {tag!r}, version=...)"
        )
        raise ProgramNotFoundError(name, reason)


def _tags_in(record: Variable) -> dict[str, SavedTag]:
    return parse_tags(record.name.removeprefix(TAGS), record.version, values.decode(record.type, record.value))


def checked_tag(tag: object) -> str:
    """Return a tag; `InvalidArgumentError` if it cannot be one."""
    if not isinstance(tag, str) or not _TAG.fullmatch(tag) or tag == _NEWEST:
        reason = f"a tag is a letter, then up to 63 letters, digits and _.+-, and not {_NEWEST!r}; not {tag!r:.80}"
        raise InvalidArgumentError("tag", reason)
    return tag


def _no_tag(name: str, tag: object, tags: Mapping[str, SavedTag]) -> ProgramNotFoundError:
    listed = ", ".join(f"{each} ({saved.version})" for each, saved in tags.items()) or "none"
    return ProgramNotFoundError(name, f"there is no tag {tag!r:.80}; its tags: {listed}")


def _on(tags: Mapping[str, SavedTag], record: VariableVersion) -> list[str]:
    if record.value is None:
        return []
    on = [tag for tag, saved in tags.items() if saved.version == record.version]
    return [tag for tag in on if tags[tag].hash == hash_of(record.value)]


def _is_program(record: Variable) -> bool:
    return record.type == _MAP and MARK in record.metadata


def _terms(actor: str | None, reason: str | None) -> Terms | None:
    return None if actor is None and reason is None else Terms(actor, reason)
