-- A unique column beside the key, and a foreign key between the two tables: the dual write of a statement within a statement may
-- come while a row that the one around it has taken away still holds the unique value on the other side. No error that the
-- application's statement would not get without us, and nothing that waits for a worker.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE SCHEMA rivals_test;
SET search_path = rivals_test;

CREATE TABLE s (k text PRIMARY KEY, u int UNIQUE, v text);
CREATE TABLE t (tk text PRIMARY KEY REFERENCES s (k), u int UNIQUE, v text);
SELECT migrate.define('r', 's', 't', 'k AS tk, u, v', reverse => 'tk AS k, u, v', on_target_delete => 'delete');
-- Both directions at once, as in the rollback window; no worker.
CREATE FUNCTION arm(mode text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
BEGIN
    PERFORM migrate.set('r', 'dual_write', mode);
    UPDATE migrate._migration SET both_directions = true WHERE name = 'r' RETURNING * INTO m;
    PERFORM migrate._create_triggers(m, d), migrate._invalidate('rivals_test.s'), migrate._invalidate('rivals_test.t') FROM unnest('{forward,reverse}'::text[]) d;
END $$;
-- What is left of it all: rows that differ, and keys that wait.
CREATE VIEW left_over AS
SELECT (SELECT count(*) FROM s FULL JOIN t ON k = tk WHERE (k, s.u, s.v) IS DISTINCT FROM (tk, t.u, t.v)) AS rows_that_differ,
       (SELECT count(*) FROM migrate._failure) AS failures, (SELECT string_agg(concat_ws(' ', k, u, v), ', ' ORDER BY k) FROM s) AS rows;

-- On each side: a row's trigger writes that row again, or its neighbour, before and after ours by name.
CREATE FUNCTION again() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('UPDATE rivals_test.%I SET v = v || ''+'' WHERE %I = $1', TG_TABLE_NAME, TG_ARGV[0]) USING CASE TG_TABLE_NAME WHEN 's' THEN to_jsonb(NEW) ->> 'k' ELSE to_jsonb(NEW) ->> 'tk' END;
    RETURN NULL;
END $$;
CREATE FUNCTION neighbour() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('UPDATE rivals_test.%I SET v = v || ''*'' WHERE u = $1', TG_TABLE_NAME) USING NEW.u + 1;
    RETURN NULL;
END $$;
CREATE FUNCTION play(side text, mode text, again text, neighbour text) RETURNS SETOF left_over LANGUAGE plpgsql AS $$
DECLARE
    key text := CASE side WHEN 's' THEN 'k' ELSE 'tk' END;
BEGIN
    DELETE FROM s;
    DELETE FROM t;
    INSERT INTO s VALUES ('a', 1, 'one'), ('b', 2, 'two'), ('c', 3, 'three');
    PERFORM arm(mode);
    EXECUTE format('CREATE TRIGGER %I AFTER UPDATE ON %I FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION again(%L)', again, side, key);
    EXECUTE format('CREATE TRIGGER %I AFTER UPDATE ON %I FOR EACH ROW WHEN (pg_trigger_depth() = 0) EXECUTE FUNCTION neighbour()', neighbour, side);
    EXECUTE format('UPDATE %I SET %I = upper(%2$I), v = v || ''!'' WHERE u = 3', side, key);
    EXECUTE format('UPDATE %I SET %I = %2$I || %2$I WHERE u < 3', side, key);
    RETURN QUERY TABLE left_over;
    EXECUTE format('DROP TRIGGER %I ON %I', again, side);
    EXECUTE format('DROP TRIGGER %I ON %I', neighbour, side);
END $$;
SELECT arm('strict');
SELECT format('SELECT %1$L AS side, %2$L AS mode, %3$L AS again, x.* FROM play(%1$L, %2$L, %3$L, %4$L) x', side, mode, again, neighbour)
FROM unnest('{s,t}'::text[]) side, unnest('{strict,best_effort}'::text[]) mode, (VALUES ('AA', 'zz'), ('!', 'zz'), ('zz', 'AA'), ('zz', '!')) n (again, neighbour) \gexec

-- A row that nobody yields any more, because its removal was refused once, makes room; one that the other side has does not.
ALTER TABLE t DROP CONSTRAINT t_tk_fkey;
SELECT arm('best_effort');
CREATE TABLE holds (tk text REFERENCES t);
DELETE FROM s;
INSERT INTO s VALUES ('a', 1, 'one'), ('b', 2, 'two');
INSERT INTO holds VALUES ('a');
DELETE FROM s WHERE k = 'a';
TABLE left_over;
INSERT INTO s VALUES ('c', 1, 'one again');
SELECT tk, u FROM t ORDER BY tk;
TRUNCATE holds;
UPDATE s SET v = 'now' WHERE k = 'c';
SELECT * FROM t ORDER BY tk;
SELECT key, sqlstate, object FROM migrate._failure ORDER BY id;

-- TRUNCATE, too, is carried as far as it can be: what cannot be taken away is recorded.
DELETE FROM migrate._failure;
DELETE FROM s;
INSERT INTO s VALUES ('a', 1, 'one'), ('b', 2, 'two'), ('c', 3, 'three');
INSERT INTO holds VALUES ('b');
TRUNCATE s;
SELECT tk FROM t ORDER BY tk;
SELECT key, sqlstate, object FROM migrate._failure ORDER BY id;
TRUNCATE holds;
SELECT arm('strict');
INSERT INTO s VALUES ('a', 1, 'one'), ('b', 2, 'two');
INSERT INTO holds VALUES ('b');
TRUNCATE s;
TABLE left_over;
TRUNCATE holds;

-- Values exchanged by one statement, which only a constraint checked at its end allows: the target's must be such a one too.
DELETE FROM migrate._failure;
DELETE FROM s;
ALTER TABLE s DROP CONSTRAINT s_u_key, ADD UNIQUE (u) DEFERRABLE;
INSERT INTO s VALUES ('a', 1, 'one'), ('b', 2, 'two');
SELECT arm('best_effort');
UPDATE s SET u = 3 - u;
TABLE left_over;
SELECT hint FROM migrate.preflight('r') WHERE message ~ 'exchanges' \gset
:hint
UPDATE s SET u = 3 - u;
UPDATE s SET u = 3 - u;
SELECT rows_that_differ, rows FROM left_over;

\set VERBOSITY terse
SELECT migrate.cancel('r'), migrate.drop('r');
DROP SCHEMA rivals_test CASCADE;
