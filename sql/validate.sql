-- Validation: whatever differs is found, by every method that looks for it, at the first run and at each later one.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE SCHEMA check_it;
SET search_path = check_it, public;

-- The verdict, with small ranges, as the worker's steps and the verb give it. Internals want names that hide nothing.
CREATE FUNCTION validate(name text, method text DEFAULT 'ranges', rows int DEFAULT 100)
RETURNS TABLE (method text, source_rows bigint, target_rows bigint, ranges bigint, mismatches bigint, verdict text)
LANGUAGE sql SET search_path = pg_catalog, pg_temp SET jit = off AS $$
    SELECT v.method, v.source_rows, v.target_rows, v.ranges, v.mismatches, v.verdict FROM migrate._validate(current_user::regrole, $1, $2, $3) v $$;
CREATE FUNCTION step(m_id int, rows int DEFAULT 100) RETURNS text LANGUAGE sql SET search_path = pg_catalog, pg_temp SET jit = off AS $$ SELECT migrate._validate_step($1, $2) $$;
CREATE FUNCTION found(name text) RETURNS TABLE (key text, kind text, columns text[])
LANGUAGE sql AS $$ SELECT key, kind, columns FROM migrate.mismatches($1) ORDER BY length(key), key COLLATE "C" $$;
CREATE VIEW ledger AS SELECT r.* FROM migrate._validation_range r JOIN migrate._flow f ON f.id = r.flow JOIN migrate._migration m ON m.id = f.migration WHERE m.name = 'users' ORDER BY run, ordinal;
CREATE FUNCTION plant(sql text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE sql; END $$;

CREATE TABLE users (id int PRIMARY KEY, name text NOT NULL, bio text, score numeric, ratio float8);
CREATE TABLE profiles (user_id bigint PRIMARY KEY, display_name varchar(40) NOT NULL, bio text NOT NULL, score numeric, ratio float8);
SELECT migrate.define('users', 'users', 'profiles', 'id AS user_id, name AS display_name, coalesce(bio, '''') AS bio, score, ratio', on_target_delete => 'delete');

-- nothing on both sides: one open range, not none
SELECT * FROM validate('users');
SELECT low, high, source_rows, target_rows FROM ledger;

INSERT INTO users SELECT i, 'name ' || i, nullif('bio ' || i, 'bio 8'), i / 10.0, 0 FROM generate_series(2, 2000, 2) i;
INSERT INTO profiles SELECT id, name, coalesce(bio, ''), score, ratio FROM users;
SELECT v.* FROM unnest('{counts,sample,checksum,ranges,rows}'::text[]) WITH ORDINALITY m(m, n), validate('users', m, CASE m WHEN 'sample' THEN 10000 ELSE 100 END) v ORDER BY n;
SELECT flow, method, source_rows, target_rows, ranges, mismatches, source_checksum = target_checksum AS same, seconds >= 0 AS seconds, snapshot ~ '^\d+:\d+:' AS snapshot, verdict
FROM migrate.validate('users');
-- ranges cover the key space, in key order, with no gap
SELECT * FROM validate('users', rows => 300);
SELECT low, high, source_rows, target_rows, mismatches FROM ledger;
-- in one snapshot the rows checked are counted against all rows
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT * FROM validate('users');
COMMIT;
-- the worker's steps, a range each; whoever asks again after the end gets a new run
SELECT step(id, 300) FROM migrate._migration, generate_series(1, 5) WHERE name = 'users';
-- a gap in the ledger is noticed, and so is an end too early
UPDATE migrate._migration SET phase_since = clock_timestamp() WHERE name = 'users';
SELECT step(id, 400) FROM migrate._migration, generate_series(1, 2) WHERE name = 'users';
UPDATE migrate._validation_range SET low = '{900}' WHERE low = '{800}' AND flow IN (SELECT flow FROM ledger);
SELECT step(id) FROM migrate._migration WHERE name = 'users';
UPDATE migrate._migration SET phase_since = clock_timestamp() WHERE name = 'users';
SELECT step(id, 400) FROM migrate._migration WHERE name = 'users';
DELETE FROM migrate._validation_range WHERE low IS NULL AND flow IN (SELECT flow FROM ledger);
INSERT INTO migrate._validation_range SELECT run, flow, 1, '{800}', '{1600}', 0, 0, 0 FROM migrate._validation WHERE verdict IS NULL AND method = 'ranges' ORDER BY run DESC LIMIT 1;
SELECT step(id) FROM migrate._migration WHERE name = 'users';
UPDATE migrate._migration SET phase_since = clock_timestamp() WHERE name = 'users';

-- a row whose dual write met somebody's lock is no mismatch while it waits for a worker: the step is taken again; one that the target
-- has refused is
UPDATE profiles SET bio = 'not yet' WHERE user_id = 500;
INSERT INTO migrate._failure (flow, direction, key, sqlstate, origin, retry_at) SELECT f.id, 'forward', '{500}', '40001', 'dual_write', 'infinity'
FROM migrate._flow f JOIN migrate._migration m ON m.id = f.migration WHERE m.name = 'users';
SELECT split_part(step(id, 400), ':', 1) AS step FROM migrate._migration, generate_series(1, 4) WHERE name = 'users';
SELECT low, high, mismatches FROM ledger WHERE run = (SELECT max(run) FROM ledger);
SELECT count(*) FROM migrate._mismatch;
UPDATE migrate._failure SET sqlstate = '23514';
SELECT split_part(step(id, 400), ':', 1) AS step FROM migrate._migration, generate_series(1, 3) WHERE name = 'users';
UPDATE profiles SET bio = 'bio 500' WHERE user_id = 500;
DELETE FROM migrate._failure;
UPDATE migrate._migration SET phase_since = clock_timestamp() WHERE name = 'users';

-- planted damage, each found at the first run, at the second, and by the worker's steps; and gone when it is mended
CREATE TABLE damage (n int PRIMARY KEY, what text, plant text, mend text);
INSERT INTO damage VALUES
    (1, 'one byte', $$UPDATE profiles SET bio = overlay(bio PLACING 'x' FROM 3) WHERE user_id = 1002$$, $$UPDATE profiles SET bio = 'bio 1002' WHERE user_id = 1002$$),
    (2, 'a blank at the end', $$UPDATE profiles SET bio = bio || ' ' WHERE user_id = 2$$, $$UPDATE profiles SET bio = 'bio 2' WHERE user_id = 2$$),
    (3, 'NULL', $$UPDATE profiles SET score = NULL WHERE user_id = 2000$$, $$UPDATE profiles SET score = 200.0000000000000000 WHERE user_id = 2000$$),
    (4, '1.0 and 1.00', $$UPDATE profiles SET score = 1.0 WHERE user_id = 10$$, $$UPDATE profiles SET score = 10 / 10.0 WHERE user_id = 10$$),
    (5, '-0 and 0', $$UPDATE profiles SET ratio = '-0' WHERE user_id = 100$$, $$UPDATE profiles SET ratio = 0 WHERE user_id = 100$$),
    (6, 'first row missing', $$DELETE FROM profiles WHERE user_id = 2$$, $$INSERT INTO profiles VALUES (2, 'name 2', 'bio 2', 2 / 10.0, 0)$$),
    (7, 'last row missing', $$DELETE FROM profiles WHERE user_id = 2000$$, $$INSERT INTO profiles VALUES (2000, 'name 2000', 'bio 2000', 2000 / 10.0, 0)$$),
    (8, 'row at a border missing', $$DELETE FROM profiles WHERE user_id = 200$$, $$INSERT INTO profiles VALUES (200, 'name 200', 'bio 200', 200 / 10.0, 0)$$),
    (9, 'extra before the first', $$INSERT INTO profiles VALUES (-9000000000, 'x', '', NULL, NULL)$$, $$DELETE FROM profiles WHERE user_id = -9000000000$$),
    (10, 'extra after the last', $$INSERT INTO profiles VALUES (9000000000, 'x', '', NULL, NULL)$$, $$DELETE FROM profiles WHERE user_id = 9000000000$$),
    (11, 'extra after a border', $$INSERT INTO profiles VALUES (201, 'x', '', NULL, NULL)$$, $$DELETE FROM profiles WHERE user_id = 201$$),
    (12, 'more extras than a range holds', $$INSERT INTO profiles SELECT i, 'x', '' FROM generate_series(3001, 3250) i$$, $$DELETE FROM profiles WHERE user_id > 3000$$),
    (13, 'rows swapped', $$UPDATE profiles p SET display_name = q.display_name FROM profiles q WHERE p.user_id IN (20, 22) AND q.user_id = 42 - p.user_id$$,
         $$UPDATE profiles SET display_name = 'name ' || user_id WHERE user_id IN (20, 22)$$),
    (14, 'keys swapped', $$UPDATE profiles p SET user_id = CASE user_id WHEN 500 THEN 501 ELSE 503 END WHERE user_id IN (500, 502)$$, $$UPDATE profiles SET user_id = user_id - 1 WHERE user_id IN (501, 503)$$),
    (15, 'everything missing', 'CREATE TABLE aside AS SELECT * FROM profiles; DELETE FROM profiles', 'INSERT INTO profiles SELECT * FROM aside; DROP TABLE aside'),
    (16, 'nothing expected', 'CREATE TABLE aside AS SELECT * FROM users; DELETE FROM users', 'INSERT INTO users SELECT * FROM aside; DROP TABLE aside');
CREATE FUNCTION try(d damage) RETURNS TABLE (what text, checksum text, sums text, ranges bigint, again bigint, steps text, rows bigint, sample bigint, listed bigint, mended text)
LANGUAGE plpgsql AS $$
DECLARE m int := (SELECT id FROM migrate._migration WHERE name = 'users');
BEGIN
    what := d.what;
    EXECUTE d.plant;
    checksum := (SELECT v.verdict FROM validate('users', 'checksum') v);
    sums := (SELECT v.verdict FROM validate('users', 'sums') v);
    ranges := (SELECT v.mismatches FROM validate('users') v WHERE v.verdict = 'mismatch');
    again := (SELECT v.mismatches FROM validate('users') v WHERE v.verdict = 'mismatch');
    UPDATE migrate._migration SET phase_since = clock_timestamp() WHERE id = m;
    LOOP
        steps := step(m);
        EXIT WHEN steps <> 'more';
    END LOOP;
    steps := split_part(steps, ':', 1);
    rows := (SELECT v.mismatches FROM validate('users', 'rows') v WHERE v.verdict = 'mismatch');
    sample := (SELECT v.mismatches FROM validate('users', 'sample', 10000) v WHERE v.verdict = 'mismatch');
    listed := (SELECT count(*) FROM found('users'));
    EXECUTE d.mend;
    mended := (SELECT v.verdict FROM validate('users') v);
    RETURN NEXT;
END $$;
SELECT t.* FROM damage d, try(d) t ORDER BY d.n;
-- One scan of each side finds a range's end and its digests; where they are not equal, or there is more than a range should hold, it leaves it.
CREATE FUNCTION ahead(low int, rows int) RETURNS text LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET jit = off AS $$
DECLARE
    m migrate._migration := (SELECT x FROM migrate._migration x WHERE x.name = 'users');
    c migrate._comparison;
    a record;
BEGIN
    SELECT * INTO c FROM migrate._comparisons(m);
    SELECT * INTO a FROM migrate._validate_ahead(c, migrate._validation_begin(m, 'ranges', rows, false), ARRAY[low::text], rows);
    RETURN format('%s %s', a.done, a.high);
END $$;
BEGIN;
SELECT ahead(0, 100) AS first, ahead(200, 1) AS one, ahead(1000, 500) AS to_the_end, ahead(1002, 500) AS beyond, ahead(2000, 10) AS nothing;
SELECT plant(plant) FROM damage WHERE n IN (1, 11, 12) ORDER BY n;
SELECT ahead(1000, 100) AS differs, ahead(190, 5) AS border, ahead(200, 1) AS extra, ahead(201, 100) AS equal, ahead(1990, 100) AS more;
ROLLBACK;
SELECT plant(plant) FROM damage WHERE n IN (1, 3, 8, 10, 13) ORDER BY n;
SELECT * FROM validate('users');
SELECT * FROM found('users');
SELECT plant(mend) FROM damage WHERE n IN (1, 3, 8, 13) ORDER BY n;
SELECT * FROM validate('users');
SELECT * FROM found('users');
DELETE FROM profiles WHERE user_id > 3000;

-- semantic: what = calls equal is no mismatch, what it does not still is
SELECT migrate.set('users', 'equality', 'semantic');
SELECT plant(plant) FROM damage WHERE n IN (4, 5) ORDER BY n;
SELECT v.* FROM unnest('{sample,ranges,rows}'::text[]) WITH ORDINALITY m(m, n), validate('users', m, 2000) v ORDER BY n;
SELECT * FROM validate('users', 'checksum');
SELECT * FROM validate('users', 'sums');
SELECT plant(plant) FROM damage WHERE n = 1;
SELECT * FROM validate('users');
SELECT migrate.set('users', 'equality', 'image');
SELECT * FROM validate('users');
SELECT * FROM found('users');
SELECT plant(mend) FROM damage WHERE n IN (1, 4, 5) ORDER BY n;

-- every type: a column for each; the byte, then NULL, is found in this column and no other
CREATE TYPE mood AS ENUM ('sad', 'happy');
CREATE TYPE pair AS (a int, b text);
CREATE DOMAIN short AS varchar(8) CHECK (VALUE <> 'never');
CREATE TABLE types (n int PRIMARY KEY, type text, a text, b text);
INSERT INTO types SELECT row_number() OVER (), * FROM (VALUES
    ('boolean', 't', 'f'), ('"char"', 'a', 'b'), ('smallint', '1', '257'), ('integer', '1', '16777217'), ('bigint', '1', '72057594037927937'), ('oid', '1', '2'),
    ('real', '0', '-0'), ('double precision', '0', '-0'), ('numeric', '1.0', '1.00'), ('numeric(10,2)', '1', '1.01'), ('money', '1', '1.01'), ('text', '', ' '),
    ('varchar(5)', 'a', 'a '), ('char(5)', 'a', 'b'), ('name', 'a', 'b'), ('bytea', '\x00', '\x0000'), ('date', '2020-01-01', '2020-01-02'), ('time', '24:00', '00:00'),
    ('timetz', '12:00+00', '13:00+01'), ('timestamp', '2020-01-01', '2020-01-01 00:00:00.000001'), ('timestamptz', '2020-01-01 00:00+00', 'infinity'), ('interval', '24 hours', '1 day'),
    ('uuid', '00000000-0000-0000-0000-000000000000', '00000000-0000-0000-0000-000000000001'), ('json', '{"a":1}', '{"a": 1}'), ('jsonb', '{"a":1.0}', '{"a":1.00}'), ('xml', '<a/>', '<a></a>'),
    ('inet', '10.0.0.1', '10.0.0.1/31'), ('cidr', '10.0.0.0/8', '10.0.0.0/9'), ('macaddr', '00:00:00:00:00:00', '00:00:00:00:00:01'), ('bit(3)', '101', '100'), ('bit varying', '1', '10'),
    ('point', '(0,0)', '(-0,0)'), ('box', '(1,1),(0,0)', '(1,2),(0,0)'), ('path', '((0,0),(1,1))', '[(0,0),(1,1)]'), ('polygon', '((0,0),(1,1))', '((0,0),(1,2))'), ('circle', '<(0,0),1>', '<(0,0),2>'),
    ('tsvector', 'a:1', 'a:2'), ('tsquery', 'a & b', 'a | b'), ('pg_lsn', '0/0', '0/1'), ('int4range', '[1,5)', '[1,6)'), ('numrange', '[1.0,2)', '[1.00,2)'),
    ('int[]', '{1,NULL}', '{1,0}'), ('text[]', '{a,bc}', '{ab,c}'), ('numeric[]', '{1.0}', '{1.00}'), ('mood', 'sad', 'happy'), ('pair', '(1,)', '(1,"")'), ('short', 'a', 'b'), ('jsonpath', '$.a', '$.b')) v;
SELECT plant('CREATE TABLE s (id uuid PRIMARY KEY, ' || string_agg(format('c%s %s', n, type), ', ') || ')') FROM types;
CREATE TABLE t (LIKE s INCLUDING ALL);
SELECT plant('INSERT INTO s SELECT md5(i::text)::uuid, ' || string_agg(quote_literal(a), ', ' ORDER BY n) || ' FROM generate_series(1, 30) i') FROM types;
INSERT INTO t SELECT * FROM s;
SELECT migrate.define('types', 's', 't', on_target_delete => 'delete');
SELECT * FROM validate('types', rows => 7);
CREATE FUNCTION blind(n int, value text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE was text; first record; second record;
BEGIN
    PERFORM plant(format('UPDATE t SET c%s = %L WHERE id = (SELECT id FROM t ORDER BY id OFFSET 17 LIMIT 1)', n, value));
    SELECT v.verdict, (SELECT array_agg(x) FROM found('types') x) AS found INTO first FROM validate('types', rows => 7) v;
    SELECT v.verdict, (SELECT array_agg(x) FROM found('types') x) AS found INTO second FROM validate('types', 'rows', rows => 7) v;
    was := CASE WHEN (SELECT v.verdict FROM validate('types', 'checksum') v) <> 'mismatch' THEN 'checksum' WHEN first.verdict <> 'mismatch' OR second.verdict <> 'mismatch' THEN 'verdict'
                WHEN (SELECT count(*) FROM found('types')) <> 1 OR (SELECT kind FROM found('types')) <> 'different' OR (SELECT columns FROM found('types')) <> ARRAY['c' || n] THEN 'finding' END;
    PERFORM plant(format('UPDATE t SET c%1$s = s.c%1$s FROM s WHERE s.id = t.id', n));
    RETURN was;
END $$;
SELECT count(*) AS types, array_agg(type) FILTER (WHERE blind(n, b) IS NOT NULL) AS blind_to_a_byte, array_agg(type) FILTER (WHERE blind(n, NULL) IS NOT NULL) AS blind_to_null FROM types;
SELECT * FROM validate('types', rows => 7);

-- keys of every kind: composite, text, timestamps, widened; with rows that move over the borders
CREATE TABLE keyed_s (a text COLLATE "C", b timestamptz, "c ""quoted" smallint, v text, PRIMARY KEY (a, b, "c ""quoted"));
CREATE TABLE keyed_t (a text COLLATE "C", b timestamptz, "c ""quoted" bigint, v text, PRIMARY KEY (a, b, "c ""quoted"));
INSERT INTO keyed_s SELECT (ARRAY['', 'a', 'a,b', '{"x"}', 'NULL', 'é'])[i % 6 + 1], '2020-01-01 00:00+00'::timestamptz + (i % 5) * interval '1 microsecond', i, i FROM generate_series(1, 400) i;
INSERT INTO keyed_t SELECT * FROM keyed_s;
SELECT migrate.define('keyed', 'keyed_s', 'keyed_t', on_target_delete => 'delete');
SELECT * FROM validate('keyed', rows => 30);
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT * FROM validate('keyed', rows => 1);
COMMIT;
UPDATE keyed_t SET b = b + interval '1 second' WHERE v = '77';
DELETE FROM keyed_t WHERE v = '4';
SELECT * FROM validate('keyed', rows => 1);
SELECT * FROM validate('keyed', 'sample', 1000);
SET TimeZone = 'UTC';
SELECT * FROM found('keyed');
CREATE TABLE number_s (id int PRIMARY KEY, v int);
CREATE TABLE number_t (id numeric(12, 2) PRIMARY KEY, v int);
INSERT INTO number_s SELECT i, i FROM generate_series(1, 500) i;
INSERT INTO number_t SELECT * FROM number_s;
INSERT INTO number_t VALUES (10.5, 1), (1e9, 1);
SELECT migrate.define('number', 'number_s', 'number_t', on_target_delete => 'delete');
SELECT * FROM validate('number');
SELECT * FROM found('number');

-- a filter, a rounding, a domain: what the copy cannot carry is missing, and stops nobody
CREATE TABLE raw (id int PRIMARY KEY, v int, d text);
CREATE DOMAIN positive AS int CHECK (VALUE > 0);
CREATE TABLE cooked (id int PRIMARY KEY, q int NOT NULL, d positive);
INSERT INTO raw SELECT i, i % 250 + 1, NULL FROM generate_series(1, 500) i;
SELECT migrate.define('cooked', 'raw', 'cooked', 'id, 1000 / v AS q, v AS d', filter => 'v <> 3', on_target_delete => 'delete');
INSERT INTO cooked SELECT id, 1000 / v, v FROM raw WHERE v <> 3;
SELECT * FROM validate('cooked');
UPDATE raw SET v = 0 WHERE id IN (100, 101, 400);
UPDATE raw SET v = -5 WHERE id = 10;
DELETE FROM cooked WHERE id IN (101, 10);
SELECT * FROM validate('cooked');
SELECT * FROM found('cooked');
SELECT sum(source_rows), sum(target_rows), bool_and(gapless) FROM (
    SELECT *, low IS NOT DISTINCT FROM lag(high) OVER (ORDER BY ordinal) AS gapless FROM migrate._validation_range WHERE flow = (SELECT f.id FROM migrate._flow f WHERE target = 'cooked'::regclass)) r;

-- several flows into one target: with a constant each has its share; without, they are one
CREATE TABLE mail (id int PRIMARY KEY, addr text);
CREATE TABLE phone (id int PRIMARY KEY, num text);
CREATE TABLE contact (kind text, id int, value text, PRIMARY KEY (kind, id));
INSERT INTO mail SELECT i, 'm' || i FROM generate_series(1, 300) i;
INSERT INTO phone SELECT i, 'p' || i FROM generate_series(1, 200) i;
SELECT migrate.define('contacts', 'mail', 'contact', $$ 'mail' AS kind, id, addr AS value $$, on_target_delete => 'delete');
SELECT migrate.add_flow('contacts', 'phone', 'contact', $$ 'phone' AS kind, id, num AS value $$, on_target_delete => 'delete');
INSERT INTO contact SELECT 'mail', id, addr FROM mail UNION ALL SELECT 'phone', id, num FROM phone UNION ALL SELECT 'fax', 1, 'not ours';
SELECT * FROM validate('contacts');
UPDATE contact SET value = 'x' WHERE (kind, id) = ('phone', 7);
INSERT INTO contact VALUES ('mail', 1000, 'y');
SELECT * FROM validate('contacts');
SELECT flow, key, kind, columns FROM migrate.mismatches('contacts');
SELECT regexp_replace(r, 'flow_\d+', 'flow_N') FROM migrate.repair('contacts') r;
CREATE TABLE old_users (id int PRIMARY KEY, name text);
CREATE TABLE new_users (id int PRIMARY KEY, name text);
CREATE TABLE all_users (id int PRIMARY KEY, name text);
INSERT INTO old_users SELECT i, 'o' || i FROM generate_series(1, 600, 2) i;
INSERT INTO new_users SELECT i, 'n' || i FROM generate_series(2, 400, 2) i;
SELECT migrate.define('union', 'old_users', 'all_users', on_target_delete => 'delete');
SELECT migrate.add_flow('union', 'new_users', 'all_users', on_target_delete => 'delete');
INSERT INTO all_users TABLE old_users UNION ALL TABLE new_users;
SELECT * FROM validate('union');
DELETE FROM all_users WHERE id IN (100, 101);
INSERT INTO all_users VALUES (500, 'nobody');
SELECT v.* FROM unnest('{checksum,sample,ranges,rows}'::text[]) WITH ORDINALITY m(m, n), validate('union', m, 2000) v ORDER BY n;
SELECT flow, key, kind, columns FROM migrate.mismatches('union') ORDER BY key;

-- ranges are read by index on both sides, whatever the key's types
CREATE FUNCTION indexed(name text, low text[], high text[]) RETURNS TABLE (expected boolean, actual boolean) LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp SET enable_bitmapscan = off AS $$
DECLARE c migrate._comparison; line record; sql text;
BEGIN
    FOR c IN SELECT x.* FROM migrate._migration m, migrate._comparisons(m) x WHERE m.name = $1 LOOP
        FOR sql IN SELECT unnest(ARRAY[migrate._expected(c, '{above,upto}', true), migrate._actual(c, '{above,upto}', true)]) LOOP
            FOR i IN REVERSE c.width * 2 .. 1 LOOP
                sql := replace(sql, '$' || i, quote_nullable((low || high)[i]));
            END LOOP;
            actual := expected; expected := false;
            FOR line IN EXECUTE 'EXPLAIN ' || sql LOOP
                IF line."QUERY PLAN" ~ 'Seq Scan|Sort' THEN expected := false; EXIT; END IF;
                expected := expected OR line."QUERY PLAN" ~ 'Index Cond: .*>.*<=';
            END LOOP;
        END LOOP;
        line := NULL;
        RETURN QUERY SELECT actual, expected;
    END LOOP;
END $$;
INSERT INTO users SELECT i, 'n', NULL, 0, 0 FROM generate_series(10001, 40000) i;
INSERT INTO profiles SELECT i, 'n', '', 0, 0 FROM generate_series(10001, 40000) i;
INSERT INTO keyed_s SELECT 'z' || i, now(), 1, NULL FROM generate_series(1, 20000) i;
INSERT INTO keyed_t SELECT 'z' || i, now(), 1, NULL FROM generate_series(1, 20000) i;
INSERT INTO number_s SELECT i, i FROM generate_series(1000, 20000) i;
INSERT INTO number_t SELECT i, i FROM generate_series(1000, 20000) i;
INSERT INTO mail SELECT i, 'x' FROM generate_series(1000, 20000) i;
INSERT INTO phone SELECT i, 'x' FROM generate_series(1000, 20000) i;
INSERT INTO contact SELECT k, i, 'x' FROM generate_series(1001, 20000) i, unnest('{mail,phone}'::text[]) k;
ANALYZE;
SELECT * FROM indexed('users', '{20000}', '{20100}');
SELECT * FROM indexed('keyed', '{z5,2020-01-01,1}', '{z500,2020-01-01,1}');
SELECT * FROM indexed('number', '{5000}', '{5100}');
SELECT * FROM indexed('contacts', '{5000}', '{5100}');

-- repair: shown first; then done and looked at again
DELETE FROM profiles WHERE user_id > 2000;
DELETE FROM users WHERE id > 2000;
SELECT plant(plant) FROM damage WHERE n IN (1, 8, 11) ORDER BY n;
INSERT INTO profiles VALUES (9000000000, 'out of the source''s range', '');
SELECT regexp_replace(r, 'flow_\d+', 'flow_N') FROM migrate.repair('users') r ORDER BY r COLLATE "C";
SELECT * FROM validate('users');
SELECT regexp_replace(r, 'flow_\d+', 'flow_N') FROM migrate.repair('users') r ORDER BY r COLLATE "C";
SELECT count(*) AS "only shown" FROM migrate.repair('users', execute => NULL) r WHERE r ~ '^(INSERT|DELETE) ';
SELECT regexp_replace(r, 'flow_\d+', 'flow_N') FROM migrate.repair('users', execute => true) r;
UPDATE migrate._migration SET phase = 'ready' WHERE name = 'users';
SELECT regexp_replace(r, 'flow_\d+', 'flow_N') FROM migrate.repair('users', execute => true) r;
SELECT * FROM found('users');
DELETE FROM profiles WHERE user_id = 9000000000;
SELECT * FROM validate('users');
SELECT regexp_replace(r, 'flow_\d+', 'flow_N') FROM migrate.repair('users', execute => true) r;
-- what repair prints does what it says
SELECT plant(plant) FROM damage WHERE n IN (1, 8, 11) ORDER BY n;
SELECT * FROM validate('users');
SELECT count(plant(r)) FROM migrate.repair('users') r;
SELECT * FROM validate('users');
-- a repair that does not help leaves the mismatch on record
CREATE FUNCTION spoil() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.bio := 'spoilt'; RETURN NEW; END $$;
CREATE TRIGGER spoil BEFORE INSERT OR UPDATE ON profiles FOR EACH ROW EXECUTE FUNCTION spoil();
DELETE FROM profiles WHERE user_id = 4;
SELECT * FROM validate('users');
SELECT regexp_replace(r, 'flow_\d+', 'flow_N') FROM migrate.repair('users', execute => true) r;
SELECT * FROM found('users');
DROP TRIGGER spoil ON profiles;
UPDATE profiles SET bio = 'bio 4' WHERE user_id = 4;

-- after cutover the source follows: what cannot be mapped back exactly (a NULL that the target has a default for) is no mismatch
UPDATE migrate._migration SET phase = 'cut_over' WHERE name = 'users';
SELECT v.* FROM unnest('{counts,sample,ranges,rows}'::text[]) WITH ORDINALITY m(m, n), validate('users', m, 2000) v ORDER BY n;
SELECT * FROM validate('users', 'checksum');
UPDATE users SET bio = 'stale' WHERE id IN (4, 12);
UPDATE users SET score = NULL WHERE id = 8;
DELETE FROM users WHERE id = 10;
INSERT INTO users VALUES (3, 'left over');
SELECT * FROM validate('users');
SELECT * FROM validate('users', 'rows');
SELECT * FROM found('users');
SELECT regexp_replace(r, 'flow_\d+', 'flow_N') FROM migrate.repair('users') r ORDER BY r COLLATE "C";
SELECT count(plant(r)) FROM migrate.repair('users') r;
SELECT * FROM validate('users');
UPDATE migrate._migration SET phase = 'planned' WHERE name = 'users';
SELECT * FROM validate('users');

-- and so it is where the two keys are not the same columns in the same order: turned, another unique column, with a constant, wider
CREATE TABLE turned_s (a int, b int, v text, PRIMARY KEY (a, b));
CREATE TABLE turned_t (a int, b int, v text NOT NULL, PRIMARY KEY (b, a));
CREATE TABLE other_s (id int PRIMARY KEY, email text NOT NULL UNIQUE, v text);
CREATE TABLE other_t (id int NOT NULL UNIQUE, email text PRIMARY KEY, v text NOT NULL);
CREATE TABLE fixed_s (id int PRIMARY KEY, v text);
CREATE TABLE fixed_t (id int, kind text, v text NOT NULL, PRIMARY KEY (kind, id));
CREATE TABLE wider_s (id int PRIMARY KEY, a int NOT NULL, b int NOT NULL, v text, UNIQUE (a, b));
CREATE TABLE wider_t (id int NOT NULL UNIQUE, a int, b int, v text NOT NULL, PRIMARY KEY (b, a));
CREATE TABLE narrow_s (id int NOT NULL UNIQUE, a int, b int, v text, PRIMARY KEY (b, a));
CREATE TABLE narrow_t (id int PRIMARY KEY, a int NOT NULL, b int NOT NULL, v text NOT NULL, UNIQUE (a, b));
-- (a column that cannot be written is not fed)
CREATE TABLE made_s (id int PRIMARY KEY, twice int NOT NULL GENERATED ALWAYS AS (2 * id) STORED UNIQUE, v text);
CREATE TABLE made_t (id int NOT NULL UNIQUE, twice int PRIMARY KEY, v text NOT NULL);
INSERT INTO turned_s SELECT i, i % 7, nullif('v' || i, 'v8') FROM generate_series(1, 300) i;
INSERT INTO other_s SELECT i, 'e' || 1000 - i, nullif('v' || i, 'v8') FROM generate_series(1, 300) i;
INSERT INTO fixed_s SELECT i, nullif('v' || i, 'v8') FROM generate_series(1, 300) i;
INSERT INTO wider_s SELECT i, i, i % 7, nullif('v' || i, 'v8') FROM generate_series(1, 300) i;
INSERT INTO narrow_s SELECT * FROM wider_s;
INSERT INTO made_s (id, v) SELECT i, nullif('v' || i, 'v8') FROM generate_series(1, 300) i;
CREATE TABLE moved (name text PRIMARY KEY, columns text, damage text);
INSERT INTO moved VALUES ('turned', 'a, b', 'a = 77'), ('other', 'id, email', 'id = 77'), ('fixed', 'id, ''user'' AS kind', 'id = 77'), ('wider', 'id, a, b', 'id = 77'),
    ('narrow', 'id, a, b', 'id = 77'), ('made', 'id, twice', 'id = 77');
SELECT name, migrate.define(name, name || '_s', name || '_t', columns || ', coalesce(v, '''') AS v', on_target_delete => 'delete') FROM moved;
SELECT count(plant(format('INSERT INTO %1$s_t (%2$s, v) SELECT %3$s, coalesce(v, '''') FROM %1$s_s', name, replace(columns, '''user'' AS ', ''), replace(columns, ' AS kind', '')))) FROM moved;
UPDATE migrate._migration m SET phase = 'cut_over' FROM moved WHERE m.name = moved.name;
CREATE VIEW every_moved AS SELECT name, v.method, v.source_rows, v.mismatches, v.verdict FROM moved, unnest('{sample,ranges,rows}'::text[]) method, validate(name, method, CASE method WHEN 'sample' THEN 1000 ELSE 100 END) v;
SELECT * FROM every_moved ORDER BY name, method;
SELECT count(plant(format('UPDATE %s_s SET v = ''stale'' WHERE %s', name, damage))) FROM moved;
SELECT * FROM every_moved ORDER BY name, method;
SELECT name, f.* FROM moved, found(name) f ORDER BY name, length(key), key;
-- repair mends them, and looks at them again
SELECT name, r FROM moved, migrate.repair(name, execute => true) r ORDER BY name, r COLLATE "C";
SELECT * FROM every_moved WHERE method = 'ranges' ORDER BY name;
-- values of the other key that have changed places, each of which is right for another row
UPDATE other_s SET email = 'x' || id WHERE id IN (5, 6);
UPDATE other_s SET email = 'e' || 989 + id WHERE id IN (5, 6);
SELECT * FROM every_moved WHERE name = 'other' ORDER BY method;
SELECT * FROM found('other');
UPDATE migrate._migration m SET phase = 'planned' FROM moved WHERE m.name = moved.name;

-- the events tell it
SELECT kind, why FROM migrate._event WHERE name = 'users' AND kind IN ('repaired', 'validated') ORDER BY id DESC LIMIT 2;

-- errors
SELECT * FROM migrate.validate('users', 'guess');
SELECT * FROM migrate.validate('users', NULL);
SELECT * FROM migrate.validate('nobody');
SELECT * FROM migrate.mismatches('nobody');
SELECT * FROM migrate.repair('nobody');
UPDATE migrate._migration SET phase = 'cancelled' WHERE name = 'number';
SELECT * FROM migrate.validate('number');

-- flows into one target that map different columns of it: what a flow does not map is not compared for its rows
CREATE TABLE "Head" (id int PRIMARY KEY, v text);
CREATE TABLE tail (id int PRIMARY KEY, "W" text);
CREATE TABLE whole (id int PRIMARY KEY, v text, "W" text);
INSERT INTO "Head" SELECT i, 'head' FROM generate_series(1, 10) i;
INSERT INTO tail SELECT i, 'tail' FROM generate_series(11, 20) i;
INSERT INTO whole SELECT id, v, 'its own' FROM "Head" UNION ALL SELECT id, 'its own', "W" FROM tail;
SELECT migrate.define('parts', '"Head"', 'whole', 'id, v', on_target_delete => 'delete');
SELECT migrate.add_flow('parts', 'tail', 'whole', 'id, "W"', on_target_delete => 'delete');
SELECT v.* FROM unnest('{counts,sample,ranges,rows}'::text[]) WITH ORDINALITY m(m, n), validate('parts', m) v ORDER BY n;
UPDATE whole SET v = 'other', "W" = 'other' WHERE id IN (3, 15);
SELECT verdict FROM validate('parts');
SELECT * FROM found('parts');

-- an owner without other rights may; another role learns nothing
CREATE ROLE check_owner;
CREATE ROLE check_other;
SELECT migrate.allow('check_owner') IS NOT NULL, migrate.allow('check_other') IS NOT NULL;
GRANT USAGE, CREATE ON SCHEMA check_it TO check_owner, check_other;
SET ROLE check_owner;
CREATE TABLE own_s (id int PRIMARY KEY, v text, j jsonb);
CREATE TABLE own_t (id int PRIMARY KEY, v text, j jsonb);
INSERT INTO own_s VALUES (1, 'a', '{}'), (2, 'b', '[]');
INSERT INTO own_t VALUES (1, 'a', '{}'), (3, 'b', '[]');
SELECT migrate.define('own', 'own_s', 'own_t', on_target_delete => 'delete');
SELECT method, verdict, mismatches FROM unnest('{counts,sample,checksum,ranges,rows}'::text[]) WITH ORDINALITY m(m, n), migrate.validate('own', m) v ORDER BY n;
SELECT * FROM found('own');
RESET ROLE;
SET ROLE check_other;
SELECT * FROM migrate.validate('own');
SELECT * FROM migrate.mismatches('own');
RESET ROLE;

UPDATE migrate._migration SET phase = 'planned' WHERE name IN ('users', 'number');
SELECT name, migrate.drop(name) FROM unnest('{users,types,keyed,number,cooked,contacts,union,parts,own,turned,other,fixed,wider,narrow,made}'::text[]) name;
DROP SCHEMA check_it CASCADE;
SELECT migrate.allow('check_owner', 'nothing') IS NOT NULL, migrate.allow('check_other', 'nothing') IS NOT NULL;
DROP ROLE check_owner, check_other;
