-- The public interface: each verb is src/verb.cpp running the internal function of the same name. Then who may what.

CREATE FUNCTION migrate.define(name text, source regclass, target regclass, mapping text DEFAULT NULL, filter text DEFAULT NULL, reverse text DEFAULT NULL, on_target_delete text DEFAULT NULL)
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.define IS 'declares a migration: mapping is a SELECT list over source with target''s column names (NULL: equal names), filter a condition over source, reverse the mapping back, on_target_delete delete|keep';

CREATE FUNCTION migrate.add_flow(name text, source regclass, target regclass, mapping text DEFAULT NULL, filter text DEFAULT NULL, reverse text DEFAULT NULL, on_target_delete text DEFAULT NULL, flow text DEFAULT NULL)
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.add_flow IS 'adds a source or a target to a planned migration';

CREATE FUNCTION migrate.add_view(name text, view text, shape text DEFAULT 'target', flow text DEFAULT NULL, use text DEFAULT 'both')
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.add_view IS 'makes, or takes over, a view that cutover switches; shape target: the target''s columns, source: the source''s name and columns; use read: for reading alone, see route';

CREATE FUNCTION migrate.route(name text, percent numeric DEFAULT NULL, predicate text DEFAULT NULL, dry_run boolean DEFAULT false, skip text[] DEFAULT '{}')
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.route IS 'serves reads through the views of use read from the target: of so many in a hundred keys, or of the rows a predicate over the view''s columns is true for; percent 0 goes back at once';

CREATE FUNCTION migrate.set(name text, option text, value text)
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.set IS 'sets an option, also while it runs; value default unsets it; gives old -> new';

CREATE FUNCTION migrate.get(name text, option text DEFAULT NULL)
RETURNS TABLE (option text, value text, "default" text, unit text, description text) LANGUAGE C STABLE AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.get IS 'the options in force';

CREATE FUNCTION migrate.preflight(name text)
RETURNS TABLE (severity text, "check" text, message text, hint text) LANGUAGE C STABLE AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.preflight IS 'every check of what could go wrong; severity error blocks start';

CREATE FUNCTION migrate.plan(name text)
RETURNS text LANGUAGE C STABLE AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.plan IS 'the runbook in Markdown';

CREATE FUNCTION migrate.start(name text)
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.start IS 'turns the dual writes on and starts the background worker; returns at once';

CREATE FUNCTION migrate.pause(name text)
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.pause IS 'stops the background work after the present batch; dual writes go on';

CREATE FUNCTION migrate.resume(name text)
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.resume IS 'goes on after pause';

CREATE FUNCTION migrate.cancel(name text)
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.cancel IS 'ends a migration that is not switched: drops its triggers, leaves the source as it was, and the target with its indexes and foreign keys';

CREATE FUNCTION migrate.retry(name text)
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.retry IS 'goes on after a failure, and retries failed dual writes at once';

CREATE FUNCTION migrate.throttle(name text, ratio double precision DEFAULT NULL, rows_per_second bigint DEFAULT NULL, for_time interval DEFAULT '1 hour')
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.throttle IS 'slows the backfill down for a time: a ratio (0 none, 0.9 nine tenths of the time asleep) or a rate in rows per second';

CREATE FUNCTION migrate.unthrottle(name text)
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.unthrottle IS 'ends throttle';

CREATE FUNCTION migrate.validate(name text, method text DEFAULT 'ranges')
RETURNS TABLE (flow text, method text, source_rows bigint, target_rows bigint, ranges bigint, mismatches bigint, source_checksum text, target_checksum text, seconds numeric, snapshot text, verdict text) LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.validate IS 'compares both sides exactly, also under load; methods counts, sample, sums, checksum, ranges, rows';

CREATE FUNCTION migrate.mismatches(name text)
RETURNS TABLE (flow text, key text, kind text, columns text[], found_at timestamptz) LANGUAGE C STABLE AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.mismatches IS 'what the last validation found';

CREATE FUNCTION migrate.repair(name text, execute boolean DEFAULT false)
RETURNS SETOF text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.repair IS 'the SQL that would mend the mismatches; execute => true mends and verifies them';

CREATE FUNCTION migrate.shadow(name text, rate double precision)
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.shadow IS 'shadow reads at a sample rate (share of keys, 0 to 1); 0 turns them off';

CREATE FUNCTION migrate.cutover(name text, dry_run boolean DEFAULT false, skip text[] DEFAULT '{}')
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.cutover(text, boolean, text[]) IS 'makes the target the side that serves; skip names gates to pass over';

CREATE FUNCTION migrate.cutover(names text[], dry_run boolean DEFAULT false, skip text[] DEFAULT '{}')
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.cutover(text[], boolean, text[]) IS 'cuts several migrations over at once, all or none';

CREATE FUNCTION migrate.rollback(name text, dry_run boolean DEFAULT false, skip text[] DEFAULT '{}')
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.rollback(text, boolean, text[]) IS 'makes the source the side that serves again; nothing is lost';

CREATE FUNCTION migrate.rollback(names text[], dry_run boolean DEFAULT false, skip text[] DEFAULT '{}')
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.rollback(text[], boolean, text[]) IS 'rolls several migrations back at once, all or none';

CREATE FUNCTION migrate.finalize(name text, drop_source boolean DEFAULT false, drop_columns text[] DEFAULT '{}', force text DEFAULT NULL, dry_run boolean DEFAULT false)
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.finalize IS 'ends the rollback window: drops the triggers and, on demand, the source table or columns of it; force takes the migration''s own name; dry_run lists all that would be dropped';

CREATE FUNCTION migrate.drop(name text)
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.drop IS 'forgets a migration that is planned, cancelled or finalized';

CREATE FUNCTION migrate.serves(name text)
RETURNS text LANGUAGE C STABLE AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.serves IS 'source or target: the side that serves';

CREATE PROCEDURE migrate.wait(name text, phase text DEFAULT 'ready', timeout interval DEFAULT NULL)
LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_wait';
COMMENT ON PROCEDURE migrate.wait IS 'waits, with a progress bar, until the migration is in this phase; an error as soon as it cannot be reached';

-- operate: every verb, on migrations whose tables the role owns; observe: look only; nothing: neither.
CREATE FUNCTION migrate._allow(caller regrole, role regrole, may text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    f record;
BEGIN
    IF NOT (SELECT rolsuper FROM pg_roles WHERE oid = caller) THEN
        PERFORM migrate._raise('42501', format('role %s may not grant the use of migrate_ext', caller), 'Only a superuser may.', 'Ask a superuser.');
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles r WHERE r.oid = role) THEN
        PERFORM migrate._raise('42704', CASE WHEN role IS NULL THEN 'allow needs the name of a role' ELSE format('role with OID %s does not exist', role::oid) END, '', 'SELECT migrate.allow(''data_team'', ''operate'');');
    ELSIF may IS NULL OR may NOT IN ('operate', 'observe', 'nothing') THEN
        PERFORM migrate._raise('22023', format('"%s" cannot be allowed', may), 'It may be "operate", "observe" or "nothing".', format('SELECT migrate.allow(%L, ''operate'');', role));
    END IF;
    FOR f IN SELECT p.oid::regprocedure AS signature, p.prokind, p.proname IN ('serves', 'get', 'plan', 'preflight', 'mismatches', 'wait', 'md5_agg', 'ordered_md5', 'row_sum', 'checksum', 'range_checksums') AS reads
             FROM pg_proc p WHERE p.pronamespace = 'migrate'::regnamespace AND p.proname NOT LIKE '\_%' AND p.proname <> 'allow' LOOP
        EXECUTE format('%s EXECUTE ON ROUTINE %s %s %s', CASE WHEN may = 'operate' OR (may = 'observe' AND f.reads) THEN 'GRANT' ELSE 'REVOKE' END,
                       f.signature, CASE WHEN may = 'operate' OR (may = 'observe' AND f.reads) THEN 'TO' ELSE 'FROM' END, role);
    END LOOP;
    FOR f IN SELECT c.oid::regclass AS relation FROM pg_class c WHERE c.relnamespace = 'migrate'::regnamespace AND c.relkind = 'v' AND c.relname NOT LIKE '\_%' AND c.relname NOT LIKE 'flow\_%' LOOP
        EXECUTE format('%s SELECT ON %s %s %s', CASE WHEN may = 'nothing' THEN 'REVOKE' ELSE 'GRANT' END, f.relation, CASE WHEN may = 'nothing' THEN 'FROM' ELSE 'TO' END, role);
    END LOOP;
    RETURN format('%s may %s', role, may);
END $$;

CREATE FUNCTION migrate.allow(role regrole, may text DEFAULT 'operate')
RETURNS text LANGUAGE C AS 'MODULE_PATHNAME', 'migrate_verb';
COMMENT ON FUNCTION migrate.allow IS 'lets a role operate, observe or do nothing; superusers only. A role sees and runs only the migrations of owners it is a member of';

-- Nobody may do anything, whatever default privileges would have given (a row in a table of ours is code to run), …
SELECT migrate._revoke_all(c.oid, CASE c.relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END, c.oid::pg_catalog.regclass::text)
    FROM pg_catalog.pg_class c WHERE c.relnamespace = 'migrate'::pg_catalog.regnamespace AND c.relkind IN ('r', 'v', 'S');
REVOKE ALL ON ALL ROUTINES IN SCHEMA migrate FROM PUBLIC;
SELECT migrate._revoke_all(p.oid, 'ROUTINE', p.oid::pg_catalog.regprocedure::text) FROM pg_catalog.pg_proc p WHERE p.pronamespace = 'migrate'::pg_catalog.regnamespace;
SELECT migrate._revoke_all('migrate'::pg_catalog.regnamespace, 'SCHEMA', 'migrate');
-- … but everybody may look into the schema. Its objects are granted one by one.
GRANT USAGE ON SCHEMA migrate TO PUBLIC;
-- Digests read with the caller's own rights, and validation runs as the owners of tables: these are for everybody.
GRANT EXECUTE ON FUNCTION migrate.md5_agg(text, text), migrate.ordered_md5("any"), migrate.row_sum("any"), migrate.same_image(anyelement, anyelement),
    migrate.checksum(regclass, text[], text[]), migrate.range_checksums(regclass, text[], text[], integer),
    migrate._digest_parts(regclass, text[], text[]), migrate._digest_call(text[], text), migrate._last(anyelement), migrate._beyond(text[], text[], oid[], text),
    migrate._operator(oid, integer) TO PUBLIC;

-- Definitions are dumped, and come up paused where they are restored; failures and mismatches hold keys and are not.
DO $$
DECLARE
    relation regclass;
BEGIN
    FOR relation IN SELECT c.oid FROM pg_catalog.pg_class c
             WHERE c.relnamespace = 'migrate'::regnamespace AND c.relname IN ('_migration', '_option', '_flow', '_mapping', '_view', '_range', '_requeue', '_deferred', '_swapped', '_event')
                OR c.oid IN (SELECT pg_catalog.pg_get_serial_sequence('migrate.' || t, 'id')::regclass FROM unnest(ARRAY['_migration', '_flow', '_event']) t) LOOP
        PERFORM pg_catalog.pg_extension_config_dump(relation, '');
    END LOOP;
END $$;
