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

-- A unique index on the key's columns that compares otherwise than they do is another constraint: no row's key is told by it, and what it
-- refuses is refused, written with SQL (for a trigger) or without. By a collation, and by an operator class of ours.
SELECT migrate.cancel('r'), migrate.drop('r');
CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false);
CREATE FUNCTION loose_cmp(a text, b text) RETURNS int LANGUAGE sql IMMUTABLE AS $$ SELECT pg_catalog.bttextcmp(lower(a) COLLATE "C", lower(b) COLLATE "C") $$;
SELECT format('CREATE FUNCTION %1$I(a text, b text) RETURNS boolean LANGUAGE sql IMMUTABLE AS ''SELECT rivals_test.loose_cmp(a, b) %2$s 0''', 'is' || o, o),
       format('CREATE OPERATOR %2$s# (LEFTARG = text, RIGHTARG = text, FUNCTION = %1$I)', 'is' || o, o) FROM unnest('{<,<=,=,>=,>}'::text[]) o \gexec
CREATE OPERATOR CLASS loose_ops FOR TYPE text USING btree AS OPERATOR 1 <#, OPERATOR 2 <=#, OPERATOR 3 =#, OPERATOR 4 >=#, OPERATOR 5 >#, FUNCTION 1 loose_cmp(text, text);
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$;
CREATE FUNCTION mails(relation regclass, OUT mails text) LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('SELECT string_agg(concat_ws('' '', email, v), '', '' ORDER BY email COLLATE "C") FROM %s', relation) INTO mails;
END $$;
CREATE FUNCTION play_loose(side text, index text, path text, OUT way boolean, OUT refused text, OUT recorded text, OUT target text, OUT renamed text, OUT made_room text) LANGUAGE plpgsql AS $$
BEGIN
    CREATE TABLE mail (email text NOT NULL, v text);
    CREATE TABLE mail_t (email text NOT NULL, v text);
    ALTER TABLE mail_t ADD PRIMARY KEY (email);
    EXECUTE format('CREATE UNIQUE INDEX loose_index ON %I (email %s)', side, index);  -- after the target's key, before the source's
    ALTER TABLE mail ADD PRIMARY KEY (email);
    PERFORM migrate.define('r', 'mail', 'mail_t', on_target_delete => 'delete'), migrate.set('r', 'dual_write', 'best_effort');
    PERFORM migrate._create_triggers(m, 'forward') FROM migrate._migration m WHERE name = 'r';
    IF path = 'sql' THEN
        CREATE TRIGGER nothing BEFORE INSERT ON mail_t FOR EACH ROW EXECUTE FUNCTION nothing();
    END IF;
    way := (SELECT (migrate._path(f.id, 'forward') IS NULL) = (path = 'direct') FROM migrate._flow f WHERE source = 'mail'::regclass);
    INSERT INTO mail VALUES ('Bob', '1');
    IF side = 'mail_t' THEN
        INSERT INTO mail VALUES ('bob', '2');
        PERFORM migrate.set('r', 'dual_write', 'strict'), migrate._invalidate('rivals_test.mail');
        BEGIN
            INSERT INTO mail VALUES ('BOB', '3');
        EXCEPTION WHEN unique_violation THEN
            GET STACKED DIAGNOSTICS refused = CONSTRAINT_NAME;
        END;
    END IF;
    recorded := (SELECT string_agg(concat_ws(' ', key::text, sqlstate, object), ', ') FROM migrate._failure);
    target := mails('mail_t');
    DELETE FROM mail WHERE email = 'bob';
    UPDATE mail SET email = 'BOB' WHERE email = 'Bob';
    renamed := mails('mail_t');
    -- One that nobody yields is known by the index's collation; what an operator of ours says, nobody is deleted for.
    DELETE FROM mail;
    PERFORM migrate.set('r', 'dual_write', 'best_effort'), migrate._invalidate('rivals_test.mail');
    INSERT INTO mail_t VALUES ('BOB', 'of nobody');
    INSERT INTO mail VALUES ('Bob', '4');
    made_room := mails('mail_t');
    PERFORM migrate.cancel('r'), migrate.drop('r');
    DROP TABLE mail, mail_t;
END $$;
SET statement_timeout = '60s';
SELECT format('SELECT %1$L AS side, %2$L AS index, %3$L AS path, x.* FROM play_loose(%1$L, %2$L, %3$L) x', side, index, path)
FROM unnest('{mail_t,mail}'::text[]) side, unnest('{COLLATE loose,loose_ops}'::text[]) index, unnest('{direct,sql}'::text[]) path \gexec
RESET statement_timeout;
-- It is no key either, when it is asked for or left over.
CREATE TABLE mail (email text NOT NULL, v text);
CREATE TABLE mail_t (email text PRIMARY KEY, v text);
CREATE UNIQUE INDEX loose_index ON mail (email COLLATE loose);
SELECT migrate.define('r', 'mail', 'mail_t');
SELECT migrate.define('r', 'mail_t', 'mail');
ALTER TABLE mail ADD PRIMARY KEY (email);
SELECT migrate.define('r', 'mail_t', 'mail');
-- The statements that repair prints leave another row alone, too.
INSERT INTO mail_t VALUES ('Bob', '1');
SELECT verdict FROM migrate.validate('r');
SELECT regexp_replace(migrate.repair('r'), 'flow_\d+', 'flow_N') AS repair;
ALTER TABLE mail DROP CONSTRAINT mail_pkey;
SELECT "check", severity, message, hint FROM migrate.preflight('r') WHERE "check" IN ('key_index', 'source_key') ORDER BY 1;
SELECT migrate.drop('r');
ALTER TABLE mail ADD PRIMARY KEY (email);
SELECT migrate.define('r', 'mail', 'mail_t');
ALTER TABLE mail DROP CONSTRAINT mail_pkey;
SELECT "check", severity, message, hint FROM migrate.preflight('r') WHERE "check" IN ('key_index', 'source_key') ORDER BY 1;

\set VERBOSITY terse
SELECT migrate.cancel('r'), migrate.drop('r');
DROP SCHEMA rivals_test CASCADE;
