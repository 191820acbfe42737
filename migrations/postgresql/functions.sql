-- Functions that SQLite has, so that the statements of the store are the same.
CREATE FUNCTION dspex_path(path TEXT) RETURNS TEXT[] LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
    $$ SELECT CASE WHEN path LIKE '$."%"' THEN ARRAY[substr(path, 4, length(path) - 4)]
        WHEN path LIKE '$.metadata."%"' THEN ARRAY['metadata', substr(path, 13, length(path) - 13)]
        WHEN path LIKE '$%' THEN array_remove(regexp_split_to_array(substr(path, 2), '[\[\].]+'), '')
        ELSE ARRAY[path] END $$;

CREATE FUNCTION json_extract(document TEXT, path TEXT) RETURNS TEXT LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
    $$ SELECT document::json #>> dspex_path(path) $$;

CREATE FUNCTION dspex_json_at(document TEXT, path TEXT) RETURNS TEXT LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
    $$ SELECT (document::json #> dspex_path(path))::text $$;

CREATE OPERATOR ->> (LEFTARG = TEXT, RIGHTARG = TEXT, FUNCTION = json_extract);

CREATE OPERATOR -> (LEFTARG = TEXT, RIGHTARG = TEXT, FUNCTION = dspex_json_at);

CREATE FUNCTION dspex_item(document TEXT, place INTEGER) RETURNS TEXT LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
    $$ SELECT document::json ->> place $$;

CREATE OPERATOR ->> (LEFTARG = TEXT, RIGHTARG = INTEGER, FUNCTION = dspex_item);

CREATE FUNCTION json_valid(document TEXT) RETURNS BOOLEAN LANGUAGE plpgsql IMMUTABLE PARALLEL SAFE AS
    $$ BEGIN PERFORM document::json; RETURN document IS NOT NULL; EXCEPTION WHEN OTHERS THEN RETURN FALSE; END $$;

CREATE FUNCTION mended_json(document TEXT) RETURNS TEXT LANGUAGE sql IMMUTABLE AS $$ SELECT NULL::text $$;

CREATE FUNCTION json_each(document TEXT, path TEXT DEFAULT '$') RETURNS TABLE (key TEXT, value TEXT)
    LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE part JSON := document::json #> dspex_path(path);
BEGIN
    IF json_typeof(part) = 'array' THEN
        RETURN QUERY SELECT (item.place - 1)::text, CASE WHEN json_typeof(item.each) IN ('array', 'object')
            THEN item.each::text ELSE item.each #>> '{}' END
            FROM json_array_elements(part) WITH ORDINALITY AS item(each, place);
    ELSIF json_typeof(part) = 'object' THEN
        RETURN QUERY SELECT entry.name, entry.content FROM json_each_text(part) AS entry(name, content);
    END IF;
END $$;

CREATE FUNCTION dspex_array_text(content ANYCOMPATIBLEARRAY) RETURNS TEXT LANGUAGE sql IMMUTABLE AS
    $$ SELECT array_to_json(content)::text $$;

CREATE AGGREGATE json_group_array(ANYCOMPATIBLE)
    (SFUNC = array_append, STYPE = ANYCOMPATIBLEARRAY, FINALFUNC = dspex_array_text, INITCOND = '{}');

CREATE AGGREGATE total(DOUBLE PRECISION) (SFUNC = float8pl, STYPE = DOUBLE PRECISION, INITCOND = '0');

CREATE FUNCTION hex(content BYTEA) RETURNS TEXT LANGUAGE sql IMMUTABLE AS $$ SELECT upper(encode(content, 'hex')) $$;

CREATE FUNCTION instr(content TEXT, part TEXT) RETURNS INTEGER LANGUAGE sql IMMUTABLE AS $$ SELECT strpos(content, part) $$;

CREATE FUNCTION dspex_number(content TEXT) RETURNS BIGINT LANGUAGE sql IMMUTABLE AS
    $$ SELECT substring(content FROM '^[0-9]{1,18}')::bigint $$;

CREATE FUNCTION strftime(form TEXT, seconds BIGINT, unit TEXT) RETURNS TEXT LANGUAGE sql IMMUTABLE AS
    $$ SELECT to_char(to_timestamp(seconds) AT TIME ZONE 'UTC', 'YYYY-MM-DD') $$;

CREATE FUNCTION dspex_glob(content TEXT, pattern TEXT) RETURNS BOOLEAN LANGUAGE sql IMMUTABLE AS
    $$ SELECT content ~ ('(?s)^' || replace(replace(replace(regexp_replace(replace(pattern, '[[]', '['),
        '([.^$+(){}|\\\[\]])', '\\\1', 'g'), '*', '.*'), '?', '.'), '\[0-9\]', '[0-9]') || '$') $$;
