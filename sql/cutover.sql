-- cutover and rollback: gates, dry run, both ways, sequences, several migrations in one transaction.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE ROLE regress_dba SUPERUSER;
SET SESSION AUTHORIZATION regress_dba;  -- who is named below, whatever the superuser is called
CREATE SCHEMA cutover_test;
SET search_path = cutover_test;
CREATE ROLE regress_cutover_app;
CREATE FUNCTION reach(migration text, goal text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1 .. 600 LOOP
        EXIT WHEN EXISTS (SELECT FROM migrate.migration m WHERE m.name = reach.migration AND m.phase = goal);
        PERFORM pg_sleep(0.1);
    END LOOP;
    RETURN (SELECT m.phase FROM migrate.migration m WHERE m.name = reach.migration);
END $$;
CREATE FUNCTION reads(view regclass) RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(DISTINCT d.refobjid::regclass::text, ', ') FROM pg_depend d JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
    WHERE r.ev_class = view AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> view
$$;
CREATE TABLE users (id bigserial PRIMARY KEY, name text NOT NULL, bio text);
CREATE TABLE profiles (user_id bigint PRIMARY KEY, display_name text NOT NULL, bio text);
INSERT INTO users (name, bio) SELECT 'user ' || g, nullif('bio ' || g, 'bio 3') FROM generate_series(1, 50) g;
CREATE FUNCTION differences() RETURNS bigint LANGUAGE sql AS $$
    SELECT count(*) FROM cutover_test.users s FULL JOIN cutover_test.profiles t ON t.user_id = s.id
    WHERE (s.name, s.bio) IS DISTINCT FROM (t.display_name, t.bio)
$$;
SET client_min_messages = notice;

-- too early
SELECT migrate.cutover('nobody');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'profiles', $$ id AS user_id, name AS display_name, bio $$);
SELECT migrate.add_view('m', 'profile');
SELECT migrate.cutover('m');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.rollback('m');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.serves('m');

SET client_min_messages = warning;
SELECT migrate.start('m');
SELECT reach('m', 'ready');
SET client_min_messages = notice;

-- gates, each by name
SELECT migrate.pause('m');
SELECT migrate.cutover('m');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.cutover('m', dry_run => true);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.resume('m');
SELECT migrate.cutover('m', skip => '{phase}');
\echo :LAST_ERROR_SQLSTATE
INSERT INTO migrate._failure (flow, direction, key, sqlstate, origin, retry_at)
SELECT f.id, 'forward', '{1}', '23514', 'dual_write', now() + interval '1 hour' FROM migrate._flow f JOIN migrate._migration m ON m.id = f.migration WHERE m.name = 'm';
SELECT migrate.cutover('m');
\echo :LAST_ERROR_SQLSTATE
-- the rest is tried, too, when a gate is skipped
SELECT split_part(migrate.cutover('m', dry_run => true, skip => '{failures}'), E'\n', 1);
SELECT migrate.set('m', 'require', 'dual_writes,requeue,validation,shadow,reverse,preflight,views');
SELECT split_part(migrate.cutover('m', dry_run => true), E'\n', 1);
SELECT migrate.set('m', 'require', 'default');
DELETE FROM migrate._failure;
ALTER TABLE users DISABLE TRIGGER USER;
SELECT migrate.cutover('m');
\echo :LAST_ERROR_SQLSTATE
SET client_min_messages = warning;
SELECT migrate.retry('m');
SELECT reach('m', 'ready');
SET client_min_messages = notice;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT migrate.cutover('m');
\echo :LAST_ERROR_SQLSTATE
ROLLBACK;

-- rehearsals change nothing, and say how long the application would have waited
CREATE FUNCTION untimed(report text) RETURNS text LANGUAGE sql AS $$ SELECT regexp_replace(report, '[0-9.]+ ms', 'T ms', 'g') $$;
SELECT untimed(migrate.cutover('m', dry_run => true));
SELECT untimed(migrate.rollback('m', dry_run => true));
SELECT phase FROM migrate.migration WHERE name = 'm';
SELECT reads('profile');
SELECT tgname FROM pg_trigger WHERE tgrelid = 'profiles'::regclass AND NOT tgisinternal;

-- forth
SELECT migrate.cutover('m');
SELECT migrate.cutover('m');
SELECT migrate.serves('m');
SELECT reads('profile');
INSERT INTO profile (display_name) VALUES ('through the view') RETURNING *;
UPDATE profile SET bio = 'new' WHERE user_id = 2;
DELETE FROM profile WHERE user_id = 4;
-- a straggler at the old table
UPDATE users SET bio = 'old way' WHERE id = 5;
SELECT * FROM users WHERE id IN (2, 4, 5, 51) ORDER BY id;
SELECT differences();

-- and back: nothing is lost
SELECT untimed(migrate.rollback('m', dry_run => true));
SELECT migrate.rollback('m');
SELECT migrate.rollback('m');
SELECT migrate.serves('m');
SELECT bio FROM profile WHERE user_id = 2;
INSERT INTO profile (display_name) VALUES ('again') RETURNING user_id;
-- a straggler at the new table
UPDATE profiles SET bio = 'new way' WHERE user_id = 6;
SELECT bio FROM users WHERE id = 6;
SELECT differences();

-- the next key is new on both sides, whoever wrote the last ones
INSERT INTO profiles VALUES (1000, 'by its own key', NULL);
SELECT migrate.cutover('m');
INSERT INTO profile (display_name) VALUES ('past 1000') RETURNING user_id;
SELECT differences();
SELECT kind, from_phase, to_phase FROM migrate.events WHERE migration = 'm' AND (kind IN ('cutover', 'rollback') OR to_phase = 'cut_over')
    AND at >= (SELECT max(at) FROM migrate.events WHERE migration = 'm' AND kind = 'define') ORDER BY at;
SELECT migrate.finalize('m', force => 'm');
SELECT migrate.cutover('m');
SELECT migrate.rollback('m');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.serves('m');
SELECT migrate.drop('m');

-- what is not carried back must be given or accepted
CREATE TABLE shouts (id bigint PRIMARY KEY, shout text NOT NULL);
SELECT migrate.define('g', 'users', 'shouts', $$ id, upper(name) AS shout $$, on_target_delete => 'keep');
SET client_min_messages = warning;
SELECT migrate.set('g', 'cutover', 'view');
SELECT migrate.start('g');
SELECT reach('g', 'ready');
SET client_min_messages = notice;
SELECT migrate.cutover('g');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.set('g', 'accept_reverse_gaps', 'on');
SELECT migrate.add_view('g', 'shout_view');
SELECT migrate.cutover('g');
SELECT count(*) FROM shout_view;
SELECT migrate.rollback('g');
SELECT migrate.cancel('g');
SELECT migrate.drop('g');
DROP VIEW shout_view;

-- applications ask for themselves
SET ROLE regress_cutover_app;
SELECT migrate.serves('m');
\echo :LAST_ERROR_SQLSTATE
RESET ROLE;
SELECT migrate.allow('regress_cutover_app', 'observe');

-- several in one transaction: both or none
CREATE TABLE a (id int PRIMARY KEY, v text);
CREATE TABLE a2 (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, v text);
CREATE TABLE b (id int PRIMARY KEY, v text);
CREATE TABLE b2 (id int PRIMARY KEY, v text);
INSERT INTO a SELECT g, 'a' FROM generate_series(1, 10) g;
INSERT INTO b SELECT g, 'b' FROM generate_series(1, 10) g;
GRANT USAGE ON SCHEMA cutover_test TO regress_cutover_app;
GRANT SELECT ON a TO regress_cutover_app;
SELECT migrate.define('a', 'a', 'a2', on_target_delete => 'delete');
SELECT migrate.define('b', 'b', 'b2', on_target_delete => 'delete');
SELECT migrate.add_view('a', 'a', shape => 'source');
SELECT migrate.add_view('b', 'bv');
SET client_min_messages = warning;
SELECT migrate.start('a');
SELECT migrate.start('b');
SELECT reach('a', 'ready');
SELECT reach('b', 'ready');
SET client_min_messages = notice;
BEGIN;
SELECT migrate.cutover('a');
SELECT migrate.cutover('b');
ROLLBACK;
SELECT migrate.serves('a'), migrate.serves('b');
SELECT relkind, relname FROM pg_class WHERE relnamespace = 'cutover_test'::regnamespace AND relname ~ '^(a|bv)' AND relkind IN ('r', 'v') ORDER BY relname;
BEGIN;
SELECT migrate.cutover('a');
SELECT migrate.cutover('b');
COMMIT;
SELECT migrate.serves('a'), migrate.serves('b');
SET ROLE regress_cutover_app;
SELECT migrate.serves('a');
SELECT migrate.serves('b');
SELECT count(*) FROM a;
RESET ROLE;
-- in one call: in the order of the names, each once, what is switched already left alone
SELECT migrate.rollback(ARRAY['b', 'a', 'b']);
SELECT migrate.serves('a'), migrate.serves('b');
SELECT migrate.cutover('a');
SELECT untimed(migrate.cutover(ARRAY['a', 'b'], dry_run => true));
SELECT migrate.cutover(ARRAY['a', 'b']);
SELECT migrate.serves('a'), migrate.serves('b');
-- a gate of one refuses both
SELECT migrate.rollback(ARRAY['a', 'b']);
SELECT migrate.pause('b');
SELECT migrate.cutover(ARRAY['a', 'b']);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.serves('a'), migrate.serves('b');
SELECT migrate.resume('b');
SELECT migrate.cutover(ARRAY['a', 'nobody']);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.cutover(ARRAY['a', NULL]);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.cutover('{}'::text[]);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.serves('a'), migrate.serves('b');
-- and a failure between the two undoes the first
BEGIN;
SELECT migrate.cutover('a');
SELECT migrate.cutover('b', skip => '{phase}');
COMMIT;
SELECT migrate.serves('a'), migrate.serves('b');
SELECT migrate.cutover(ARRAY['a', 'b']);
-- a view belongs to one migration: a second one cannot switch it
SELECT migrate.add_view('a', 'bv');
\echo :LAST_ERROR_SQLSTATE
-- the identity of the target goes on where the source's keys end
INSERT INTO a (v) VALUES ('next') RETURNING id;
SELECT * FROM a_migrate WHERE id > 10;
SELECT migrate.rollback('a');
SELECT migrate.rollback('b');
SELECT migrate.cancel('a');
SELECT migrate.cancel('b');
-- a worker whose job ends badly just after the cancel marks nothing as failed: no verb would lead out
SELECT migrate._fail(m, 'too late') FROM migrate._migration m WHERE m.name = 'b';
SELECT phase, failed_reason FROM migrate._migration WHERE name = 'b';
SELECT relkind, relname FROM pg_class WHERE relnamespace = 'cutover_test'::regnamespace AND relname ~ '^(a|bv)' AND relkind IN ('r', 'v') ORDER BY relname;
SELECT tgname FROM pg_trigger WHERE tgrelid IN ('a'::regclass, 'a2'::regclass, 'b'::regclass, 'b2'::regclass) AND NOT tgisinternal;
SELECT migrate.drop('a');
SELECT migrate.drop('b');

-- what was found before a switch is not mended the other way: there the only row left would be one too many
CREATE TABLE only_s (id int PRIMARY KEY, v text);
CREATE TABLE only_t (id int PRIMARY KEY, v text);
INSERT INTO only_s SELECT g, 'v' || g FROM generate_series(1, 20) g;
SELECT migrate.define('only', 'only_s', 'only_t', on_target_delete => 'delete');
SELECT migrate.start('only');
SELECT reach('only', 'ready');
DELETE FROM only_t WHERE id = 7;
SELECT mismatches FROM migrate.validate('only');
SELECT migrate.cutover('only', skip => '{validation}');
SELECT migrate.repair('only');
SELECT migrate.repair('only', execute => true);
\echo :LAST_ERROR_SQLSTATE
SELECT mismatches FROM migrate.validate('only');
SELECT migrate.repair('only');
SELECT count(*) FROM only_s WHERE id = 7;
SELECT migrate.rollback('only', skip => '{validation}');
SELECT migrate.repair('only');
SELECT mismatches FROM migrate.validate('only');
SELECT regexp_replace(r, 'flow_\d+', 'flow_N') FROM migrate.repair('only', execute => true) r;
SELECT mismatches FROM migrate.validate('only');
SELECT migrate.cancel('only');
SELECT migrate.drop('only');

SET client_min_messages = warning;
SELECT migrate.allow('regress_cutover_app', 'nothing');
DROP SCHEMA cutover_test CASCADE;
DROP ROLE regress_cutover_app;
RESET SESSION AUTHORIZATION;
DROP ROLE regress_dba;
