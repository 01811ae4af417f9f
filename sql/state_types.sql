-- State, not events: values of every kind, every event in a session of its own, after DDL, and under writers with other settings.
\set SHOW_CONTEXT never
\set VERBOSITY terse
SET client_min_messages = warning;
CREATE SCHEMA types_test;
CREATE EXTENSION citext SCHEMA types_test;
CREATE FUNCTION types_test.arm(migration text, direction text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
BEGIN
    SELECT * INTO m FROM migrate._migration x WHERE x.name = migration;
    PERFORM migrate._create_triggers(m, direction);
    IF direction = 'forward' THEN
        PERFORM migrate._apply_range(f.id, NULL, NULL, 1000000) FROM migrate._flow f WHERE f.migration = m.id;
    END IF;
END $$;
CREATE FUNCTION types_test.same(a text, b text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    n bigint;
BEGIN
    EXECUTE format('WITH a AS (%s), b AS (%s) SELECT count(*) FROM ((TABLE a EXCEPT ALL TABLE b) UNION ALL (TABLE b EXCEPT ALL TABLE a)) x', a, b) INTO n;
    RETURN CASE n WHEN 0 THEN 'ok' ELSE n || ' rows differ' END || (SELECT CASE count(*) WHEN 0 THEN '' ELSE format(', %s failures', count(*)) END FROM migrate._failure);
END $$;

-- generated columns on both sides, GENERATED ALWAYS identities on both sides, domains, enums, composite, array, range and citext values
SET search_path = types_test;
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE DOMAIN name_list AS text[] CHECK (array_position(VALUE, '') IS NULL);
CREATE TYPE mood AS ENUM ('sad', 'ok', 'happy');
CREATE TYPE pair AS (a int, b text);
CREATE TABLE s (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, p positive, l name_list, m mood, c pair, ca pair[], r int4range, ct citext, j jsonb, f float8, n numeric, b bytea, twice int GENERATED ALWAYS AS (p * 2) STORED);
CREATE TABLE t (b bytea, id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, p positive, l name_list, m mood, c pair, ca pair[], r int4range, ct citext, j jsonb, f float8, n numeric, thrice int GENERATED ALWAYS AS (p * 3) STORED);
CREATE FUNCTION equal() RETURNS text LANGUAGE sql AS $$ SELECT types_test.same(
    'SELECT id, p, l, m, c::text, ca::text, r, ct::text, j::text, f::text, n::text, b, p * 2, p * 3 FROM types_test.s WHERE twice IS NOT DISTINCT FROM p * 2',
    'SELECT id, p, l, m, c::text, ca::text, r, ct::text, j::text, f::text, n::text, b, p * 2, thrice FROM types_test.t') $$;
INSERT INTO s (p, l, m, c, ca, r, ct, j, f, n, b) SELECT g, ARRAY['a' || g, NULL], (ARRAY['sad', 'ok', 'happy'])[1 + g % 3]::mood, ROW(g, 'x')::pair, ARRAY[ROW(g, 'y')::pair, NULL], int4range(g, 2 * g), 'Text' || g, jsonb_build_object('k', g), g / 3.0::float8, g + 0.10, decode(md5(g::text), 'hex') FROM generate_series(1, 30) g;
SELECT migrate.define('types', 's', 't', 'id, p, l, m, c, ca, r, ct, j, f, n, b', on_target_delete => 'delete');
SELECT arm('types', 'forward'), equal();
UPDATE s SET ct = upper(ct::text), j = jsonb_set(j, '{k}', '1.0'), n = n::numeric(10,5), f = '-0' WHERE id < 10;
UPDATE s SET ca[1].a = 7, c.b = NULL, l[2] = 'new', r = r * int4range(3, 8), m = 'happy', p = p + 1 WHERE id BETWEEN 5 AND 15;
UPDATE s SET j = '{"k": 1.00}', n = 1.0, f = '0' WHERE id IN (1, 2); UPDATE s SET n = 1.00 WHERE id = 1;
UPDATE s SET (p, l, m, c, ca, r, ct, j, f, n, b) = (NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL) WHERE id = 20; UPDATE s SET c = ROW(NULL, NULL), ca = '{}', r = 'empty', b = '' WHERE id IN (20, 21);
INSERT INTO s (p) VALUES (99) RETURNING id; INSERT INTO s (id, p) OVERRIDING SYSTEM VALUE VALUES (1000, 1);
DELETE FROM s WHERE id = 25;
SELECT equal();
SELECT arm('types', 'reverse');
UPDATE t SET ct = lower(ct::text), f = 'NaN', n = 'NaN', p = 5, c = ROW(1, '"(,'), l = l || ARRAY['x', 'y'] WHERE id < 10; INSERT INTO t (id, p) OVERRIDING SYSTEM VALUE VALUES (2000, 3); DELETE FROM t WHERE id = 11;
UPDATE t SET ct = NULL, j = NULL, b = NULL, c = NULL WHERE id = 12; UPDATE t SET m = 'sad', ca = ARRAY[ROW(1, NULL)]::pair[] WHERE id BETWEEN 12 AND 14;
SELECT equal();
SELECT migrate.drop('types');
DROP TABLE s, t;

-- each event alone in a new session, so that no plan and no cache is there yet; in both directions, and of each kind the first after DDL
CREATE TABLE s (id int PRIMARY KEY, v text, plain int, other int);
CREATE TABLE t (id int PRIMARY KEY, v text, plain int);
INSERT INTO s SELECT g, 'v', g, g FROM generate_series(1, 100) g;
SELECT migrate.define('fresh', 's', 't', 'id, v, plain', on_target_delete => 'delete');
SELECT arm('fresh', 'forward'), arm('fresh', 'reverse');
CREATE OR REPLACE FUNCTION equal() RETURNS text LANGUAGE sql AS $$ SELECT types_test.same('SELECT id, v, plain FROM types_test.s', 'SELECT id, v, plain FROM types_test.t') $$;
\c -
INSERT INTO types_test.s VALUES (201, 'new');
\c -
UPDATE types_test.s SET v = 'w' WHERE id = 1;
\c -
DELETE FROM types_test.s WHERE id = 2;
\c -
UPDATE types_test.s SET id = 203 WHERE id = 3;
\c -
INSERT INTO types_test.s (id, v) VALUES (4, 'x') ON CONFLICT (id) DO UPDATE SET v = 'x';
\c -
COPY types_test.s (id, v) FROM stdin;
205	copied
\.
\c -
SELECT current_setting('max_prepared_transactions')::int > 0 AS two_phase \gset
\if :two_phase
BEGIN; UPDATE types_test.s SET v = 'prepared' WHERE id = 5; PREPARE TRANSACTION 'fresh';
\c -
COMMIT PREPARED 'fresh';
\endif
SELECT types_test.equal();
\c -
INSERT INTO types_test.t VALUES (301, 'new');
\c -
UPDATE types_test.t SET v = 'w' WHERE id = 11;
\c -
UPDATE types_test.t SET id = 303 WHERE id = 13;
\c -
UPDATE types_test.s SET v = 'before', id = id + 400 WHERE id IN (14, 15); ALTER TABLE types_test.s ADD COLUMN more text DEFAULT 'x'; UPDATE types_test.s SET v = 'added', more = 'y' WHERE id IN (16, 414);
ALTER TABLE types_test.t ADD COLUMN note text NOT NULL DEFAULT 'none'; INSERT INTO types_test.s VALUES (206, 'after'); UPDATE types_test.t SET note = 'mine' WHERE id = 17; UPDATE types_test.s SET v = 'kept' WHERE id = 17; SELECT note FROM types_test.t WHERE id = 17;
\c -
UPDATE types_test.s SET v = 'cached' WHERE id = 18; ALTER TABLE types_test.s ALTER other TYPE bigint; UPDATE types_test.s SET v = 'retyped' WHERE id = 18; VACUUM FULL types_test.s; UPDATE types_test.s SET v = 'full' WHERE id = 19; CLUSTER types_test.t USING t_pkey; DELETE FROM types_test.s WHERE id = 20; REINDEX TABLE types_test.t; INSERT INTO types_test.s VALUES (207, 'reindexed');
ALTER TABLE types_test.s RENAME v TO w; UPDATE types_test.s SET w = 'renamed' WHERE id = 21; ALTER TABLE types_test.s RENAME w TO v; ALTER TABLE types_test.t RENAME id TO key; UPDATE types_test.s SET id = 222 WHERE id = 22; ALTER TABLE types_test.t RENAME key TO id;
CREATE INDEX ON types_test.t (v); ALTER TABLE types_test.t ADD CHECK (plain < 1000); UPDATE types_test.s SET plain = 5000 WHERE id = 23; UPDATE types_test.s SET plain = 50 WHERE id = 24;
SELECT key, sqlstate FROM migrate._failure; DELETE FROM migrate._failure; UPDATE types_test.s SET plain = 7 WHERE id = 23;
SELECT types_test.equal();
-- the target's key index goes: the application does not notice
ALTER TABLE types_test.t DROP CONSTRAINT t_pkey; UPDATE types_test.s SET v = 'no key' WHERE id = 24; INSERT INTO types_test.s VALUES (208, 'no key');
SELECT key, sqlstate FROM migrate._failure ORDER BY id;
ALTER TABLE types_test.t ADD PRIMARY KEY (id); SELECT migrate._apply_keys(flow, direction, ARRAY[key]) FROM migrate._failure; DELETE FROM migrate._failure;
SELECT types_test.equal();
SET client_min_messages = warning;
SELECT migrate.drop('fresh');
DROP TABLE types_test.s, types_test.t;

-- a writer whose session reads and writes values otherwise; keys that are recorded go through text and back exactly
SET search_path = types_test;
CREATE ROLE types_writer;
CREATE TABLE s (at timestamptz, d date, f float8, i interval, b bytea, v text, PRIMARY KEY (at, d, f, i, b));
CREATE TABLE t (at timestamptz, d date, f float8, i interval, b bytea, v text CHECK (v <> 'refused'), PRIMARY KEY (at, d, f, i, b));
GRANT USAGE ON SCHEMA types_test TO types_writer; GRANT SELECT, INSERT, UPDATE, DELETE ON s TO types_writer;
SELECT migrate.define('settings', 's', 't');
SELECT arm('settings', 'forward');
SET search_path = pg_catalog; SET DateStyle = 'SQL, DMY'; SET TimeZone = 'Asia/Kolkata'; SET IntervalStyle = sql_standard; SET extra_float_digits = -10; SET bytea_output = escape; SET ROLE types_writer;
INSERT INTO types_test.s SELECT timestamptz '2026-01-02 03:04:05.678901+00' + g * interval '1 day', date '2026-03-04' + g, g / 3.0::float8, g * interval '1 mon -2 days 3 hours', decode(md5(g::text), 'hex'), CASE WHEN g % 2 = 0 THEN 'refused' ELSE 'v' END FROM generate_series(1, 10) g;
UPDATE types_test.s SET v = 'w', d = d + 100 WHERE f < 1; UPDATE types_test.s SET v = 'refused' WHERE f > 3; DELETE FROM types_test.s WHERE f = 5 / 3.0::float8;
RESET ROLE; RESET ALL; SET client_min_messages = warning; SET search_path = types_test;
SELECT count(DISTINCT key) FROM migrate._failure;
ALTER TABLE t DROP CONSTRAINT t_v_check; SELECT count(migrate._apply_keys(flow, direction, ARRAY[key])) AS locked FROM (SELECT DISTINCT flow, direction, key FROM migrate._failure) f; DELETE FROM migrate._failure;
SELECT same('TABLE types_test.s', 'TABLE types_test.t');
SELECT migrate.drop('settings');
DROP TABLE s, t;
DROP OWNED BY types_writer; DROP ROLE types_writer;

-- constants of a key that were given in such a session mean the same to all others
CREATE TABLE s (id int PRIMARY KEY, v text);
CREATE TABLE t (day date, f float8, i interval, at timestamptz, id int, v text, PRIMARY KEY (day, f, i, at, id));
INSERT INTO s SELECT g, 'v' FROM generate_series(1, 10) g;
SET DateStyle = 'SQL, DMY'; SET TimeZone = 'Asia/Kolkata'; SET IntervalStyle = sql_standard; SET extra_float_digits = -10;
SELECT migrate.define('constants', 's', 't', $$ date '04/03/2026' AS day, 0.1234567890123456::float8 AS f, interval '-1 day -2 hours' AS i, timestamptz '04/03/2026 10:00' AS at, id, v $$, on_target_delete => 'delete');
RESET DateStyle; RESET TimeZone; RESET IntervalStyle; RESET extra_float_digits;
SELECT p.key_const FROM migrate._mapping p JOIN migrate._flow f ON f.id = p.flow WHERE f.source = 's'::regclass AND p.direction = 'forward';
SELECT arm('constants', 'forward'), arm('constants', 'reverse');
DELETE FROM s WHERE id = 1; UPDATE s SET id = 20 WHERE id = 2; UPDATE s SET v = 'w' WHERE id = 3;
DELETE FROM t WHERE id = 4; UPDATE t SET v = 'back' WHERE id = 5;
SELECT same('TABLE types_test.s', 'SELECT id, v FROM types_test.t');
TRUNCATE s;
SELECT count(*) FROM t;
SELECT migrate.drop('constants');
DROP TABLE s, t;

-- keys that are equal and look otherwise: by either path the target's looks as the source's does, and repair sees to it as well
CREATE FUNCTION run(statement text) RETURNS void LANGUAGE plpgsql AS 'BEGIN EXECUTE statement; END';
CREATE FUNCTION changes_nothing() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TABLE s (n numeric, j jsonb, r numrange, i interval, f float8, c bpchar, v text, PRIMARY KEY (n, j, r, i, f, c));
CREATE TABLE t (n numeric, j jsonb, r numrange, i interval, f float8, c bpchar, v text, PRIMARY KEY (n, j, r, i, f, c));
CREATE TABLE d (LIKE t INCLUDING ALL);
CREATE TABLE link (n numeric, j jsonb, r numrange, i interval, f float8, c bpchar, PRIMARY KEY (n, j, r, i, f, c)) PARTITION BY HASH (n);
CREATE TABLE link_0 PARTITION OF link FOR VALUES WITH (MODULUS 1, REMAINDER 0);
CREATE TRIGGER by_sql BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION changes_nothing();
INSERT INTO s SELECT g, jsonb_build_object('k', g), numrange(g, g + 1), g * interval '1 day', 0, 'c', 'v' FROM generate_series(1, 10) g;
SELECT migrate.define('forms', 's', 't', on_target_delete => 'delete'), migrate.define('forms_d', 's', 'd', on_target_delete => 'delete'), migrate.define('forms_l', 's', 'link', on_target_delete => 'keep');
SELECT arm('forms', 'forward'), arm('forms_d', 'forward'), arm('forms_l', 'forward');
SELECT f.target, (p.path IS NULL) = (f.target = 'd'::regclass) OR p.path = 'this build has no other way' AS as_meant FROM migrate._flow f, migrate._path(f.id, 'forward') AS p(path) ORDER BY f.id;
UPDATE s SET n = 1.00 WHERE n = 1; UPDATE s SET j = '{"k": 2.0}', v = 'w' WHERE n = 2; UPDATE s SET r = numrange(3.0, 4.00) WHERE n = 3; UPDATE s SET i = '96 hours' WHERE n = 4; UPDATE s SET f = '-0' WHERE n = 5; UPDATE s SET c = 'c  ' WHERE n = 6;
BEGIN; DELETE FROM s WHERE n = 7; INSERT INTO s VALUES (7.0, '{"k": 7}', numrange(7, 8), '7 days', 0, 'c', 'again'); COMMIT;
SELECT same('SELECT s::text FROM types_test.s', 'SELECT t::text FROM types_test.t'), same('SELECT s::text FROM types_test.s', 'SELECT d::text FROM types_test.d'), same('SELECT (n, j, r, i, f, c)::text FROM types_test.s', 'SELECT link::text FROM types_test.link');
UPDATE t SET n = n + 0.000 WHERE n < 4; UPDATE link SET f = '-0' WHERE n = 8;
SELECT v.flow, v.mismatches FROM unnest('{forms,forms_l}'::text[]) m, migrate.validate(m) v;
SELECT count(run(r)) FROM unnest('{forms,forms_l}'::text[]) m, migrate.repair(m) r;
SELECT v.flow, v.mismatches FROM unnest('{forms,forms_d,forms_l}'::text[]) m, migrate.validate(m) v;
SELECT migrate.drop('forms'), migrate.drop('forms_d'), migrate.drop('forms_l');
DROP TABLE s, t, d, link;

-- a batch has so many rows, or so many bytes; the rest comes with the next
CREATE TABLE s (id int PRIMARY KEY, v text); CREATE TABLE t (id int PRIMARY KEY, v text);
ALTER TABLE s ALTER v SET STORAGE EXTERNAL;
INSERT INTO s SELECT g, CASE WHEN g > 10 THEN repeat(md5(g::text), 3200) END FROM generate_series(1, 40) g;
SELECT migrate.define('bytes', 's', 't');
SELECT r.rows_done, r.reached FROM migrate._flow f, migrate._apply_range(f.id, NULL, NULL, 1000, 1000000) r;
SELECT r.rows_done, r.reached FROM migrate._flow f, migrate._apply_range(f.id, '{20}', NULL, 1000, 1000) r;
SELECT r.rows_done, r.reached FROM migrate._flow f, migrate._apply_range(f.id, '{21}', NULL, 5, 1000000) r;
SELECT r.rows_done, r.reached FROM migrate._flow f, migrate._apply_range(f.id, '{26}', '{30}', 1000, 100000000) r;
SELECT r.rows_done, r.reached FROM migrate._flow f, migrate._apply_range(f.id, '{30}', NULL, 1000) r;
SELECT same('TABLE types_test.s', 'TABLE types_test.t'), migrate._batch_bytes('s'), migrate._batch_bytes('migrate._range') AS without_long_values;
SELECT migrate.drop('bytes');
DROP SCHEMA types_test CASCADE;
