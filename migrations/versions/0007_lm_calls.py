"""The counts of recorded LM calls as rows, to be summed; views of the calls and of their usage."""

from pathlib import Path

from alembic import op

revision = "0007"
down_revision = "0006"

# PostgreSQL: all that SQLite has by now.
_FOLDER = Path(__file__).parents[1] / "postgresql"
_SCRIPTS = ("functions.sql", "tables.sql", "triggers.sql", "views.sql")

_TABLES = (
    # Kept by triggers. `event_ordinal`, with `sequence`: the event that has the call; `number`: its place there. `at`:
    # the time of the commit where the recording has none.
    """
    CREATE TABLE lm_calls (
        sequence INTEGER NOT NULL REFERENCES commits,
        event_ordinal INTEGER NOT NULL,
        number INTEGER NOT NULL,
        began_sequence INTEGER NOT NULL,
        ordinal INTEGER NOT NULL,
        model TEXT NOT NULL,
        at INTEGER NOT NULL,
        latency_us INTEGER,
        input_tokens INTEGER NOT NULL,
        output_tokens INTEGER NOT NULL,
        total_tokens INTEGER NOT NULL,
        cost REAL,
        cached INTEGER,
        failed INTEGER NOT NULL,
        PRIMARY KEY (sequence, event_ordinal, number)
    ) STRICT, WITHOUT ROWID
    """,
)

_IS_SENSITIVE = (
    "(CASE WHEN json_valid(metadata) THEN lower(json_extract(metadata, '$.sensitive')) IS 'true' ELSE 1 END)"
)
_INDEXES = (
    "CREATE INDEX lm_calls_by_execution ON lm_calls (began_sequence)",
    f"CREATE INDEX variables_sensitive ON variables (session_key) WHERE {_IS_SENSITIVE}",
)

_MOST = 2**53


def _text(document: str, path: str) -> str:
    """A text of a document, "" if it is none; one with half of a character that UTF-16 writes as two stays JSON."""
    plain = f"json_extract({document}, '{path}')"
    exact = f"CASE WHEN hex({plain}) GLOB '*ED[AB]*' THEN {document} -> '{path}' ELSE {plain} END"
    return f"CASE WHEN json_type({document}, '{path}') = 'text' THEN {exact} ELSE '' END"


def _integer(path: str) -> str:
    plain = f"json_extract(call.value, '{path}')"
    # A larger one than 64 bits is a double.
    return f"CASE WHEN json_type(call.value, '{path}') = 'integer' AND typeof({plain}) = 'integer' THEN {plain} END"


def _number(document: str, path: str) -> str:
    bounded = f"CAST(max(min(json_extract({document}, '{path}'), {_MOST}), -{_MOST}) AS REAL)"
    return f"CASE WHEN json_type({document}, '{path}') IN ('integer', 'real') THEN {bounded} END"


def _flag(path: str) -> str:
    return f"CASE json_type(call.value, '{path}') WHEN 'true' THEN 1 WHEN 'false' THEN 0 END"


def _count(*names: str) -> str:
    numbers = ", ".join(_number("counts.value", f"$.{name}") for name in names)
    return f"CAST(max(coalesce({numbers}, 0.0), 0.0) AS INTEGER)"


def _sum(count: str) -> str:
    """The sum over the models that a call used, of the tokens of its answer and of those that are beside it."""
    places = " UNION ALL ".join(
        f"SELECT {count} AS tokens FROM json_each(ifnull(call.value -> '{place}', '{{}}')) AS counts "
        "WHERE counts.type = 'object' AND typeof(counts.key) = 'text'"
        for place in ("$.response.usage", "$.usage")
    )
    return f"(SELECT CAST(min(total(tokens), {_MOST}) AS INTEGER) FROM ({places}))"


_IN, _OUT = _count("prompt_tokens", "input_tokens"), _count("completion_tokens", "output_tokens")
_ALL = f"CASE WHEN {_count('total_tokens')} > 0 THEN {_count('total_tokens')} ELSE {_IN} + {_OUT} END"

# What the table has to contain; an import may bring documents of any shape. Not promised, unlike the views v_*.
_BODY = "iif(json_valid(events.body), events.body, '{}')"
_RECORDED = f"""
    CREATE VIEW lm_calls_recorded AS
    SELECT events.sequence, events.ordinal AS event_ordinal, call.key AS number,
        CAST(substr(json_extract({_BODY}, '$.execution_id'), 6) AS INTEGER) AS began_sequence,
        coalesce({_integer("$.ordinal")}, call.key) AS ordinal,
        {_text("call.value", "$.model")} AS model,
        coalesce({_integer("$.at")}, commits.created_at) AS at,
        {_integer("$.latency_us")} AS latency_us,
        {_sum(_IN)} AS input_tokens, {_sum(_OUT)} AS output_tokens, {_sum(_ALL)} AS total_tokens,
        {_number("call.value", "$.cost")} AS cost,
        {_flag("$.cached")} AS cached,
        coalesce(json_type(call.value, '$.error') = 'object', 0) AS failed
    FROM events
    JOIN commits ON commits.sequence = events.sequence
    CROSS JOIN json_each({_BODY}, '$.recorded.lm') AS call
    WHERE events.kind = 'execution_ended' AND instr(events.body, '"lm"') > 0
        AND call.type = 'object' AND typeof(call.key) = 'integer'
        AND json_type({_BODY}, '$.execution_id') = 'text'
"""

_TRIGGERS = (
    """
    CREATE TRIGGER events_lm_calls_in AFTER INSERT ON events
    WHEN NEW.kind = 'execution_ended' AND instr(NEW.body, '"lm"') > 0
    BEGIN
        INSERT INTO lm_calls SELECT * FROM lm_calls_recorded
        WHERE sequence = NEW.sequence AND event_ordinal = NEW.ordinal;
    END
    """,
    """
    CREATE TRIGGER events_lm_calls_out AFTER DELETE ON events WHEN OLD.kind = 'execution_ended'
    BEGIN
        DELETE FROM lm_calls WHERE sequence = OLD.sequence AND event_ordinal = OLD.ordinal;
    END
    """,
)

_DAY = "strftime('%Y-%m-%d', lm_calls.at / 1000000, 'unixepoch')"
_TIME = "printf('%s.%06dZ', strftime('%Y-%m-%dT%H:%M:%S', lm_calls.at / 1000000, 'unixepoch'), lm_calls.at % 1000000)"
_PLACE = "'$.recorded.lm[' || lm_calls.number || ']"
_HAS_SENSITIVE = f"""
    EXISTS (SELECT 1 FROM variables INDEXED BY variables_sensitive
        WHERE variables.session_key = executions.session_key AND {_IS_SENSITIVE})
"""


def _part(path: str) -> str:
    return f"json_extract(ending.body, {_PLACE}{path}')"


def _exact(path: str) -> str:
    return f"CASE WHEN hex({_part(path)}) GLOB '*ED[AB]*' THEN {_document(path)} ELSE {_part(path)} END"


def _document(path: str) -> str:
    return f"ending.body -> ({_PLACE}{path}')"


# Every part of the calls, also where it may quote values of sensitive variables: for those who may see them.
_IN_FULL = f"""
    CREATE VIEW lm_calls_in_full AS
    SELECT sessions.session_id, executions.execution_id, executions.tool, lm_calls.ordinal, lm_calls.model,
        {_exact(".predictor")} AS predictor,
        {_TIME} AS began_at, lm_calls.latency_us,
        lm_calls.input_tokens, lm_calls.output_tokens, lm_calls.total_tokens, lm_calls.cost, lm_calls.cached,
        {_part(".concurrent")} AS concurrent,
        {_exact(".error.type")} AS error_type,
        {_exact(".error.message")} AS error,
        {_document(".variables")} AS variables,
        {_document(".request.options")} AS options,
        {_document(".request.messages")} AS messages,
        coalesce({_document(".response.outputs")}, {_document(".response.typed.message")}) AS answer,
        {_exact(".hash")} AS hash,
        {_HAS_SENSITIVE} AS masked,
        lm_calls.sequence
    FROM lm_calls
    JOIN executions ON executions.began_sequence = lm_calls.began_sequence
    JOIN sessions ON sessions.session_key = executions.session_key
    JOIN events AS ending ON ending.sequence = lm_calls.sequence AND ending.ordinal = lm_calls.event_ordinal
"""


def _unless_masked(column: str) -> str:
    return f"CASE WHEN NOT masked THEN {column} END AS {column}"


# Their columns are promised (docs/schema.md): later revisions may add some at the end, and change none.
_VIEWS = (
    f"""
    CREATE VIEW v_lm_calls AS
    SELECT session_id, execution_id, tool, ordinal, model, predictor, began_at, latency_us,
        input_tokens, output_tokens, total_tokens, cost, cached, concurrent, error_type,
        {_unless_masked("error")}, variables, {_unless_masked("options")}, {_unless_masked("messages")},
        {_unless_masked("answer")}, {_unless_masked("hash")}, masked, sequence
    FROM lm_calls_in_full
    """,
    f"""
    CREATE VIEW v_lm_usage AS
    SELECT sessions.session_id, executions.tool, lm_calls.model, {_DAY} AS day,
        count(*) AS calls, sum(lm_calls.failed) AS failed, CAST(total(lm_calls.cached) AS INTEGER) AS cached,
        CAST(total(lm_calls.input_tokens) AS INTEGER) AS input_tokens,
        CAST(total(lm_calls.output_tokens) AS INTEGER) AS output_tokens,
        CAST(total(lm_calls.total_tokens) AS INTEGER) AS total_tokens,
        sum(lm_calls.cost) AS cost, count(lm_calls.cost) AS priced,
        CAST(total(lm_calls.latency_us) AS INTEGER) AS latency_us
    FROM lm_calls
    JOIN executions ON executions.began_sequence = lm_calls.began_sequence
    JOIN sessions ON sessions.session_key = executions.session_key
    GROUP BY sessions.session_id, executions.tool, lm_calls.model, day
    """,
)


def upgrade() -> None:
    """Create them, and count the calls that are there."""
    if op.get_bind().dialect.name == "postgresql":
        driver = op.get_bind().connection.driver_connection
        assert driver is not None, "it is connected"
        for name in _SCRIPTS:
            driver.execute((_FOLDER / name).read_text(encoding="utf-8"))
        return
    connection = op.get_bind()
    fill = "INSERT INTO lm_calls SELECT * FROM lm_calls_recorded"
    for statement in (*_TABLES, _RECORDED, fill, *_INDEXES, *_TRIGGERS, _IN_FULL, *_VIEWS):
        # The driver would take a colon in the statement for a parameter of SQLAlchemy's.
        connection.exec_driver_sql(statement)
