-- History is append-only, but for what a pruning has recorded before. The functions have the search path of this schema,
-- so that they work in a restore, too.
CREATE FUNCTION dspex_refuse() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP = 'DELETE' AND TG_TABLE_NAME IN ('versions', 'events') THEN
        IF EXISTS (SELECT 1 FROM pruned WHERE pruned.sequence = OLD.sequence) THEN RETURN OLD; END IF;
    ELSIF TG_OP = 'DELETE' AND TG_TABLE_NAME = 'blobs' THEN
        IF NOT EXISTS (SELECT 1 FROM versions WHERE value_blob = OLD.blob_key)
            AND NOT EXISTS (SELECT 1 FROM versions WHERE binary_blob = OLD.blob_key) THEN RETURN OLD; END IF;
    END IF;
    RAISE EXCEPTION '% is append-only: history is never rewritten', TG_TABLE_NAME;
END $$;

CREATE FUNCTION dspex_refuse_truncate() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION '% is append-only: history is never rewritten', TG_TABLE_NAME; END $$;

CREATE TRIGGER commits_append_only BEFORE UPDATE OR DELETE ON commits FOR EACH ROW EXECUTE FUNCTION dspex_refuse();
CREATE TRIGGER versions_append_only BEFORE UPDATE OR DELETE ON versions FOR EACH ROW EXECUTE FUNCTION dspex_refuse();
CREATE TRIGGER events_append_only BEFORE UPDATE OR DELETE ON events FOR EACH ROW EXECUTE FUNCTION dspex_refuse();
CREATE TRIGGER blobs_append_only BEFORE UPDATE OR DELETE ON blobs FOR EACH ROW EXECUTE FUNCTION dspex_refuse();
CREATE TRIGGER pruned_append_only BEFORE UPDATE OR DELETE ON pruned FOR EACH ROW EXECUTE FUNCTION dspex_refuse();
CREATE TRIGGER commits_no_truncate BEFORE TRUNCATE ON commits EXECUTE FUNCTION dspex_refuse_truncate();
CREATE TRIGGER versions_no_truncate BEFORE TRUNCATE ON versions EXECUTE FUNCTION dspex_refuse_truncate();
CREATE TRIGGER events_no_truncate BEFORE TRUNCATE ON events EXECUTE FUNCTION dspex_refuse_truncate();
CREATE TRIGGER blobs_no_truncate BEFORE TRUNCATE ON blobs EXECUTE FUNCTION dspex_refuse_truncate();
CREATE TRIGGER pruned_no_truncate BEFORE TRUNCATE ON pruned EXECUTE FUNCTION dspex_refuse_truncate();

-- What the history refers to without foreign keys.
CREATE FUNCTION dspex_refuse_unless_unused() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP = 'DELETE' AND TG_TABLE_NAME = 'variables' THEN
        IF NOT EXISTS (SELECT 1 FROM versions WHERE variable_key = OLD.variable_key) THEN RETURN OLD; END IF;
    END IF;
    RAISE EXCEPTION 'rows of % are referred to by the history', TG_TABLE_NAME;
END $$;

CREATE TRIGGER sessions_stay BEFORE DELETE OR UPDATE OF session_key ON sessions
    FOR EACH ROW EXECUTE FUNCTION dspex_refuse_unless_unused();
CREATE TRIGGER variables_stay BEFORE DELETE OR UPDATE OF variable_key ON variables
    FOR EACH ROW EXECUTE FUNCTION dspex_refuse_unless_unused();
CREATE TRIGGER sessions_no_truncate BEFORE TRUNCATE ON sessions EXECUTE FUNCTION dspex_refuse_unless_unused();
CREATE TRIGGER variables_no_truncate BEFORE TRUNCATE ON variables EXECUTE FUNCTION dspex_refuse_unless_unused();

CREATE FUNCTION dspex_note_metadata() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    IF TG_OP = 'INSERT' THEN
        INSERT INTO metadata_entries SELECT entry.key, entry.value, NEW.sequence, NEW.variable_key, NEW.version
        FROM json_each(NEW.metadata) AS entry;
    ELSE
        DELETE FROM metadata_entries WHERE sequence = OLD.sequence AND variable_key = OLD.variable_key
            AND version = OLD.version;
    END IF;
    RETURN NULL;
END $$;

CREATE TRIGGER versions_metadata_in AFTER INSERT ON versions FOR EACH ROW WHEN (NEW.metadata IS NOT NULL)
    EXECUTE FUNCTION dspex_note_metadata();
CREATE TRIGGER versions_metadata_out AFTER DELETE ON versions FOR EACH ROW WHEN (OLD.metadata IS NOT NULL)
    EXECUTE FUNCTION dspex_note_metadata();

-- Whoever writes events also lists their LM calls, which go with their event.
CREATE FUNCTION dspex_forget_lm_calls() RETURNS trigger LANGUAGE plpgsql SET search_path FROM CURRENT AS $$
BEGIN
    DELETE FROM lm_calls WHERE sequence = OLD.sequence AND event_ordinal = OLD.ordinal;
    RETURN NULL;
END $$;

CREATE TRIGGER events_lm_calls_out AFTER DELETE ON events FOR EACH ROW WHEN (OLD.kind = 'execution_ended')
    EXECUTE FUNCTION dspex_forget_lm_calls();
