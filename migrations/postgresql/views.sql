-- The views v_* as on SQLite, column for column: their columns are promised (docs/schema.md).
-- Numbers in documents that are no numbers are empty; flags are booleans.

-- The execution that made a version: a transaction's commit has what all its executions made, each of which says at its
-- end what it wrote. That is asked only where there are several.
CREATE FUNCTION dspex_maker(cause TEXT, made_in BIGINT, name TEXT, version BIGINT) RETURNS BIGINT LANGUAGE plpgsql STABLE
AS $$ DECLARE found BIGINT; BEGIN
    IF cause !~ '^exec_[0-9]' THEN RETURN NULL; END IF;
    IF EXISTS (SELECT 1 FROM executions AS called WHERE called.parent_id = cause) THEN
        SELECT dspex_number(substr(json_extract(ending.body, '$.execution_id'), 6)) INTO found
        FROM events AS ending CROSS JOIN json_each(dspex_sound(ending.body), '$.writes') AS written
        WHERE ending.sequence = made_in AND ending.kind = 'execution_ended'
            AND json_extract(written.value, '$[0]') = name AND dspex_integer_at(written.value, '$[1]') = version
        LIMIT 1;
    END IF;
    RETURN coalesce(found, dspex_number(substr(cause, 6)));
END $$;

CREATE FUNCTION dspex_value_number(value TEXT) RETURNS DOUBLE PRECISION LANGUAGE plpgsql IMMUTABLE STRICT AS $$ BEGIN
    IF value !~ '^-?[0-9]' THEN RETURN NULL; END IF;
    RETURN value::double precision;
EXCEPTION WHEN OTHERS THEN RETURN NULL; END $$;

CREATE VIEW v_commits AS
SELECT commits.sequence, sessions.session_id, commits.actor, commits.cause,
    dspex_time(commits.created_at) AS created_at, encode(commits.hash, 'hex') AS hash,
    (SELECT count(*) FROM versions WHERE versions.sequence = commits.sequence) AS versions,
    (SELECT json_group_array(events.kind ORDER BY events.ordinal) FROM events
        WHERE events.sequence = commits.sequence) AS events,
    EXISTS (SELECT 1 FROM pruned WHERE pruned.sequence = commits.sequence) AS pruned
FROM commits JOIN sessions ON sessions.session_key = commits.session_key;

CREATE VIEW v_executions AS
SELECT sessions.session_id, executions.execution_id, executions.tool, executions.status, executions.attempt,
    executions.parent_id, executions.idempotency_key,
    json_extract(dspex_sound(beginning.body), '$.isolation') AS isolation,
    json_extract(dspex_sound(beginning.body), '$.worker_id') AS worker_id,
    began.actor, executions.began_sequence, dspex_time(began.created_at) AS began_at,
    executions.ended_sequence, dspex_time(ended.created_at) AS ended_at,
    dspex_integer_at(dspex_sound(ending.body), '$.duration_us') AS duration_us,
    json_extract(dspex_sound(beginning.body), '$.parameters') AS parameters,
    json_extract(dspex_sound(beginning.body), '$.metadata') AS metadata,
    json_extract(dspex_sound(ending.body), '$.result.json') AS result,
    json_extract(dspex_sound(ending.body), '$.failure.type') AS error_type,
    coalesce(
        json_extract(dspex_sound(ending.body), '$.failure.message'),
        json_extract(dspex_sound(ending.body), '$.reason'),
        (SELECT string_agg(
            json_extract(met.value, '$.name') || CASE
                WHEN json_extract(met.value, '$.reason') <> '' THEN ': ' || json_extract(met.value, '$.reason')
                ELSE ' (was ' || coalesce('at version ' || json_extract(met.value, '$.expected'), 'not there')
                    || ', is ' || coalesce('at version ' || json_extract(met.value, '$.actual'), 'not there') || ')'
            END, ', ' ORDER BY met.key::bigint)
        FROM json_each(dspex_sound(ending.body), '$.conflicts') AS met),
        CASE WHEN NOT json_valid(ending.body)
            THEN 'its entry in the journal is no JSON; dspex-persist audit show reads it'
        WHEN ending.sequence IS NOT NULL THEN CASE executions.status
            WHEN 'interrupted' THEN 'the server ended while it ran'
            WHEN 'cancelled' THEN 'its client gave it up'
        END END
    ) AS error,
    CASE WHEN executions.status = 'conflict' THEN (
        SELECT later.execution_id FROM executions AS later 
        JOIN events AS beginning ON beginning.sequence = later.began_sequence AND beginning.kind = 'execution_began'
        WHERE later.session_key = executions.session_key AND later.began_sequence > executions.began_sequence
            AND later.tool = executions.tool AND later.attempt = executions.attempt + 1
            AND json_extract(dspex_sound(beginning.body), '$.retry_of') = executions.execution_id
    ) END AS retried_by,
    CASE WHEN executions.status <> 'conflict' THEN executions.status ELSE (
        WITH RECURSIVE attempts(session_key, began_sequence, tool, attempt, execution_id, status) AS (
            SELECT executions.session_key, executions.began_sequence, executions.tool, executions.attempt,
                executions.execution_id, executions.status
            UNION ALL
            SELECT later.session_key, later.began_sequence, later.tool, later.attempt, later.execution_id, later.status
            FROM attempts CROSS JOIN executions AS later 
        JOIN events AS beginning ON beginning.sequence = later.began_sequence AND beginning.kind = 'execution_began'
        WHERE later.session_key = attempts.session_key AND later.began_sequence > attempts.began_sequence
            AND later.tool = attempts.tool AND later.attempt = attempts.attempt + 1
            AND json_extract(dspex_sound(beginning.body), '$.retry_of') = attempts.execution_id
        )
        SELECT status FROM attempts ORDER BY attempt DESC LIMIT 1
    ) END AS ended_as
FROM executions
JOIN sessions ON sessions.session_key = executions.session_key
JOIN commits AS began ON began.sequence = executions.began_sequence
LEFT JOIN commits AS ended ON ended.sequence = executions.ended_sequence
LEFT JOIN events AS beginning ON beginning.sequence = executions.began_sequence AND beginning.kind = 'execution_began'
LEFT JOIN events AS ending ON ending.sequence = executions.ended_sequence AND ending.kind = 'execution_ended'
    AND CASE WHEN json_valid(ending.body) THEN json_extract(ending.body, '$.execution_id') = executions.execution_id
        ELSE strpos(ending.body, executions.execution_id) > 0 END;

CREATE VIEW v_execution_reads AS
SELECT sessions.session_id, executions.execution_id, executions.tool, seen.key AS asked,
    json_extract(seen.value, '$[0]') AS name, json_extract(seen.value, '$[1]') AS variable_id,
    dspex_integer_at(seen.value, '$[2]') AS version
FROM executions
JOIN sessions ON sessions.session_key = executions.session_key
JOIN events AS ending ON ending.sequence = executions.ended_sequence AND ending.kind = 'execution_ended'
    AND CASE WHEN json_valid(ending.body) THEN json_extract(ending.body, '$.execution_id') = executions.execution_id
        ELSE strpos(ending.body, executions.execution_id) > 0 END
CROSS JOIN LATERAL json_each(dspex_sound(ending.body), '$.reads') AS seen;

CREATE VIEW v_execution_writes AS
SELECT sessions.session_id, executions.execution_id, executions.tool,
    json_extract(written.value, '$[0]') AS name, dspex_integer_at(written.value, '$[1]') AS version,
    place.name = 'published' AS published
FROM executions
JOIN sessions ON sessions.session_key = executions.session_key
JOIN events AS ending ON ending.sequence = executions.ended_sequence AND ending.kind = 'execution_ended'
    AND CASE WHEN json_valid(ending.body) THEN json_extract(ending.body, '$.execution_id') = executions.execution_id
        ELSE strpos(ending.body, executions.execution_id) > 0 END
CROSS JOIN (VALUES ('writes'), ('published')) AS place(name)
CROSS JOIN LATERAL json_each(dspex_sound(ending.body), '$.' || place.name) AS written;

CREATE VIEW v_rules AS
SELECT sessions.session_id, rules.name, rules.expression, rules.description, rules.added_sequence
FROM rules JOIN sessions ON sessions.session_key = rules.session_key
WHERE sessions.ended_sequence IS NULL;

CREATE VIEW v_variable_history AS
SELECT sessions.session_id, variables.name, variables.variable_id, variables.type, versions.version,
    CASE versions.kind WHEN 0 THEN 'registered' WHEN 1 THEN 'set' WHEN 2 THEN 'rolled_back'
        WHEN 3 THEN 'deleted' WHEN 4 THEN 'lock_broken' WHEN 5 THEN 'published' END AS kind,
    CASE versions.source WHEN 0 THEN 'elixir' ELSE 'python' END AS source,
    CASE WHEN NOT dspex_is_sensitive(variables.metadata)
        THEN coalesce(versions.value, convert_from(of_value.content, 'UTF8')) END AS value,
    CASE WHEN NOT dspex_is_sensitive(variables.metadata) THEN dspex_value_number(versions.value) END AS number,
    length(coalesce(versions."binary", of_binary.content)) AS binary_size_bytes,
    dspex_is_sensitive(variables.metadata) AS sensitive,
    versions.metadata, versions.sequence, dspex_time(commits.created_at) AS created_at, commits.actor, commits.cause,
    executions.execution_id, executions.tool, callers.execution_id AS caller_id, callers.tool AS caller_tool,
    json_extract(dspex_sound(versions.metadata), '$."dspex.reason"') AS reason
FROM versions
JOIN variables ON variables.variable_key = versions.variable_key
JOIN sessions ON sessions.session_key = variables.session_key
JOIN commits ON commits.sequence = versions.sequence
LEFT JOIN executions ON executions.began_sequence
        = dspex_maker(commits.cause, versions.sequence, variables.name, versions.version)
    AND (executions.execution_id = commits.cause OR executions.parent_id IS NOT NULL)
LEFT JOIN executions AS callers ON callers.began_sequence = dspex_number(substr(executions.parent_id, 6))
    AND callers.execution_id = executions.parent_id
LEFT JOIN blobs AS of_value ON of_value.blob_key = versions.value_blob
LEFT JOIN blobs AS of_binary ON of_binary.blob_key = versions.binary_blob;

CREATE VIEW v_current_variables AS
SELECT sessions.session_id, variables.name, variables.variable_id, variables.type, versions.version,
    CASE versions.kind WHEN 0 THEN 'registered' WHEN 1 THEN 'set' WHEN 2 THEN 'rolled_back'
        WHEN 3 THEN 'deleted' WHEN 4 THEN 'lock_broken' WHEN 5 THEN 'published' END AS kind,
    CASE versions.source WHEN 0 THEN 'elixir' ELSE 'python' END AS source,
    CASE WHEN NOT dspex_is_sensitive(variables.metadata)
        THEN coalesce(versions.value, convert_from(of_value.content, 'UTF8')) END AS value,
    CASE WHEN NOT dspex_is_sensitive(variables.metadata) THEN dspex_value_number(versions.value) END AS number,
    length(coalesce(versions."binary", of_binary.content)) AS binary_size_bytes,
    dspex_is_sensitive(variables.metadata) AS sensitive,
    variables.constraints, variables.metadata, versions.sequence, dspex_time(commits.created_at) AS created_at, commits.actor, commits.cause,
    executions.execution_id, executions.tool, callers.execution_id AS caller_id, callers.tool AS caller_tool,
    json_extract(dspex_sound(versions.metadata), '$."dspex.reason"') AS reason
FROM variables AS live
JOIN versions ON versions.variable_key = live.variable_key AND versions.version = (
    SELECT max(newest.version) FROM versions AS newest WHERE newest.variable_key = live.variable_key
)
JOIN variables ON variables.variable_key = versions.variable_key
JOIN sessions ON sessions.session_key = variables.session_key
JOIN commits ON commits.sequence = versions.sequence
LEFT JOIN executions ON executions.began_sequence
        = dspex_maker(commits.cause, versions.sequence, variables.name, versions.version)
    AND (executions.execution_id = commits.cause OR executions.parent_id IS NOT NULL)
LEFT JOIN executions AS callers ON callers.began_sequence = dspex_number(substr(executions.parent_id, 6))
    AND callers.execution_id = executions.parent_id
LEFT JOIN blobs AS of_value ON of_value.blob_key = versions.value_blob
LEFT JOIN blobs AS of_binary ON of_binary.blob_key = versions.binary_blob
WHERE live.deleted_sequence IS NULL AND sessions.ended_sequence IS NULL;

-- Every part of the calls, also where it may quote values of sensitive variables: for those who may see them.
CREATE VIEW lm_calls_in_full AS
SELECT sessions.session_id, executions.execution_id, executions.tool, lm_calls.ordinal, lm_calls.model,
    call.body ->> '$.predictor' AS predictor,
    dspex_time(lm_calls.at) AS began_at, lm_calls.latency_us,
    lm_calls.input_tokens, lm_calls.output_tokens, lm_calls.total_tokens, lm_calls.cost, lm_calls.cached,
    (call.body ->> '$.concurrent')::boolean AS concurrent,
    call.body ->> '$.error.type' AS error_type,
    call.body ->> '$.error.message' AS error,
    call.body -> '$.variables' AS variables,
    call.body -> '$.request.options' AS options,
    call.body -> '$.request.messages' AS messages,
    coalesce(call.body -> '$.response.outputs', call.body -> '$.response.typed.message') AS answer,
    call.body ->> '$.hash' AS hash,
    EXISTS (SELECT 1 FROM variables
        WHERE variables.session_key = executions.session_key AND dspex_is_sensitive(variables.metadata)) AS masked,
    lm_calls.sequence
FROM lm_calls
JOIN executions ON executions.began_sequence = lm_calls.began_sequence
JOIN sessions ON sessions.session_key = executions.session_key
JOIN events AS ending ON ending.sequence = lm_calls.sequence AND ending.ordinal = lm_calls.event_ordinal
CROSS JOIN LATERAL (
    SELECT dspex_part_at(dspex_sound(ending.body), ARRAY['recorded', 'lm', lm_calls.number::text]) AS body
) AS call;

CREATE VIEW v_lm_calls AS
SELECT session_id, execution_id, tool, ordinal, model, predictor, began_at, latency_us,
    input_tokens, output_tokens, total_tokens, cost, cached, concurrent, error_type,
    CASE WHEN NOT masked THEN error END AS error, variables, CASE WHEN NOT masked THEN options END AS options,
    CASE WHEN NOT masked THEN messages END AS messages, CASE WHEN NOT masked THEN answer END AS answer,
    CASE WHEN NOT masked THEN hash END AS hash, masked, sequence
FROM lm_calls_in_full;

CREATE VIEW v_lm_usage AS
SELECT sessions.session_id, executions.tool, lm_calls.model, left(dspex_time(lm_calls.at), 10) AS day,
    count(*) AS calls, sum(lm_calls.failed) AS failed, dspex_whole(total(lm_calls.cached)) AS cached,
    dspex_whole(total(lm_calls.input_tokens)) AS input_tokens,
    dspex_whole(total(lm_calls.output_tokens)) AS output_tokens,
    dspex_whole(total(lm_calls.total_tokens)) AS total_tokens,
    sum(lm_calls.cost) AS cost, count(lm_calls.cost) AS priced,
    dspex_whole(total(lm_calls.latency_us)) AS latency_us
FROM lm_calls
JOIN executions ON executions.began_sequence = lm_calls.began_sequence
JOIN sessions ON sessions.session_key = executions.session_key
GROUP BY sessions.session_id, executions.tool, lm_calls.model, day;
