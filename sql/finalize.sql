-- finalize and drop: the window, what is removed, what stands in the way.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE SCHEMA finalize_test;
SET search_path = finalize_test;
CREATE FUNCTION reach(migration text, goal text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1 .. 600 LOOP
        EXIT WHEN EXISTS (SELECT FROM migrate.migration m WHERE m.name = reach.migration AND m.phase = goal);
        PERFORM pg_sleep(0.1);
    END LOOP;
    RETURN (SELECT m.phase FROM migrate.migration m WHERE m.name = reach.migration);
END $$;
CREATE TABLE users (id serial PRIMARY KEY, name text NOT NULL, bio text, city text, secret text);
CREATE TABLE profiles (user_id int PRIMARY KEY, display_name text NOT NULL, bio text, city text);
CREATE INDEX ON users (city, bio);
INSERT INTO users (name, bio, city) SELECT 'user ' || g, 'bio', 'city' FROM generate_series(1, 20) g;
SELECT migrate.define('m', 'users', 'profiles', $$ id AS user_id, name AS display_name, bio, city $$, on_target_delete => 'delete');
SELECT migrate.set('m', 'accept_reverse_gaps', 'on');
SELECT migrate.add_view('m', 'profile');
SET client_min_messages = notice;

SELECT migrate.finalize('m');
\echo :LAST_ERROR_SQLSTATE
SET client_min_messages = warning;
SELECT migrate.start('m');
SELECT reach('m', 'ready');
SET client_min_messages = notice;
SELECT migrate.finalize('m');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.drop('m');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.cutover('m');
SELECT migrate.drop('m');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'profiles', 'id AS user_id');

-- the window
DO $$ BEGIN PERFORM migrate.finalize('m');
EXCEPTION WHEN object_not_in_prerequisite_state THEN RAISE NOTICE '%', regexp_replace(sqlerrm, 'until .*', 'until <time>'); END $$;
SELECT migrate.finalize('m', force => 'yes');
\echo :LAST_ERROR_SQLSTATE

-- columns: by name, carried, no key, nothing depending
SELECT migrate.finalize('m', force => 'm', drop_columns => '{nothing}');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.finalize('m', force => 'm', drop_columns => '{id}');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.finalize('m', force => 'm', drop_columns => '{secret}');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.finalize('m', force => 'm', drop_columns => '{bio}', drop_source => true);
\echo :LAST_ERROR_SQLSTATE
-- a rehearsal lists all that would go, and what is in the way of it, also inside the window
CREATE FUNCTION rehearse(drop_source boolean DEFAULT false, drop_columns text[] DEFAULT '{}', migration text DEFAULT 'm') RETURNS SETOF text LANGUAGE sql AS $$
    SELECT regexp_replace(regexp_replace(regexp_replace(l, '(_)[0-9]+(_)', '\1N\2'), 'until .*', 'until <time>'), '[0-9.]+ ms', 'T ms', 'g')
    FROM regexp_split_to_table(migrate.finalize(migration, drop_source, drop_columns, dry_run => true), E'\n') l
$$;
SELECT * FROM rehearse(drop_columns => '{bio}');
CREATE VIEW cities AS SELECT DISTINCT city FROM users;
CREATE VIEW bios AS SELECT DISTINCT bio FROM users;
SELECT * FROM rehearse(drop_columns => '{bio,city}');
SELECT * FROM rehearse(drop_source => true);
SELECT migrate.finalize('m', dry_run => true, force => 'yes');
\echo :LAST_ERROR_SQLSTATE
DROP VIEW bios;
SELECT phase FROM migrate.migration WHERE name = 'm';
SELECT migrate.finalize('m', force => 'm', drop_columns => '{bio,city}');
\echo :LAST_ERROR_SQLSTATE
SELECT phase FROM migrate.migration WHERE name = 'm';
SELECT count(*) FROM pg_trigger WHERE tgrelid IN ('users'::regclass, 'profiles'::regclass) AND tgname LIKE '!migrate%_row';
DROP VIEW cities;
SELECT migrate.set('m', 'rollback_window', '0');
SELECT migrate.finalize('m', drop_columns => '{bio,city}');
SELECT attname FROM pg_attribute WHERE attrelid = 'users'::regclass AND attnum > 0 AND NOT attisdropped ORDER BY attnum;
SELECT count(*) FROM pg_trigger WHERE tgrelid IN ('users'::regclass, 'profiles'::regclass) AND tgname LIKE '!migrate%';
SELECT count(*) FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow JOIN migrate._migration m ON m.id = f.migration WHERE m.name = 'm';
SELECT migrate.finalize('m');
SELECT migrate.finalize('m', drop_columns => '{name}');
\echo :LAST_ERROR_SQLSTATE

-- the source, later: whatever depends on it is listed, nothing cascades; sequences that others use stay
CREATE TABLE orders (id int PRIMARY KEY, user_id int REFERENCES users);
CREATE VIEW names AS SELECT name FROM users;
SELECT migrate.finalize('m', drop_source => true);
\echo :LAST_ERROR_SQLSTATE
ALTER TABLE orders DROP CONSTRAINT orders_user_id_fkey;
DROP VIEW names;
SELECT * FROM rehearse(drop_source => true);
SELECT migrate.finalize('m', drop_source => true);
SELECT to_regclass('users') IS NULL AS gone;
SELECT migrate.finalize('m', drop_source => true);
INSERT INTO profile (display_name) VALUES ('after all') RETURNING user_id;
SELECT migrate.serves('m');
SELECT migrate.drop('m');
SELECT migrate.drop('m');
SELECT migrate.drop('never');
\echo :LAST_ERROR_SQLSTATE
SELECT count(*) FROM profile;

-- shape source: the table that stepped aside is what goes; the view stays
SET client_min_messages = warning;
CREATE TABLE things (id bigserial PRIMARY KEY, name text NOT NULL);
CREATE TABLE items (id bigint PRIMARY KEY, label text NOT NULL);
INSERT INTO things (name) VALUES ('one'), ('two');
SELECT migrate.define('t', 'things', 'items', $$ id, name AS label $$, on_target_delete => 'delete');
SELECT migrate.add_view('t', 'things', shape => 'source');
SELECT migrate.start('t');
SELECT reach('t', 'ready');
SET client_min_messages = notice;
SELECT migrate.cutover('t');
SELECT migrate.finalize('t', force => 't', drop_source => true);
INSERT INTO things (name) VALUES ('three') RETURNING *;
SELECT * FROM items ORDER BY id;
SELECT migrate.drop('t');

-- a partitioned source: its partitions have the sequence's default, too, and go with it; the target has it to stay
SET client_min_messages = warning;
CREATE TABLE parted (id bigserial, v text, PRIMARY KEY (id)) PARTITION BY RANGE (id);
CREATE TABLE parted_1 PARTITION OF parted FOR VALUES FROM (0) TO (1000) PARTITION BY RANGE (id);
CREATE TABLE parted_1_1 PARTITION OF parted_1 DEFAULT;
CREATE SEQUENCE inner_seq OWNED BY parted_1_1.v;
CREATE TABLE whole (id bigint PRIMARY KEY DEFAULT nextval('parted_id_seq'), v text, n bigint DEFAULT nextval('inner_seq'));
INSERT INTO parted (v) VALUES ('one'), ('two');
SELECT migrate.define('p', 'parted', 'whole', on_target_delete => 'delete');
SELECT migrate.start('p');
SELECT reach('p', 'ready');
SET client_min_messages = notice;
SELECT migrate.cutover('p');
SELECT migrate.finalize('p', force => 'p', drop_source => true);
SELECT pg_get_serial_sequence('whole', 'id'), pg_get_serial_sequence('whole', 'n');
INSERT INTO whole (v) VALUES ('three') RETURNING *;
SELECT migrate.drop('p');

-- Rows that a filter leaves out are nowhere else: what a filtered flow alone carries, or what only its filter reads, is no column to drop
-- by its name, and a table with such rows goes only where the migration's name is said.
SET client_min_messages = warning;
CREATE TABLE person (id int PRIMARY KEY, name text, street text, city text, active boolean NOT NULL DEFAULT true);
CREATE TABLE person_contact (id int PRIMARY KEY, name text);
CREATE TABLE person_address (id int PRIMARY KEY, street text, place text);
CREATE TABLE person_far (id int PRIMARY KEY, street text);
INSERT INTO person SELECT g, 'p' || g, 'street ' || g, 'city', g % 10 > 0 FROM generate_series(1, 50) g;
SELECT migrate.define('split', 'person', 'person_contact', on_target_delete => 'delete');
SELECT migrate.add_flow('split', 'person', 'person_address', 'id, street, left(city, 3) AS place', filter => 'active', on_target_delete => 'keep');
SELECT migrate.add_flow('split', 'person', 'person_far', filter => 'NOT active AND id > 20', on_target_delete => 'keep');
SELECT f.name, f.not_carried FROM migrate._flow f JOIN migrate._migration m ON m.id = f.migration WHERE m.name = 'split' ORDER BY f.id;
SELECT migrate.set('split', 'accept_reverse_gaps', 'on'), migrate.start('split');
SELECT reach('split', 'ready');
SELECT migrate.cutover('split');
SET client_min_messages = notice;
SELECT migrate.finalize('split', force => 'split', drop_columns => '{name,street}');
\echo :LAST_ERROR_SQLSTATE
SELECT count(*) FROM finalize_test.person WHERE (active) IS NOT TRUE AND (NOT active AND id > 20) IS NOT TRUE;
SELECT migrate.finalize('split', force => 'split', drop_columns => '{city}');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.finalize('split', force => 'split', drop_columns => '{active}');
\echo :LAST_ERROR_SQLSTATE
SELECT r FROM rehearse(true, migration => 'split') r WHERE r !~ '^(trigger|forward|reverse)';
SELECT migrate.set('split', 'rollback_window', '0');
SELECT r FROM rehearse(true, migration => 'split') r WHERE r ~ '^refused';
SELECT migrate.finalize('split', drop_source => true);
\echo :LAST_ERROR_SQLSTATE
-- (name is carried for every row)
SELECT migrate.finalize('split', drop_columns => '{name}');
SELECT migrate.finalize('split', drop_source => true, force => 'no');
\echo :LAST_ERROR_SQLSTATE
SELECT count(*), count(street), count(city) FROM person;
SELECT migrate.finalize('split', drop_source => true, force => 'split');
SELECT to_regclass('person') IS NULL AS gone;
SELECT migrate.drop('split');

-- what an old client wrote to the source after the cutover and the target refused, and a column that came after define, are nowhere else
SET client_min_messages = warning;
CREATE TABLE late (id int PRIMARY KEY, v text);
CREATE TABLE late_new (id int PRIMARY KEY, v text CHECK (v <> 'refused'));
INSERT INTO late SELECT g, 'v' FROM generate_series(1, 5) g;
SELECT migrate.define('late', 'late', 'late_new', on_target_delete => 'delete');
SELECT migrate.start('late');
SELECT reach('late', 'ready');
SELECT migrate.cutover('late');
SELECT migrate.set('late', 'rollback_window', '0');
ALTER TABLE late ADD COLUMN came text, ADD COLUMN twice text GENERATED ALWAYS AS (v || v) STORED;
INSERT INTO late VALUES (6, 'refused', 'later'), (7, 'refused', 'later'), (8, 'carried', 'later');
SET client_min_messages = notice;
SELECT r FROM rehearse(true, migration => 'late') r WHERE r ~ '^refused';
SELECT migrate.finalize('late');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.finalize('late', drop_source => true, force => 'late');
\echo :LAST_ERROR_SQLSTATE
BEGIN;
SELECT migrate.finalize('late', force => 'late');
ROLLBACK;
UPDATE late SET v = 'mended' WHERE v = 'refused';
SET client_min_messages = warning;
SELECT migrate.retry('late');
DO $$ BEGIN FOR i IN 1 .. 600 LOOP EXIT WHEN NOT EXISTS (SELECT FROM migrate._failure); PERFORM pg_sleep(0.1); END LOOP; END $$;
SET client_min_messages = notice;
SELECT migrate.finalize('late', drop_source => true);
\echo :LAST_ERROR_SQLSTATE
ALTER TABLE late DROP COLUMN came;
SELECT replace(migrate.finalize('late', drop_source => true), 'column twice of table finalize_test.late, ', '') AS finalize;  -- (PostgreSQL 13 names it)
SELECT string_agg(v, ', ' ORDER BY id) FROM late_new WHERE id > 5;
SELECT migrate.drop('late');
-- … nor does cancel keep silent about what a client wrote to the target after the rollback and the source refused
SET client_min_messages = warning;
CREATE TABLE early (id int PRIMARY KEY, v text CHECK (v <> 'refused'));
CREATE TABLE early_new (id int PRIMARY KEY, v text);
SELECT migrate.define('early', 'early', 'early_new', on_target_delete => 'delete');
SELECT migrate.start('early');
SELECT reach('early', 'ready');
SELECT migrate.cutover('early');
SELECT migrate.rollback('early');
INSERT INTO early_new VALUES (1, 'refused'), (2, 'carried'), (3, 'refused');
SELECT migrate.cancel('early');
SELECT migrate.drop('early');
-- a column that was added to the source after define: nobody has been told that it is in no target
SET client_min_messages = warning;
CREATE TABLE grown (id int PRIMARY KEY, v text, told text);
CREATE TABLE grown_new (id int PRIMARY KEY, v text);
INSERT INTO grown VALUES (1, 'v', 'told');
SELECT migrate.define('grown', 'grown', 'grown_new', on_target_delete => 'keep');
SELECT migrate.set('grown', 'rollback_window', '0');
SELECT migrate.start('grown');
SELECT reach('grown', 'ready');
SELECT p.severity, p.message FROM migrate.preflight('grown') p WHERE p."check" = 'not_carried';
ALTER TABLE grown ADD COLUMN phone text, ADD COLUMN made text GENERATED ALWAYS AS (upper(v)) STORED;
UPDATE grown SET phone = '123';
SELECT p.severity, p.message, p.hint FROM migrate.preflight('grown') p WHERE p."check" = 'not_carried';
SELECT migrate.cutover('grown');
SELECT migrate.finalize('grown', drop_source => true);
\echo :LAST_ERROR_SQLSTATE
SELECT phone FROM grown;
-- (a column that is named twice is dropped once)
SELECT count(*) FROM regexp_split_to_table(migrate.finalize('grown', drop_columns => '{v,v}', dry_run => true), E'\n') l WHERE l LIKE 'column "v"%';
SELECT regexp_replace(l, '[0-9.]+ ms', 'T ms', 'g') FROM regexp_split_to_table(migrate.finalize('grown', drop_source => true, force => 'grown', dry_run => true), E'\n') l WHERE l ~ 'phone|refused';
SELECT replace(migrate.finalize('grown', drop_source => true, force => 'grown'), 'column made of table finalize_test.grown, ', '') AS finalize;
SELECT count(*) FROM migrate.preflight('grown') p WHERE p.severity = 'error';
SELECT migrate.drop('grown');

-- What the migration rests on is dropped, as PostgreSQL's own HINT says, by CASCADE: the application's statements go on, no switch passes, and
-- the migration can be ended.
SET client_min_messages = warning;
CREATE FUNCTION refused(call text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    what text;
    help text;
BEGIN
    EXECUTE 'SELECT ' || call;
    RETURN 'not refused';
EXCEPTION WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS what = PG_EXCEPTION_DETAIL, help = PG_EXCEPTION_HINT;
    RETURN regexp_replace(format(E'%s: %s\n%s\n%s', SQLSTATE, SQLERRM, what, help), 'OID \d+', 'OID …', 'g');
END $$;
CREATE FUNCTION prepare(dual_write text) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    DROP TABLE IF EXISTS old, new CASCADE;
    CREATE TABLE old (id int PRIMARY KEY, v text, w text);
    CREATE TABLE new (id int PRIMARY KEY, v text, w text);
    INSERT INTO old SELECT g, 'v', 'w' FROM generate_series(1, 20) g;
    PERFORM migrate.define('lost', 'old', 'new', on_target_delete => 'delete'), migrate.set('lost', 'dual_write', dual_write);
    PERFORM migrate.start('lost');
END $$;
\pset format unaligned
\pset tuples_only on
-- a column of the source
SELECT prepare('best_effort');
SELECT reach('lost', 'ready');
ALTER TABLE old DROP COLUMN w CASCADE;
UPDATE old SET v = 'x' WHERE id = 1; INSERT INTO old VALUES (100, 'x'); DELETE FROM old WHERE id = 2; TRUNCATE old; INSERT INTO old VALUES (1, 'y');
SELECT refused($$ migrate.cutover('lost') $$);
SELECT refused($$ migrate.retry('lost') $$);
SELECT refused($$ 1 FROM migrate.validate('lost') $$);
SELECT migrate.cancel('lost'), migrate.drop('lost');
-- strict keeps its promise, and says what to do
SELECT prepare('strict');
SELECT reach('lost', 'ready');
ALTER TABLE old DROP COLUMN w CASCADE;
UPDATE old SET v = 'x' WHERE id = 1;
\echo :LAST_ERROR_SQLSTATE
DROP TABLE new CASCADE;
UPDATE old SET v = 'x' WHERE id = 1;
SELECT migrate.cancel('lost'), migrate.drop('lost');
-- the target
SELECT prepare('best_effort');
SELECT reach('lost', 'ready');
DROP TABLE new CASCADE;
UPDATE old SET v = 'x' WHERE id = 1; INSERT INTO old VALUES (100, 'x'); DELETE FROM old WHERE id = 2; TRUNCATE old;
SELECT refused($$ migrate.cutover('lost') $$);
SELECT migrate.cancel('lost'), migrate.drop('lost');
-- the source, after the cutover
SELECT prepare('best_effort');
SELECT reach('lost', 'ready');
SELECT migrate.cutover('lost');
DROP TABLE old CASCADE;
UPDATE new SET v = 'x' WHERE id = 1; INSERT INTO new VALUES (100, 'x'); DELETE FROM new WHERE id = 2; TRUNCATE new;
SELECT refused($$ migrate.rollback('lost') $$);
SELECT refused($$ migrate.plan('lost') $$);
SELECT migrate.finalize('lost', force => 'lost'), migrate.drop('lost');
-- both, before the cutover and after it
SELECT prepare('best_effort');
SELECT reach('lost', 'ready');
DROP TABLE old, new CASCADE;
SELECT refused($$ 1 FROM migrate.validate('lost') $$);
SELECT migrate.cancel('lost'), migrate.drop('lost');
SELECT prepare('best_effort');
SELECT reach('lost', 'ready');
SELECT migrate.cutover('lost');
DROP TABLE old, new CASCADE;
SELECT migrate.finalize('lost', force => 'lost', dry_run => true) ~ '^cut_over' AS rehearsed;
SELECT migrate.finalize('lost', force => 'lost'), migrate.drop('lost');
\pset format aligned
\pset tuples_only off

SET client_min_messages = warning;
DROP SCHEMA finalize_test CASCADE;
