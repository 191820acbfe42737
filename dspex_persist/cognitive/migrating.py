"""Migrating the typed variables of many sessions at once, for the command line."""

from contextlib import suppress
from typing import Any

from dspex_persist.cognitive.context import Context
from dspex_persist.cognitive.errors import MigrationError, ModelLoadError, ToolLoadError, TypedValueError
from dspex_persist.cognitive.steps import run
from dspex_persist.cognitive.toolbox import imported
from dspex_persist.cognitive.typed import declared, migrate
from dspex_persist.state.abilities import Auditable
from dspex_persist.state.audit import SessionQuery
from dspex_persist.state.errors import SessionNotFoundError, StateError
from dspex_persist.state.provider import Progress, StateProvider, silent


def load_models(reference: str) -> None:
    """Import a module that declares models with `@model`.

    Raises:
        ModelLoadError: It cannot be imported, or declares none.
    """
    try:
        imported(reference, reference)
    except ToolLoadError as error:
        raise ModelLoadError(error.reference, error.reason) from error
    if not any(declared()):
        raise ModelLoadError(reference, "it declares no models: decorate them with @model(name)")


def migrate_sessions(
    state: StateProvider, pattern: str = "*", *, write: bool = True, progress: Progress = silent
) -> dict[str, Any]:
    """Migrate the variables of live sessions whose models are declared.

    Args:
        state: Has the sessions.
        pattern: A glob of their ids.
        write: Whether to write the new values; otherwise the migrations only run.
        progress: Called after each session.

    Returns:
        A report: how many `sessions` there are, which variables were `migrated`, and which `failed` with what error.
    """
    with Auditable.of(state).audit() as audit:
        query = SessionQuery(session="" if pattern == "*" else pattern, live=True)
        sessions = [each.session_id for each in audit.iterate(query)]
    done: list[dict[str, Any]] = []
    failed: list[dict[str, Any]] = []
    names = sorted(name for name, _ in declared())
    for number, session_id in enumerate(sorted(sessions), 1):
        # It may have ended in the meantime.
        with suppress(SessionNotFoundError), Context(session_id, state, create=False) as context:
            for name in names:
                try:
                    migrated = run(context, migrate(context, name, write=write))
                except SessionNotFoundError:
                    raise
                except (MigrationError, TypedValueError, StateError) as error:
                    failed.append({"session_id": session_id, "name": name, "error": str(error)})
                else:
                    done += [] if migrated is None else [{"session_id": session_id, **migrated._asdict()}]
        progress(session_id, number, len(sessions))
    return {"sessions": len(sessions), "migrated": done, "failed": failed}
