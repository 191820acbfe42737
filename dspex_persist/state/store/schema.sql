-- 0009;

CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);

CREATE TABLE sessions (
        session_key INTEGER PRIMARY KEY,
        session_id TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        started_sequence INTEGER NOT NULL,
        ended_sequence INTEGER,
        ttl_s REAL,
        expires_at INTEGER,
        metadata TEXT NOT NULL
    ) STRICT
    ;

CREATE TABLE variables (
        variable_key INTEGER PRIMARY KEY,
        session_key INTEGER NOT NULL REFERENCES sessions,
        variable_id TEXT NOT NULL,
        name TEXT NOT NULL,
        type TEXT NOT NULL,
        constraints TEXT NOT NULL,
        metadata TEXT NOT NULL,
        optimization TEXT,
        deleted_sequence INTEGER
    ) STRICT
    ;

CREATE TABLE commits (
        sequence INTEGER PRIMARY KEY,
        session_key INTEGER NOT NULL REFERENCES sessions,
        actor TEXT NOT NULL,
        cause TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        hash BLOB NOT NULL
    ) STRICT
    ;

CREATE TABLE blobs (
        blob_key INTEGER PRIMARY KEY,
        digest BLOB NOT NULL UNIQUE,
        content BLOB NOT NULL
    ) STRICT
    ;

CREATE TABLE versions (
        variable_key INTEGER NOT NULL REFERENCES variables,
        version INTEGER NOT NULL,
        sequence INTEGER NOT NULL REFERENCES commits,
        kind INTEGER NOT NULL,
        source INTEGER NOT NULL,
        value TEXT,
        value_blob INTEGER REFERENCES blobs,
        binary BLOB,
        binary_blob INTEGER REFERENCES blobs,
        metadata TEXT,
        number REAL GENERATED ALWAYS AS (
            CASE WHEN value GLOB '[0-9]*' OR value GLOB '-[0-9]*' THEN CAST(value AS REAL) END
        ) VIRTUAL,
        PRIMARY KEY (variable_key, version)
    ) STRICT, WITHOUT ROWID
    ;

CREATE TABLE events (
        sequence INTEGER NOT NULL REFERENCES commits,
        ordinal INTEGER NOT NULL,
        kind TEXT NOT NULL,
        body TEXT NOT NULL,
        PRIMARY KEY (sequence, ordinal)
    ) STRICT, WITHOUT ROWID
    ;

CREATE TABLE dependencies (
        dependency_key INTEGER PRIMARY KEY,
        session_key INTEGER NOT NULL REFERENCES sessions,
        from_id TEXT NOT NULL,
        to_id TEXT NOT NULL,
        type TEXT NOT NULL,
        since_sequence INTEGER NOT NULL,
        until_sequence INTEGER
    ) STRICT
    ;

CREATE TABLE outcomes (
        session_id TEXT NOT NULL,
        idempotency_key TEXT NOT NULL,
        cause TEXT NOT NULL,
        fingerprint TEXT NOT NULL,
        result TEXT NOT NULL,
        created_at INTEGER NOT NULL,
        PRIMARY KEY (session_id, idempotency_key)
    ) STRICT, WITHOUT ROWID
    ;

CREATE UNIQUE INDEX sessions_live ON sessions (session_id) WHERE ended_sequence IS NULL;

CREATE INDEX sessions_by_id ON sessions (session_id);

CREATE INDEX sessions_by_expiry ON sessions (expires_at) WHERE ended_sequence IS NULL AND expires_at IS NOT NULL;

CREATE UNIQUE INDEX variables_live ON variables (session_key, name) WHERE deleted_sequence IS NULL;

CREATE INDEX variables_by_session ON variables (session_key);

CREATE INDEX commits_by_session ON commits (session_key, sequence);

CREATE INDEX versions_by_sequence ON versions (sequence);

CREATE INDEX dependencies_by_session ON dependencies (session_key);

CREATE INDEX events_of_locks ON events (json_extract(body, '$.variable_id'), sequence) WHERE kind IN ('optimization_started', 'optimization_stopped');

CREATE INDEX outcomes_by_age ON outcomes (created_at);

CREATE TRIGGER commits_no_update BEFORE UPDATE ON commits BEGIN SELECT RAISE(ABORT, 'commits is append-only: history is never rewritten'); END;

CREATE TRIGGER commits_no_delete BEFORE DELETE ON commits BEGIN SELECT RAISE(ABORT, 'commits is append-only: history is never rewritten'); END;

CREATE TRIGGER versions_no_update BEFORE UPDATE ON versions BEGIN SELECT RAISE(ABORT, 'versions is append-only: history is never rewritten'); END;

CREATE TRIGGER events_no_update BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'events is append-only: history is never rewritten'); END;

CREATE TRIGGER blobs_no_update BEFORE UPDATE ON blobs BEGIN SELECT RAISE(ABORT, 'blobs is append-only: history is never rewritten'); END;

CREATE TABLE executions (
        began_sequence INTEGER PRIMARY KEY REFERENCES commits,
        session_key INTEGER NOT NULL REFERENCES sessions,
        execution_id TEXT NOT NULL,
        tool TEXT NOT NULL,
        status TEXT NOT NULL,
        parent_id TEXT,
        attempt INTEGER NOT NULL,
        idempotency_key TEXT,
        fingerprint TEXT NOT NULL,
        ended_sequence INTEGER
    ) STRICT
    ;

CREATE TABLE tools (
        session_key INTEGER NOT NULL REFERENCES sessions,
        name TEXT NOT NULL,
        worker_id TEXT NOT NULL,
        address TEXT NOT NULL,
        spec TEXT NOT NULL,
        registered_sequence INTEGER NOT NULL,
        PRIMARY KEY (session_key, name)
    ) STRICT, WITHOUT ROWID
    ;

CREATE INDEX executions_running ON executions (session_key) WHERE ended_sequence IS NULL;

CREATE INDEX executions_by_session ON executions (session_key, began_sequence);

CREATE INDEX executions_by_key ON executions (session_key, idempotency_key, began_sequence) WHERE idempotency_key IS NOT NULL;

CREATE TABLE pruned (
        sequence INTEGER NOT NULL REFERENCES commits,
        marker_sequence INTEGER NOT NULL REFERENCES commits,
        residue BLOB NOT NULL,
        PRIMARY KEY (sequence, marker_sequence)
    ) STRICT, WITHOUT ROWID
    ;

CREATE TABLE imports (
        first_sequence INTEGER PRIMARY KEY REFERENCES commits,
        last_sequence INTEGER NOT NULL REFERENCES commits
    ) STRICT
    ;

CREATE TABLE metadata_entries (
        key TEXT NOT NULL,
        value TEXT NOT NULL,
        sequence INTEGER NOT NULL,
        variable_key INTEGER NOT NULL,
        version INTEGER NOT NULL,
        PRIMARY KEY (key, value, sequence, variable_key, version)
    ) STRICT, WITHOUT ROWID
    ;

CREATE INDEX variables_by_id ON variables (variable_id);

CREATE INDEX executions_by_tool ON executions (tool, began_sequence);

CREATE INDEX executions_by_parent ON executions (parent_id) WHERE parent_id IS NOT NULL;

CREATE INDEX versions_by_value_blob ON versions (value_blob) WHERE value_blob IS NOT NULL;

CREATE INDEX versions_by_binary_blob ON versions (binary_blob) WHERE binary_blob IS NOT NULL;

CREATE TRIGGER versions_no_delete BEFORE DELETE ON versions WHEN NOT EXISTS (SELECT 1 FROM pruned WHERE pruned.sequence = OLD.sequence) BEGIN SELECT RAISE(ABORT, 'versions is append-only: history is never rewritten'); END;

CREATE TRIGGER events_no_delete BEFORE DELETE ON events WHEN NOT EXISTS (SELECT 1 FROM pruned WHERE pruned.sequence = OLD.sequence) BEGIN SELECT RAISE(ABORT, 'events is append-only: history is never rewritten'); END;

CREATE TRIGGER blobs_no_delete BEFORE DELETE ON blobs WHEN EXISTS (SELECT 1 FROM versions WHERE value_blob = OLD.blob_key) OR EXISTS (SELECT 1 FROM versions WHERE binary_blob = OLD.blob_key) BEGIN SELECT RAISE(ABORT, 'blobs is append-only: history is never rewritten'); END;

CREATE TRIGGER pruned_no_update BEFORE UPDATE ON pruned BEGIN SELECT RAISE(ABORT, 'pruned is append-only: history is never rewritten'); END;

CREATE TRIGGER pruned_no_delete BEFORE DELETE ON pruned BEGIN SELECT RAISE(ABORT, 'pruned is append-only: history is never rewritten'); END;

CREATE VIEW v_commits AS
    SELECT commits.sequence, sessions.session_id, commits.actor, commits.cause,
        printf('%s.%06dZ', strftime('%Y-%m-%dT%H:%M:%S', commits.created_at / 1000000, 'unixepoch'), commits.created_at % 1000000) AS created_at, lower(hex(commits.hash)) AS hash,
        (SELECT count(*) FROM versions WHERE versions.sequence = commits.sequence) AS versions,
        (SELECT json_group_array(events.kind) FROM events WHERE events.sequence = commits.sequence) AS events,
        EXISTS (SELECT 1 FROM pruned WHERE pruned.sequence = commits.sequence) AS pruned
    FROM commits JOIN sessions ON sessions.session_key = commits.session_key;

CREATE TRIGGER versions_metadata_in AFTER INSERT ON versions WHEN json_valid(NEW.metadata) BEGIN INSERT OR IGNORE INTO metadata_entries SELECT entry.key, entry.value, NEW.sequence, NEW.variable_key, NEW.version FROM json_each(NEW.metadata) AS entry; END;

CREATE TRIGGER versions_metadata_out AFTER DELETE ON versions WHEN json_valid(OLD.metadata) BEGIN DELETE FROM metadata_entries WHERE (key, value) IN (SELECT entry.key, entry.value FROM json_each(OLD.metadata) AS entry) AND sequence = OLD.sequence AND variable_key = OLD.variable_key AND version = OLD.version; END;

CREATE VIEW v_execution_reads AS SELECT sessions.session_id, executions.execution_id, executions.tool, CASE WHEN hex(seen.key) GLOB '*ED[AB]*' THEN seen.fullkey || '' ELSE seen.key END AS asked, json_extract(seen.value, '$[0]') AS name, json_extract(seen.value, '$[1]') AS variable_id, json_extract(seen.value, '$[2]') AS version FROM executions JOIN sessions ON sessions.session_key = executions.session_key JOIN events AS ending ON ending.sequence = executions.ended_sequence AND ending.kind = 'execution_ended' AND CASE WHEN json_valid(ending.body) THEN json_extract(ending.body, '$.execution_id') = executions.execution_id ELSE instr(ending.body, executions.execution_id) > 0 END JOIN json_each(iif(json_valid(ending.body), ending.body, '{}'), '$.reads') AS seen;

CREATE VIEW v_execution_writes AS SELECT sessions.session_id, executions.execution_id, executions.tool, json_extract(written.value, '$[0]') AS name, json_extract(written.value, '$[1]') AS version, place.value = 'published' AS published FROM executions JOIN sessions ON sessions.session_key = executions.session_key JOIN events AS ending ON ending.sequence = executions.ended_sequence AND ending.kind = 'execution_ended' AND CASE WHEN json_valid(ending.body) THEN json_extract(ending.body, '$.execution_id') = executions.execution_id ELSE instr(ending.body, executions.execution_id) > 0 END JOIN json_each('["writes", "published"]') AS place JOIN json_each(iif(json_valid(ending.body), ending.body, '{}'), '$.' || place.value) AS written;

CREATE TABLE rules (
        session_key INTEGER NOT NULL REFERENCES sessions,
        name TEXT NOT NULL,
        expression TEXT NOT NULL,
        description TEXT NOT NULL,
        added_sequence INTEGER NOT NULL,
        PRIMARY KEY (session_key, name)
    ) STRICT, WITHOUT ROWID
    ;

CREATE TABLE variable_constraints (
        variable_key INTEGER NOT NULL REFERENCES variables,
        since_sequence INTEGER NOT NULL,
        constraints TEXT NOT NULL,
        PRIMARY KEY (variable_key, since_sequence)
    ) STRICT, WITHOUT ROWID
    ;

CREATE VIEW v_rules AS
    SELECT sessions.session_id, rules.name, rules.expression, rules.description, rules.added_sequence
    FROM rules JOIN sessions ON sessions.session_key = rules.session_key
    WHERE sessions.ended_sequence IS NULL;

CREATE VIEW v_variable_history AS SELECT sessions.session_id, variables.name, variables.variable_id, variables.type, versions.version, CASE versions.kind WHEN 0 THEN 'registered' WHEN 1 THEN 'set' WHEN 2 THEN 'rolled_back' WHEN 3 THEN 'deleted' WHEN 4 THEN 'lock_broken' WHEN 5 THEN 'published' END AS kind, CASE versions.source WHEN 0 THEN 'elixir' ELSE 'python' END AS source, CASE WHEN NOT (CASE WHEN json_valid(variables.metadata) THEN lower(json_extract(variables.metadata, '$.sensitive')) IS 'true' ELSE 1 END) THEN coalesce(versions.value, CAST(of_value.content AS TEXT)) END AS value, CASE WHEN NOT (CASE WHEN json_valid(variables.metadata) THEN lower(json_extract(variables.metadata, '$.sensitive')) IS 'true' ELSE 1 END) THEN versions.number END AS number, length(coalesce(versions.binary, of_binary.content)) AS binary_size_bytes, (CASE WHEN json_valid(variables.metadata) THEN lower(json_extract(variables.metadata, '$.sensitive')) IS 'true' ELSE 1 END) AS sensitive , versions.metadata, versions.sequence, printf('%s.%06dZ', strftime('%Y-%m-%dT%H:%M:%S', commits.created_at / 1000000, 'unixepoch'), commits.created_at % 1000000) AS created_at, commits.actor, commits.cause, executions.execution_id, executions.tool, callers.execution_id AS caller_id, callers.tool AS caller_tool
    , CASE WHEN json_valid(versions.metadata) THEN json_extract(versions.metadata, '$."dspex.reason"') END AS reason
 FROM versions JOIN variables ON variables.variable_key = versions.variable_key JOIN sessions ON sessions.session_key = variables.session_key JOIN commits ON commits.sequence = versions.sequence LEFT JOIN executions ON executions.began_sequence = CASE WHEN commits.cause GLOB 'exec_[0-9]*' THEN coalesce( CASE WHEN EXISTS (SELECT 1 FROM executions AS called WHERE called.parent_id = commits.cause) THEN ( SELECT CAST(substr(json_extract(iif(json_valid(ending.body), ending.body, '{}'), '$.execution_id'), 6) AS INTEGER) FROM events AS ending CROSS JOIN json_each(iif(json_valid(ending.body), ending.body, '{}'), '$.writes') AS written WHERE ending.sequence = versions.sequence AND ending.kind = 'execution_ended' AND json_extract(written.value, '$[0]') = variables.name AND json_extract(written.value, '$[1]') = versions.version LIMIT 1 ) END, CAST(substr(commits.cause, 6) AS INTEGER) ) END AND (executions.execution_id = commits.cause OR executions.parent_id IS NOT NULL) LEFT JOIN executions AS callers ON callers.began_sequence = CAST(substr(executions.parent_id, 6) AS INTEGER) AND callers.execution_id = executions.parent_id LEFT JOIN blobs AS of_value ON of_value.blob_key = versions.value_blob LEFT JOIN blobs AS of_binary ON of_binary.blob_key = versions.binary_blob;

CREATE VIEW v_current_variables AS SELECT sessions.session_id, variables.name, variables.variable_id, variables.type, versions.version, CASE versions.kind WHEN 0 THEN 'registered' WHEN 1 THEN 'set' WHEN 2 THEN 'rolled_back' WHEN 3 THEN 'deleted' WHEN 4 THEN 'lock_broken' WHEN 5 THEN 'published' END AS kind, CASE versions.source WHEN 0 THEN 'elixir' ELSE 'python' END AS source, CASE WHEN NOT (CASE WHEN json_valid(variables.metadata) THEN lower(json_extract(variables.metadata, '$.sensitive')) IS 'true' ELSE 1 END) THEN coalesce(versions.value, CAST(of_value.content AS TEXT)) END AS value, CASE WHEN NOT (CASE WHEN json_valid(variables.metadata) THEN lower(json_extract(variables.metadata, '$.sensitive')) IS 'true' ELSE 1 END) THEN versions.number END AS number, length(coalesce(versions.binary, of_binary.content)) AS binary_size_bytes, (CASE WHEN json_valid(variables.metadata) THEN lower(json_extract(variables.metadata, '$.sensitive')) IS 'true' ELSE 1 END) AS sensitive , variables.constraints, variables.metadata, versions.sequence, printf('%s.%06dZ', strftime('%Y-%m-%dT%H:%M:%S', commits.created_at / 1000000, 'unixepoch'), commits.created_at % 1000000) AS created_at, commits.actor, commits.cause, executions.execution_id, executions.tool, callers.execution_id AS caller_id, callers.tool AS caller_tool
    , CASE WHEN json_valid(versions.metadata) THEN json_extract(versions.metadata, '$."dspex.reason"') END AS reason
 FROM variables AS live JOIN versions ON versions.variable_key = live.variable_key AND versions.version = ( SELECT max(newest.version) FROM versions AS newest WHERE newest.variable_key = live.variable_key ) JOIN variables ON variables.variable_key = versions.variable_key JOIN sessions ON sessions.session_key = variables.session_key JOIN commits ON commits.sequence = versions.sequence LEFT JOIN executions ON executions.began_sequence = CASE WHEN commits.cause GLOB 'exec_[0-9]*' THEN coalesce( CASE WHEN EXISTS (SELECT 1 FROM executions AS called WHERE called.parent_id = commits.cause) THEN ( SELECT CAST(substr(json_extract(iif(json_valid(ending.body), ending.body, '{}'), '$.execution_id'), 6) AS INTEGER) FROM events AS ending CROSS JOIN json_each(iif(json_valid(ending.body), ending.body, '{}'), '$.writes') AS written WHERE ending.sequence = versions.sequence AND ending.kind = 'execution_ended' AND json_extract(written.value, '$[0]') = variables.name AND json_extract(written.value, '$[1]') = versions.version LIMIT 1 ) END, CAST(substr(commits.cause, 6) AS INTEGER) ) END AND (executions.execution_id = commits.cause OR executions.parent_id IS NOT NULL) LEFT JOIN executions AS callers ON callers.began_sequence = CAST(substr(executions.parent_id, 6) AS INTEGER) AND callers.execution_id = executions.parent_id LEFT JOIN blobs AS of_value ON of_value.blob_key = versions.value_blob LEFT JOIN blobs AS of_binary ON of_binary.blob_key = versions.binary_blob WHERE live.deleted_sequence IS NULL AND sessions.ended_sequence IS NULL;

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
    ;

CREATE VIEW lm_calls_recorded AS
    SELECT events.sequence, events.ordinal AS event_ordinal, call.key AS number,
        CAST(substr(json_extract(iif(json_valid(events.body), events.body, '{}'), '$.execution_id'), 6) AS INTEGER) AS began_sequence,
        coalesce(CASE WHEN json_type(call.value, '$.ordinal') = 'integer' AND typeof(json_extract(call.value, '$.ordinal')) = 'integer' THEN json_extract(call.value, '$.ordinal') END, call.key) AS ordinal,
        CASE WHEN json_type(call.value, '$.model') = 'text' THEN CASE WHEN hex(json_extract(call.value, '$.model')) GLOB '*ED[AB]*' THEN call.value -> '$.model' ELSE json_extract(call.value, '$.model') END ELSE '' END AS model,
        coalesce(CASE WHEN json_type(call.value, '$.at') = 'integer' AND typeof(json_extract(call.value, '$.at')) = 'integer' THEN json_extract(call.value, '$.at') END, commits.created_at) AS at,
        CASE WHEN json_type(call.value, '$.latency_us') = 'integer' AND typeof(json_extract(call.value, '$.latency_us')) = 'integer' THEN json_extract(call.value, '$.latency_us') END AS latency_us,
        (SELECT CAST(min(total(tokens), 9007199254740992) AS INTEGER) FROM (SELECT CAST(max(coalesce(CASE WHEN json_type(counts.value, '$.prompt_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.prompt_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, CASE WHEN json_type(counts.value, '$.input_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.input_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, 0.0), 0.0) AS INTEGER) AS tokens FROM json_each(ifnull(call.value -> '$.response.usage', '{}')) AS counts WHERE counts.type = 'object' AND typeof(counts.key) = 'text' UNION ALL SELECT CAST(max(coalesce(CASE WHEN json_type(counts.value, '$.prompt_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.prompt_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, CASE WHEN json_type(counts.value, '$.input_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.input_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, 0.0), 0.0) AS INTEGER) AS tokens FROM json_each(ifnull(call.value -> '$.usage', '{}')) AS counts WHERE counts.type = 'object' AND typeof(counts.key) = 'text')) AS input_tokens, (SELECT CAST(min(total(tokens), 9007199254740992) AS INTEGER) FROM (SELECT CAST(max(coalesce(CASE WHEN json_type(counts.value, '$.completion_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.completion_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, CASE WHEN json_type(counts.value, '$.output_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.output_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, 0.0), 0.0) AS INTEGER) AS tokens FROM json_each(ifnull(call.value -> '$.response.usage', '{}')) AS counts WHERE counts.type = 'object' AND typeof(counts.key) = 'text' UNION ALL SELECT CAST(max(coalesce(CASE WHEN json_type(counts.value, '$.completion_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.completion_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, CASE WHEN json_type(counts.value, '$.output_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.output_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, 0.0), 0.0) AS INTEGER) AS tokens FROM json_each(ifnull(call.value -> '$.usage', '{}')) AS counts WHERE counts.type = 'object' AND typeof(counts.key) = 'text')) AS output_tokens, (SELECT CAST(min(total(tokens), 9007199254740992) AS INTEGER) FROM (SELECT CASE WHEN CAST(max(coalesce(CASE WHEN json_type(counts.value, '$.total_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.total_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, 0.0), 0.0) AS INTEGER) > 0 THEN CAST(max(coalesce(CASE WHEN json_type(counts.value, '$.total_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.total_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, 0.0), 0.0) AS INTEGER) ELSE CAST(max(coalesce(CASE WHEN json_type(counts.value, '$.prompt_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.prompt_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, CASE WHEN json_type(counts.value, '$.input_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.input_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, 0.0), 0.0) AS INTEGER) + CAST(max(coalesce(CASE WHEN json_type(counts.value, '$.completion_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.completion_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, CASE WHEN json_type(counts.value, '$.output_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.output_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, 0.0), 0.0) AS INTEGER) END AS tokens FROM json_each(ifnull(call.value -> '$.response.usage', '{}')) AS counts WHERE counts.type = 'object' AND typeof(counts.key) = 'text' UNION ALL SELECT CASE WHEN CAST(max(coalesce(CASE WHEN json_type(counts.value, '$.total_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.total_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, 0.0), 0.0) AS INTEGER) > 0 THEN CAST(max(coalesce(CASE WHEN json_type(counts.value, '$.total_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.total_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, 0.0), 0.0) AS INTEGER) ELSE CAST(max(coalesce(CASE WHEN json_type(counts.value, '$.prompt_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.prompt_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, CASE WHEN json_type(counts.value, '$.input_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.input_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, 0.0), 0.0) AS INTEGER) + CAST(max(coalesce(CASE WHEN json_type(counts.value, '$.completion_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.completion_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, CASE WHEN json_type(counts.value, '$.output_tokens') IN ('integer', 'real') THEN CAST(max(min(json_extract(counts.value, '$.output_tokens'), 9007199254740992), -9007199254740992) AS REAL) END, 0.0), 0.0) AS INTEGER) END AS tokens FROM json_each(ifnull(call.value -> '$.usage', '{}')) AS counts WHERE counts.type = 'object' AND typeof(counts.key) = 'text')) AS total_tokens,
        CASE WHEN json_type(call.value, '$.cost') IN ('integer', 'real') THEN CAST(max(min(json_extract(call.value, '$.cost'), 9007199254740992), -9007199254740992) AS REAL) END AS cost,
        CASE json_type(call.value, '$.cached') WHEN 'true' THEN 1 WHEN 'false' THEN 0 END AS cached,
        coalesce(json_type(call.value, '$.error') = 'object', 0) AS failed
    FROM events
    JOIN commits ON commits.sequence = events.sequence
    CROSS JOIN json_each(iif(json_valid(events.body), events.body, '{}'), '$.recorded.lm') AS call
    WHERE events.kind = 'execution_ended' AND instr(events.body, '"lm"') > 0
        AND call.type = 'object' AND typeof(call.key) = 'integer'
        AND json_type(iif(json_valid(events.body), events.body, '{}'), '$.execution_id') = 'text';

CREATE INDEX lm_calls_by_execution ON lm_calls (began_sequence);

CREATE INDEX variables_sensitive ON variables (session_key) WHERE (CASE WHEN json_valid(metadata) THEN lower(json_extract(metadata, '$.sensitive')) IS 'true' ELSE 1 END);

CREATE TRIGGER events_lm_calls_in AFTER INSERT ON events
    WHEN NEW.kind = 'execution_ended' AND instr(NEW.body, '"lm"') > 0
    BEGIN
        INSERT INTO lm_calls SELECT * FROM lm_calls_recorded
        WHERE sequence = NEW.sequence AND event_ordinal = NEW.ordinal;
    END;

CREATE TRIGGER events_lm_calls_out AFTER DELETE ON events WHEN OLD.kind = 'execution_ended'
    BEGIN
        DELETE FROM lm_calls WHERE sequence = OLD.sequence AND event_ordinal = OLD.ordinal;
    END;

CREATE VIEW lm_calls_in_full AS
    SELECT sessions.session_id, executions.execution_id, executions.tool, lm_calls.ordinal, lm_calls.model,
        CASE WHEN hex(json_extract(ending.body, '$.recorded.lm[' || lm_calls.number || '].predictor')) GLOB '*ED[AB]*' THEN ending.body -> ('$.recorded.lm[' || lm_calls.number || '].predictor') ELSE json_extract(ending.body, '$.recorded.lm[' || lm_calls.number || '].predictor') END AS predictor,
        printf('%s.%06dZ', strftime('%Y-%m-%dT%H:%M:%S', lm_calls.at / 1000000, 'unixepoch'), lm_calls.at % 1000000) AS began_at, lm_calls.latency_us,
        lm_calls.input_tokens, lm_calls.output_tokens, lm_calls.total_tokens, lm_calls.cost, lm_calls.cached,
        json_extract(ending.body, '$.recorded.lm[' || lm_calls.number || '].concurrent') AS concurrent,
        CASE WHEN hex(json_extract(ending.body, '$.recorded.lm[' || lm_calls.number || '].error.type')) GLOB '*ED[AB]*' THEN ending.body -> ('$.recorded.lm[' || lm_calls.number || '].error.type') ELSE json_extract(ending.body, '$.recorded.lm[' || lm_calls.number || '].error.type') END AS error_type,
        CASE WHEN hex(json_extract(ending.body, '$.recorded.lm[' || lm_calls.number || '].error.message')) GLOB '*ED[AB]*' THEN ending.body -> ('$.recorded.lm[' || lm_calls.number || '].error.message') ELSE json_extract(ending.body, '$.recorded.lm[' || lm_calls.number || '].error.message') END AS error,
        ending.body -> ('$.recorded.lm[' || lm_calls.number || '].variables') AS variables,
        ending.body -> ('$.recorded.lm[' || lm_calls.number || '].request.options') AS options,
        ending.body -> ('$.recorded.lm[' || lm_calls.number || '].request.messages') AS messages,
        coalesce(ending.body -> ('$.recorded.lm[' || lm_calls.number || '].response.outputs'), ending.body -> ('$.recorded.lm[' || lm_calls.number || '].response.typed.message')) AS answer,
        CASE WHEN hex(json_extract(ending.body, '$.recorded.lm[' || lm_calls.number || '].hash')) GLOB '*ED[AB]*' THEN ending.body -> ('$.recorded.lm[' || lm_calls.number || '].hash') ELSE json_extract(ending.body, '$.recorded.lm[' || lm_calls.number || '].hash') END AS hash,
        
    EXISTS (SELECT 1 FROM variables INDEXED BY variables_sensitive
        WHERE variables.session_key = executions.session_key AND (CASE WHEN json_valid(metadata) THEN lower(json_extract(metadata, '$.sensitive')) IS 'true' ELSE 1 END))
 AS masked,
        lm_calls.sequence
    FROM lm_calls
    JOIN executions ON executions.began_sequence = lm_calls.began_sequence
    JOIN sessions ON sessions.session_key = executions.session_key
    JOIN events AS ending ON ending.sequence = lm_calls.sequence AND ending.ordinal = lm_calls.event_ordinal;

CREATE VIEW v_lm_calls AS
    SELECT session_id, execution_id, tool, ordinal, model, predictor, began_at, latency_us,
        input_tokens, output_tokens, total_tokens, cost, cached, concurrent, error_type,
        CASE WHEN NOT masked THEN error END AS error, variables, CASE WHEN NOT masked THEN options END AS options, CASE WHEN NOT masked THEN messages END AS messages,
        CASE WHEN NOT masked THEN answer END AS answer, CASE WHEN NOT masked THEN hash END AS hash, masked, sequence
    FROM lm_calls_in_full;

CREATE VIEW v_lm_usage AS
    SELECT sessions.session_id, executions.tool, lm_calls.model, strftime('%Y-%m-%d', lm_calls.at / 1000000, 'unixepoch') AS day,
        count(*) AS calls, sum(lm_calls.failed) AS failed, CAST(total(lm_calls.cached) AS INTEGER) AS cached,
        CAST(total(lm_calls.input_tokens) AS INTEGER) AS input_tokens,
        CAST(total(lm_calls.output_tokens) AS INTEGER) AS output_tokens,
        CAST(total(lm_calls.total_tokens) AS INTEGER) AS total_tokens,
        sum(lm_calls.cost) AS cost, count(lm_calls.cost) AS priced,
        CAST(total(lm_calls.latency_us) AS INTEGER) AS latency_us
    FROM lm_calls
    JOIN executions ON executions.began_sequence = lm_calls.began_sequence
    JOIN sessions ON sessions.session_key = executions.session_key
    GROUP BY sessions.session_id, executions.tool, lm_calls.model, day;

CREATE TABLE denials (
        denial_key INTEGER PRIMARY KEY,
        at INTEGER NOT NULL,
        last_at INTEGER NOT NULL,
        identity TEXT NOT NULL,
        peer TEXT NOT NULL,
        rpc TEXT NOT NULL,
        session_id TEXT NOT NULL,
        missing TEXT NOT NULL,
        count INTEGER NOT NULL
    ) STRICT
    ;

CREATE UNIQUE INDEX denials_by_minute ON denials (at / 60000000, identity, peer, rpc, session_id, missing);

CREATE TRIGGER denials_no_update BEFORE UPDATE ON denials
    WHEN NEW.count <= OLD.count OR NEW.last_at < OLD.last_at OR NEW.denial_key IS NOT OLD.denial_key OR NEW.at IS NOT OLD.at OR NEW.identity IS NOT OLD.identity OR NEW.peer IS NOT OLD.peer OR NEW.rpc IS NOT OLD.rpc OR NEW.session_id IS NOT OLD.session_id OR NEW.missing IS NOT OLD.missing
    BEGIN SELECT RAISE(ABORT, 'denials is append-only: it only counts on, and loses its oldest rows'); END;

CREATE TRIGGER denials_no_delete BEFORE DELETE ON denials
    WHEN EXISTS (SELECT 1 FROM denials WHERE denial_key < OLD.denial_key)
        OR NOT EXISTS (SELECT 1 FROM denials WHERE denial_key > OLD.denial_key)
    BEGIN SELECT RAISE(ABORT, 'denials is append-only: it only counts on, and loses its oldest rows'); END;

CREATE VIEW v_denials AS
    SELECT printf('%s.%06dZ', strftime('%Y-%m-%dT%H:%M:%S', at / 1000000, 'unixepoch'), at % 1000000) AS at, printf('%s.%06dZ', strftime('%Y-%m-%dT%H:%M:%S', last_at / 1000000, 'unixepoch'), last_at % 1000000) AS last_at, identity, peer, rpc, session_id, missing, count FROM denials;

CREATE VIEW v_executions AS SELECT sessions.session_id, executions.execution_id, executions.tool, executions.status, executions.attempt, executions.parent_id, executions.idempotency_key, json_extract(iif(json_valid(beginning.body), beginning.body, '{}'), '$.isolation') AS isolation, json_extract(iif(json_valid(beginning.body), beginning.body, '{}'), '$.worker_id') AS worker_id, began.actor, executions.began_sequence, printf('%s.%06dZ', strftime('%Y-%m-%dT%H:%M:%S', began.created_at / 1000000, 'unixepoch'), began.created_at % 1000000) AS began_at, executions.ended_sequence, CASE WHEN ended.sequence IS NOT NULL THEN printf('%s.%06dZ', strftime('%Y-%m-%dT%H:%M:%S', ended.created_at / 1000000, 'unixepoch'), ended.created_at % 1000000) END AS ended_at, json_extract(iif(json_valid(ending.body), ending.body, '{}'), '$.duration_us') AS duration_us, json_extract(iif(json_valid(beginning.body), beginning.body, '{}'), '$.parameters') AS parameters, json_extract(iif(json_valid(beginning.body), beginning.body, '{}'), '$.metadata') AS metadata, CASE WHEN hex(json_extract(iif(json_valid(ending.body), ending.body, '{}'), '$.result.json')) GLOB '*ED[AB]*' THEN iif(json_valid(ending.body), ending.body, '{}') -> '$.result.json' ELSE json_extract(iif(json_valid(ending.body), ending.body, '{}'), '$.result.json') END AS result, CASE WHEN hex(json_extract(iif(json_valid(ending.body), ending.body, '{}'), '$.failure.type')) GLOB '*ED[AB]*' THEN iif(json_valid(ending.body), ending.body, '{}') -> '$.failure.type' ELSE json_extract(iif(json_valid(ending.body), ending.body, '{}'), '$.failure.type') END AS error_type, coalesce(CASE WHEN hex(json_extract(iif(json_valid(ending.body), ending.body, '{}'), '$.failure.message')) GLOB '*ED[AB]*' THEN iif(json_valid(ending.body), ending.body, '{}') -> '$.failure.message' ELSE json_extract(iif(json_valid(ending.body), ending.body, '{}'), '$.failure.message') END, CASE WHEN hex(json_extract(iif(json_valid(ending.body), ending.body, '{}'), '$.reason')) GLOB '*ED[AB]*' THEN iif(json_valid(ending.body), ending.body, '{}') -> '$.reason' ELSE json_extract(iif(json_valid(ending.body), ending.body, '{}'), '$.reason') END, (SELECT group_concat( json_extract(met.value, '$.name') || CASE WHEN json_extract(met.value, '$.reason') <> '' THEN ': ' || json_extract(met.value, '$.reason') ELSE ' (was ' || coalesce('at version ' || json_extract(met.value, '$.expected'), 'not there') || ', is ' || coalesce('at version ' || json_extract(met.value, '$.actual'), 'not there') || ')' END, ', ') FROM json_each(iif(json_valid(ending.body), ending.body, '{}'), '$.conflicts') AS met) , CASE WHEN ending.body IS NOT NULL AND NOT json_valid(ending.body) THEN 'its entry in the journal is no JSON; dspex-persist audit show reads it' WHEN ending.sequence IS NOT NULL THEN CASE executions.status WHEN 'interrupted' THEN 'the server ended while it ran' WHEN 'cancelled' THEN 'its client gave it up' END END ) AS error, CASE WHEN executions.status = 'conflict' THEN ( SELECT later.execution_id FROM executions AS later CROSS JOIN events AS beginning ON beginning.sequence = later.began_sequence AND beginning.kind = 'execution_began' WHERE later.session_key = executions.session_key AND later.began_sequence > executions.began_sequence AND later.tool = executions.tool AND later.attempt = executions.attempt + 1 AND json_extract(iif(json_valid(beginning.body), beginning.body, '{}'), '$.retry_of') = executions.execution_id ) END AS retried_by, CASE WHEN executions.status <> 'conflict' THEN executions.status ELSE ( WITH RECURSIVE attempts(session_key, began_sequence, tool, attempt, execution_id, status) AS ( SELECT executions.session_key, executions.began_sequence, executions.tool, executions.attempt, executions.execution_id, executions.status UNION ALL SELECT later.session_key, later.began_sequence, later.tool, later.attempt, later.execution_id, later.status FROM attempts CROSS JOIN executions AS later CROSS JOIN events AS beginning ON beginning.sequence = later.began_sequence AND beginning.kind = 'execution_began' WHERE later.session_key = attempts.session_key AND later.began_sequence > attempts.began_sequence AND later.tool = attempts.tool AND later.attempt = attempts.attempt + 1 AND json_extract(iif(json_valid(beginning.body), beginning.body, '{}'), '$.retry_of') = attempts.execution_id ) SELECT status FROM attempts ORDER BY attempt DESC LIMIT 1 ) END AS ended_as FROM executions JOIN sessions ON sessions.session_key = executions.session_key JOIN commits AS began ON began.sequence = executions.began_sequence LEFT JOIN commits AS ended ON ended.sequence = executions.ended_sequence LEFT JOIN events AS beginning ON beginning.sequence = executions.began_sequence AND beginning.kind = 'execution_began' LEFT JOIN events AS ending ON ending.sequence = executions.ended_sequence AND ending.kind = 'execution_ended' AND CASE WHEN json_valid(ending.body) THEN json_extract(ending.body, '$.execution_id') = executions.execution_id ELSE instr(ending.body, executions.execution_id) > 0 END;

INSERT INTO alembic_version VALUES ('0009');

