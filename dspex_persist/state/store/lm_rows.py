"""The rows of `lm_calls`, where Python makes them. In a SQLite file, a trigger makes the same ones."""

from collections.abc import Iterator
from typing import Any, Final

from dspex_persist.state.lm_calls import counted_calls
from dspex_persist.state.values.json_text import stored_object

_MARK: Final = '"lm"'


def rows_of(sequence: int, event_ordinal: int, body: str, created_at: int) -> Iterator[tuple[Any, ...]]:
    """Yield the rows for the LM calls that an execution recorded, in the order of the columns of `lm_calls`.

    Args:
        sequence: The commit that ended the execution.
        event_ordinal: The place of the event of its end in that commit.
        body: The event, as it is stored.
        created_at: The time of the commit, in microseconds since the epoch.
    """
    if _MARK not in body:
        return
    event = stored_object(body)
    recorded, execution_id = event.get("recorded"), event.get("execution_id")
    if not isinstance(recorded, dict) or not isinstance(execution_id, str):
        return
    began = int(execution_id.split("_")[1])
    for number, call in counted_calls(recorded):
        at = created_at if call.at_us is None else call.at_us
        cached = None if call.cached is None else int(call.cached)
        yield (
            *(sequence, event_ordinal, number, began, call.ordinal, _text(call.model), at, call.latency_us),
            *(call.input_tokens, call.output_tokens, call.total_tokens, call.cost, cached, int(call.failed)),
        )


def _text(text: str) -> str:
    """Return a text that the database can store: with U+FFFD where it has U+0000 or half of a character."""
    return text.replace("\0", "\ufffd").encode(errors="surrogatepass").decode(errors="replace")
