-- Ends a transaction that was begun in the hope that nobody else writes. It is made again.
CREATE FUNCTION dspex_give_up(state TEXT) RETURNS BOOLEAN LANGUAGE plpgsql AS $$ BEGIN
    RAISE EXCEPTION USING ERRCODE = state, MESSAGE = 'another server was faster, so this is made again';
END $$;

-- Functions that SQLite has, so that the statements of the store are the same.
CREATE FUNCTION dspex_path(path TEXT) RETURNS TEXT[] LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
    $$ SELECT CASE WHEN path LIKE '$."%"' THEN ARRAY[substr(path, 4, length(path) - 4)]
        WHEN path LIKE '$.metadata."%"' THEN ARRAY['metadata', substr(path, 13, length(path) - 13)]
        WHEN path LIKE '$%' THEN array_remove(regexp_split_to_array(substr(path, 2), '[\[\].]+'), '')
        ELSE ARRAY[path] END $$;

-- PostgreSQL reads no document that has the escape of U+0000. U+10FFFF, which is no character, takes its place.
CREATE FUNCTION dspex_json(document TEXT) RETURNS JSON LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS $$ BEGIN
    IF strpos(document, '\u0000') = 0 THEN RETURN document; END IF;
    RETURN regexp_replace(document, '(?<!\\)((?:\\\\)*)\\u0000', '\1\\udbff\\udfff', 'g');
END $$;

-- A text in a document; with U+FFFD for U+0000, which no text can have here. Calls no function of ours: it is indexed.
CREATE FUNCTION dspex_text_at(document TEXT, path TEXT[]) RETURNS TEXT LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS
$$ BEGIN
    IF strpos(document, '\u0000') = 0 THEN RETURN document::json #>> path; END IF;
    RETURN replace(regexp_replace(document, '(?<!\\)((?:\\\\)*)\\u0000', '\1\\udbff\\udfff', 'g')::json #>> path, chr(1114111), chr(65533));
END $$;

-- A part of a document, as JSON.
CREATE FUNCTION dspex_part_at(document TEXT, path TEXT[]) RETURNS TEXT LANGUAGE plpgsql IMMUTABLE STRICT PARALLEL SAFE AS
$$ BEGIN
    IF strpos(document, '\u0000') = 0 THEN RETURN (document::json #> path)::text; END IF;
    RETURN replace((dspex_json(document) #> path)::text, '\udbff\udfff', '\u0000');
END $$;

CREATE FUNCTION json_extract(document TEXT, path TEXT) RETURNS TEXT LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
    $$ SELECT dspex_text_at(document, dspex_path(path)) $$;

CREATE FUNCTION dspex_json_at(document TEXT, path TEXT) RETURNS TEXT LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
    $$ SELECT dspex_part_at(document, dspex_path(path)) $$;

CREATE OPERATOR ->> (LEFTARG = TEXT, RIGHTARG = TEXT, FUNCTION = json_extract);

CREATE OPERATOR -> (LEFTARG = TEXT, RIGHTARG = TEXT, FUNCTION = dspex_json_at);

CREATE FUNCTION dspex_item(document TEXT, place INTEGER) RETURNS TEXT LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
    $$ SELECT dspex_text_at(document, ARRAY[place::text]) $$;

CREATE OPERATOR ->> (LEFTARG = TEXT, RIGHTARG = INTEGER, FUNCTION = dspex_item);

-- Reads the whole document: the cast alone accepts half of a character that UTF-16 writes as two. Not safe in parallel
-- workers, where blocks with EXCEPTION fail.
CREATE FUNCTION json_valid(document TEXT) RETURNS BOOLEAN LANGUAGE plpgsql IMMUTABLE STRICT AS
    $$ BEGIN PERFORM dspex_json(document) #>> '{}'; PERFORM dspex_json(document) -> 0; RETURN TRUE;
    EXCEPTION WHEN OTHERS THEN RETURN FALSE; END $$;

CREATE FUNCTION mended_json(document TEXT) RETURNS TEXT LANGUAGE sql IMMUTABLE AS $$ SELECT NULL::text $$;

CREATE FUNCTION iif(condition BOOLEAN, yes TEXT, no TEXT) RETURNS TEXT LANGUAGE sql IMMUTABLE AS
    $$ SELECT CASE WHEN condition THEN yes ELSE no END $$;

CREATE FUNCTION json_each(document TEXT, path TEXT DEFAULT '$') RETURNS TABLE (key TEXT, value TEXT)
    LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    part JSON := dspex_json(document) #> dspex_path(path);
    mended BOOLEAN := strpos(document, '\u0000') > 0;
BEGIN
    IF json_typeof(part) = 'array' THEN
        RETURN QUERY SELECT (item.place - 1)::text, CASE WHEN json_typeof(item.each) NOT IN ('array', 'object')
                THEN CASE WHEN mended THEN replace(item.each #>> '{}', chr(1114111), chr(65533))
                    ELSE item.each #>> '{}' END
                WHEN mended THEN replace(item.each::text, '\udbff\udfff', '\u0000')
                ELSE item.each::text END
            FROM json_array_elements(part) WITH ORDINALITY AS item(each, place);
    ELSIF json_typeof(part) = 'object' AND mended THEN
        RETURN QUERY SELECT replace(entry.name, chr(1114111), chr(65533)), replace(entry.content, chr(1114111), chr(65533))
            FROM json_each_text(part) AS entry(name, content);
    ELSIF json_typeof(part) = 'object' THEN
        RETURN QUERY SELECT entry.name, entry.content FROM json_each_text(part) AS entry(name, content);
    END IF;
END $$;

-- Does metadata say that the variable is sensitive? It may if it cannot be read. Calls no function of ours: it is indexed.
CREATE FUNCTION dspex_is_sensitive(metadata TEXT) RETURNS BOOLEAN LANGUAGE plpgsql IMMUTABLE STRICT AS $$ BEGIN
    RETURN lower(replace(metadata, '\u0000', '\ufffd')::json ->> 'sensitive') IS NOT DISTINCT FROM 'true';
EXCEPTION WHEN OTHERS THEN RETURN TRUE; END $$;

CREATE FUNCTION dspex_array_text(content ANYCOMPATIBLEARRAY) RETURNS TEXT LANGUAGE sql IMMUTABLE AS
    $$ SELECT array_to_json(content)::text $$;

CREATE AGGREGATE json_group_array(ANYCOMPATIBLE)
    (SFUNC = array_append, STYPE = ANYCOMPATIBLEARRAY, FINALFUNC = dspex_array_text, INITCOND = '{}');

CREATE AGGREGATE total(DOUBLE PRECISION) (SFUNC = float8pl, STYPE = DOUBLE PRECISION, INITCOND = '0');

CREATE FUNCTION hex(content BYTEA) RETURNS TEXT LANGUAGE sql IMMUTABLE AS $$ SELECT upper(encode(content, 'hex')) $$;

CREATE FUNCTION instr(content TEXT, part TEXT) RETURNS INTEGER LANGUAGE sql IMMUTABLE AS $$ SELECT strpos(content, part) $$;

CREATE FUNCTION dspex_number(content TEXT) RETURNS BIGINT LANGUAGE sql IMMUTABLE AS
    $$ SELECT substring(content FROM '^[0-9]{1,18}')::bigint $$;

CREATE FUNCTION dspex_glob(content TEXT, pattern TEXT) RETURNS BOOLEAN LANGUAGE sql IMMUTABLE AS
    $$ SELECT content ~ ('(?s)^' || replace(replace(replace(regexp_replace(replace(pattern, '[[]', '['),
        '([.^$+(){}|\\\[\]])', '\\\1', 'g'), '*', '.*'), '?', '.'), '\[0-9\]', '[0-9]') || '$') $$;

-- For the views: microseconds since the epoch as a time, a document that can be read, an integer in a document.
CREATE FUNCTION dspex_time(micros BIGINT) RETURNS TEXT LANGUAGE sql IMMUTABLE STRICT PARALLEL SAFE AS
    $$ SELECT to_char(to_timestamp(micros / 1000000) AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS')
        || '.' || lpad((micros % 1000000)::text, 6, '0') || 'Z' WHERE micros BETWEEN 0 AND 253402300799999999 $$;

CREATE FUNCTION strftime(form TEXT, seconds BIGINT, unit TEXT) RETURNS TEXT LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
    $$ SELECT left(dspex_time(seconds * 1000000), 10) WHERE form = '%Y-%m-%d' AND seconds BETWEEN 0 AND 253402300799 $$;

CREATE FUNCTION dspex_sound(document TEXT) RETURNS TEXT LANGUAGE sql IMMUTABLE AS
    $$ SELECT CASE WHEN json_valid(document) THEN document ELSE '{}' END $$;

CREATE FUNCTION dspex_integer_at(document TEXT, path TEXT) RETURNS BIGINT LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
    $$ SELECT substring(json_extract(document, path) FROM '^-?[0-9]{1,18}$')::bigint $$;

-- The sum of counts as a whole number: an import may have brought counts whose sum needs more than 64 bits.
CREATE FUNCTION dspex_whole(number DOUBLE PRECISION) RETURNS BIGINT LANGUAGE sql IMMUTABLE PARALLEL SAFE AS
    $$ SELECT CASE WHEN number >= 9223372036854775807 THEN 9223372036854775807 ELSE number::bigint END $$;
