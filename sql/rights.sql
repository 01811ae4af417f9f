-- Who may what: nobody by default, the writer nothing, an observer looks, an operator runs his own, a stranger sees nothing; and
-- nobody becomes more than he is: not by the schema, by default privileges, by a mapping view, by a type that two see differently.
\set SHOW_CONTEXT never
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE ROLE regress_source;
CREATE ROLE regress_target;
CREATE ROLE regress_heir;
CREATE ROLE regress_boss;
CREATE ROLE regress_writer;
CREATE ROLE regress_observer NOINHERIT;  -- a member who inherits has the owner's verbs, too
CREATE ROLE regress_stranger;
GRANT regress_source, regress_target TO regress_boss;

-- CREATE EXTENSION: a schema that somebody else owns, or has filled, is refused (CVE-2026-2360: operators planted before it)
DROP EXTENSION migrate_ext;
DROP SCHEMA migrate;
CREATE SCHEMA migrate AUTHORIZATION regress_stranger;
CREATE EXTENSION migrate_ext;
DROP SCHEMA migrate;
CREATE SCHEMA migrate;
CREATE FUNCTION migrate._planted(a text, b text) RETURNS boolean LANGUAGE sql AS 'SELECT true';
CREATE EXTENSION migrate_ext;
DROP FUNCTION migrate._planted;
CREATE OPERATOR migrate.= (LEFTARG = text, RIGHTARG = text, FUNCTION = pg_catalog.texteq);
CREATE EXTENSION migrate_ext;
DROP SCHEMA migrate CASCADE;
-- … and default privileges give nobody anything
ALTER DEFAULT PRIVILEGES GRANT ALL ON TABLES TO regress_stranger, PUBLIC;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SEQUENCES TO regress_stranger;
ALTER DEFAULT PRIVILEGES GRANT ALL ON FUNCTIONS TO regress_stranger;
ALTER DEFAULT PRIVILEGES GRANT ALL ON SCHEMAS TO regress_stranger, PUBLIC;
CREATE EXTENSION migrate_ext;
CREATE VIEW public.granted AS
    SELECT c.oid::regclass::text AS object, a.grantee, a.privilege_type FROM pg_class c, aclexplode(coalesce(c.relacl, acldefault(CASE c.relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", c.relowner))) a WHERE c.relnamespace = 'migrate'::regnamespace AND a.grantee <> c.relowner
    UNION ALL SELECT p.oid::regprocedure::text, a.grantee, a.privilege_type FROM pg_proc p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a WHERE p.pronamespace = 'migrate'::regnamespace AND a.grantee <> p.proowner
    UNION ALL SELECT nspname::text, a.grantee, a.privilege_type FROM pg_namespace n, aclexplode(n.nspacl) a WHERE nspname = 'migrate' AND a.grantee <> n.nspowner;
REVOKE ALL ON public.granted FROM PUBLIC, regress_stranger;
SELECT object, CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END AS grantee, privilege_type FROM public.granted ORDER BY object COLLATE "C", 2;
SELECT oid::regprocedure AS definer_without_path FROM pg_proc WHERE pronamespace = 'migrate'::regnamespace AND prosecdef AND NOT coalesce(proconfig::text LIKE '%search_path=%', false);

CREATE SCHEMA rights;
GRANT ALL ON SCHEMA rights TO regress_source, regress_target, regress_boss, regress_heir, regress_writer, regress_stranger;
SET search_path = rights;
CREATE FUNCTION reach(migration text, condition text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    ok boolean;
BEGIN
    FOR i IN 1 .. 600 LOOP
        EXECUTE 'SELECT ' || condition INTO ok;
        EXIT WHEN ok;
        PERFORM pg_sleep(0.05);
    END LOOP;
    RETURN CASE WHEN ok THEN 'reached' ELSE (SELECT concat_ws(' ', m.phase, m.failed_reason) FROM migrate._migration m WHERE m.name = migration) END;
END $$;
SELECT migrate.allow('regress_boss'), migrate.allow('regress_source'), migrate.allow('regress_stranger'), migrate.allow('regress_observer', 'observe');
SET ROLE regress_source;
CREATE TABLE s (id int PRIMARY KEY, v text);
GRANT SELECT, INSERT, UPDATE, DELETE ON s TO regress_writer;
ALTER TABLE s ENABLE ROW LEVEL SECURITY;
CREATE POLICY s ON s TO regress_writer USING (id < 1000);
INSERT INTO s SELECT i, 'v' || i FROM generate_series(1, 20) i;
SET ROLE regress_target;
CREATE TABLE t (id int PRIMARY KEY, v text);
ALTER TABLE t ENABLE ROW LEVEL SECURITY;
-- who owns one of the two does not define
SET ROLE regress_source;
SELECT migrate.define('m', 's', 't', on_target_delete => 'delete');
SET ROLE regress_boss;
SELECT migrate.define('m', 's', 't', on_target_delete => 'delete');
RESET ROLE;
SELECT CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END AS grantee, privilege_type FROM public.granted WHERE object ~ 'flow_\d+_forward' ORDER BY 1, 2;
-- the target's owner does not write the source through the mapping view
SELECT view FROM migrate._mapping WHERE direction = 'forward' \gset
SET ROLE regress_target;
UPDATE :view SET v = 'not mine';
DELETE FROM :view;
INSERT INTO :view VALUES (99, 'x');
RESET ROLE;
SELECT count(*) FILTER (WHERE v = 'v' || id), count(*) FROM s;

-- a stranger with every verb, an observer without membership, a writer without any
-- The verbs are those of the catalog, each argument given by its name: one that is not known here stops the test. So are the views.
-- Of what is internal, only what is not refused for want of a right is told by its name.
CREATE FUNCTION verbs() RETURNS TABLE (verb text, call text) LANGUAGE plpgsql AS $$
DECLARE
    known jsonb := '{"name": "m", "names": "{m}", "source": "rights.s", "target": "rights.t", "mapping": "id, v", "filter": "id > 0", "reverse": "id, v", "on_target_delete": "delete", "flow": "m", "view": "rights.w", "shape": "target",
        "use": "both", "percent": "10", "predicate": null, "dry_run": "false", "skip": "{}", "option": "sleep", "value": "1", "ratio": "0.5", "rows_per_second": null, "for_time": "1 s", "method": "ranges", "execute": "true", "rate": "1",
        "drop_source": "false", "drop_columns": "{}", "force": "m", "phase": "ready", "timeout": "1 s", "role": "regress_stranger", "may": "operate"}';
    p record;
BEGIN
    FOR p IN SELECT r.oid, r.prokind, r.proname, (SELECT string_agg(format('%I => %L', a.name, known ->> a.name), ', ' ORDER BY a.i) FROM unnest(r.proargnames) WITH ORDINALITY a(name, i) WHERE a.i <= r.pronargs) AS args,
                    (SELECT string_agg(a, ', ') FROM unnest(r.proargnames[:r.pronargs]) a WHERE NOT known ? a) AS unknown
             FROM pg_proc r WHERE r.pronamespace = 'migrate'::regnamespace AND r.prosrc IN ('migrate_verb', 'migrate_wait') ORDER BY r.oid LOOP
        ASSERT p.unknown IS NULL, format('%s has an argument that is not known here: %s', p.oid::regprocedure, p.unknown);
        verb := 'migrate.' || p.proname;
        call := CASE p.prokind WHEN 'p' THEN 'CALL ' ELSE 'SELECT count(*) FROM ' END || format('%s(%s)', verb, p.args);
        RETURN NEXT;
    END LOOP;
END $$;
-- (Digests are everybody's, see above.)
SELECT string_agg(p.proname, ' ' ORDER BY p.proname COLLATE "C") AS no_verbs FROM pg_proc p WHERE p.pronamespace = 'migrate'::regnamespace AND p.proname NOT LIKE '\_%' AND p.prosrc NOT IN ('migrate_verb', 'migrate_wait');
CREATE FUNCTION tries() RETURNS TABLE (verb text, state text) LANGUAGE plpgsql AS $$
DECLARE
    c record;
BEGIN
    FOR c IN SELECT v.verb, v.call FROM verbs() v UNION ALL SELECT * FROM (VALUES ('migrate._start', 'SELECT migrate._start(''regress_boss'', ''m'')'), ('migrate._as', 'SELECT migrate._as(''regress_boss'', ''SELECT 1'')')) x(verb, call) LOOP
        BEGIN
            verb := c.verb;
            EXECUTE c.call;
            state := 'done';
        EXCEPTION WHEN OTHERS THEN
            state := SQLSTATE;
        END;
        RETURN NEXT;
    END LOOP;
    FOR c IN SELECT r.relname, r.relkind = 'v' AND r.relname NOT LIKE 'flow\_%' AND r.relname NOT LIKE '\_%' AS is_shown FROM pg_class r WHERE r.relnamespace = 'migrate'::regnamespace AND r.relkind IN ('r', 'v', 'm', 'p', 'S')
             ORDER BY r.relname COLLATE "C" LOOP
        BEGIN
            verb := c.relname;
            EXECUTE format('SELECT count(*)::text FROM migrate.%I', verb) INTO state;
            state := state || ' rows';
        EXCEPTION WHEN OTHERS THEN
            state := SQLSTATE;
        END;
        IF c.is_shown OR state <> '42501' THEN
            RETURN NEXT;
        END IF;
    END LOOP;
END $$;
SET ROLE regress_stranger;
SELECT state, string_agg(verb, ' ') FROM tries() GROUP BY state ORDER BY state;
SET ROLE regress_observer;
SELECT state, string_agg(verb, ' ') FROM tries() GROUP BY state ORDER BY state;
SET ROLE regress_writer;
SELECT state, string_agg(verb, ' ') FROM tries() GROUP BY state ORDER BY state;
RESET ROLE;
-- an observer who is a member of the owner sees, and changes nothing
GRANT regress_boss TO regress_observer;
SET ROLE regress_observer;
SELECT state, string_agg(verb, ' ') FROM tries() WHERE verb <> 'events' GROUP BY state ORDER BY state;
RESET ROLE;

-- the writer needs no right on the target, under row security on both sides
SET ROLE regress_boss;
SELECT migrate.start('m');
RESET ROLE;
SELECT reach('m', $$EXISTS (SELECT FROM migrate._migration WHERE name = 'm' AND phase = 'ready')$$);
SET ROLE regress_writer;
INSERT INTO s VALUES (100, 'new'), (101, 'gone');
UPDATE s SET v = 'changed' WHERE id = 1;
DELETE FROM s WHERE id IN (2, 101);
SELECT count(*) FROM t;
RESET ROLE;
SELECT verdict, mismatches FROM migrate.validate('m');

-- another owner mid-migration: the application goes on, its dual writes as the new owner, though nobody has lent him the mapping
-- view yet (no worker does while paused); whoever was the owner gives it back; and the old owners' verbs are refused
SELECT FROM migrate.pause('m');
-- (A temporary schema that is there already: what the first of a session makes has every plan made anew.)
CREATE TEMP TABLE before ();
\c -
CREATE TEMP TABLE before ();
\c -
SET client_min_messages = warning;
SET search_path = rights;
ALTER TABLE t OWNER TO regress_heir;
CREATE FUNCTION lent(OUT target boolean, OUT heir boolean) LANGUAGE sql AS $$
    SELECT has_table_privilege('regress_target', p.view, 'SELECT'), has_table_privilege('regress_heir', p.view, 'SELECT')
    FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow JOIN migrate._migration m ON m.id = f.migration WHERE m.name = 'm' AND p.direction = 'forward'
$$;
SELECT * FROM lent();
SET ROLE regress_writer;
INSERT INTO s VALUES (200, 'after');
CREATE TEMP TABLE another_path ();
INSERT INTO s VALUES (210, 'by a plan made before');
DELETE FROM s WHERE id = 3;
RESET ROLE;
SELECT key, sqlstate FROM migrate._failure;
SELECT verdict, mismatches FROM migrate.validate('m');
SELECT * FROM lent();
SELECT FROM migrate.resume('m');
-- (of two workers that were refused, the second finds that the first has seen to it)
SELECT f.wait_ms FROM migrate._migration m, migrate._job_failed(m.id, 2, ROW(m.id, 2, 'copy', m.phase, NULL, NULL, NULL, NULL, 0, false, NULL, NULL)::migrate._job, '42501', 'denied', NULL, 1, 100) f WHERE m.name = 'm';
SELECT failed_reason FROM migrate._migration WHERE name = 'm';
SELECT verdict, mismatches FROM migrate.validate('m');
SET ROLE regress_boss;
SELECT state, string_agg(verb, ' ') FROM tries() WHERE verb IN ('migrate.start', 'migrate.route', 'migrate.pause', 'migrate.resume', 'migrate.cutover', 'migrate.rollback', 'migrate.finalize', 'migrate.cancel', 'migrate.validate', 'migrate.repair') GROUP BY state ORDER BY state;
RESET ROLE;
-- rights that an owner has taken from himself, and a schema closed to him: recorded, not an error
REVOKE INSERT, UPDATE ON t FROM regress_heir;
SET ROLE regress_writer;
INSERT INTO s VALUES (201, 'recorded');
RESET ROLE;
SELECT key, sqlstate FROM migrate._failure;
GRANT INSERT, UPDATE ON t TO regress_heir;
SELECT migrate.retry('m') IS NOT NULL AS retried;
SELECT reach('m', 'NOT EXISTS (SELECT FROM migrate._failure)');
REASSIGN OWNED BY regress_source TO regress_heir;
SET ROLE regress_writer;
INSERT INTO s VALUES (202, 'reassigned');
RESET ROLE;
SELECT verdict, mismatches FROM migrate.validate('m');
-- the owner of the migration is gone: a superuser still ends it
REVOKE regress_source, regress_target FROM regress_boss;
SELECT migrate.allow('regress_boss', 'nothing');
REVOKE ALL ON SCHEMA rights FROM regress_boss;
DROP ROLE regress_boss;
SELECT verdict, mismatches FROM migrate.validate('m');
SELECT migrate.cutover('m');
SELECT migrate.rollback('m');
SELECT migrate.cancel('m');
SELECT migrate.drop('m');

-- CVE-2026-19633: a literal whose type the caller and a superuser see differently; its domain's check never runs as a superuser
CREATE SCHEMA open AUTHORIZATION regress_stranger;
CREATE SCHEMA closed AUTHORIZATION regress_stranger;
SET ROLE regress_stranger;
CREATE FUNCTION closed.check_it(v text) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN RAISE WARNING 'checked as %', current_user; RETURN true; END $$;
CREATE DOMAIN closed.guarded AS text CHECK (closed.check_it(VALUE));
CREATE TYPE closed.pair AS (v closed.guarded);
CREATE TYPE open.pair AS ENUM ('(x)');
REVOKE USAGE ON SCHEMA closed FROM regress_stranger;
SET search_path = closed, open;
CREATE TABLE open.s (id int PRIMARY KEY, v text);
CREATE TABLE open.t (id int PRIMARY KEY, v open.pair);
SELECT migrate.define('trick', 'open.s', 'open.t', $$ id, '(x)'::pair AS v $$, on_target_delete => 'delete');
SELECT migrate.drop('trick');
RESET ROLE;
SET search_path = rights;

-- Settings of the session do not change what our SQL means, nor does the application hear of them
SET standard_conforming_strings = off;
SET escape_string_warning = on;
SET quote_all_identifiers = on;
SET transform_null_equals = on;
SET array_nulls = off;
SET DateStyle = 'SQL, DMY';
SET IntervalStyle = 'sql_standard';
SET TimeZone = 'Asia/Tokyo';
SET extra_float_digits = -10;
SET bytea_output = escape;
SET plpgsql.extra_warnings = 'all';
CREATE TABLE strange_s (id timestamptz PRIMARY KEY, v float8, n int[]);
CREATE TABLE strange_t (id timestamptz PRIMARY KEY, v float8, n int[]);
INSERT INTO strange_s SELECT '2020-01-02 00:00+00'::timestamptz + i * interval '1 day 1 microsecond', 1 / 3.0, NULL FROM generate_series(1, 50) i;
SELECT migrate.define('strange', 'strange_s', 'strange_t', filter => $$ v > 0 $$, on_target_delete => 'delete');
SELECT migrate.set('strange', 'lock_timeout', '15 ms'), migrate.set('strange', 'window', '00:00-24:00 UTC'), migrate.set('strange', 'max_replica_lag', '2s'), migrate.set('strange', 'accept_reverse_gaps', 'on');
SELECT migrate.start('strange');
INSERT INTO strange_s VALUES ('01/12/2021 00:00:00.000001', 0.1, '{1}');
SELECT reach('strange', $$EXISTS (SELECT FROM migrate._migration WHERE name = 'strange' AND phase = 'ready')$$);
UPDATE strange_s SET v = 2 / 3.0 WHERE id < '01/02/2020';
SELECT u.how, v.verdict, v.mismatches FROM unnest('{counts,sample,checksum,ranges,rows}'::text[]) WITH ORDINALITY u(how, n), migrate.validate('strange', u.how) v ORDER BY n;
UPDATE strange_t SET v = 0 WHERE v < 0.5;
SELECT v.verdict, v.mismatches FROM migrate.validate('strange') v;
SELECT * FROM migrate.repair('strange', true);
SELECT v.verdict, v.mismatches FROM migrate.validate('strange') v;
SELECT migrate.cutover('strange');
SELECT migrate.rollback('strange');
SELECT migrate.cancel('strange'), migrate.drop('strange');
RESET ALL;

DROP SCHEMA rights, open, closed CASCADE;
DROP VIEW public.granted;
ALTER DEFAULT PRIVILEGES REVOKE ALL ON TABLES FROM regress_stranger, PUBLIC;
ALTER DEFAULT PRIVILEGES REVOKE ALL ON SEQUENCES FROM regress_stranger;
ALTER DEFAULT PRIVILEGES REVOKE ALL ON FUNCTIONS FROM regress_stranger;
ALTER DEFAULT PRIVILEGES REVOKE ALL ON SCHEMAS FROM regress_stranger, PUBLIC;
SELECT count(migrate.allow(r, 'nothing')) FROM unnest('{regress_source,regress_stranger,regress_observer}'::regrole[]) r;
DROP OWNED BY regress_source, regress_target, regress_heir, regress_writer, regress_stranger, regress_observer;
DROP ROLE regress_source, regress_target, regress_heir, regress_writer, regress_observer, regress_stranger;
