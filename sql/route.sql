-- route: views for reading alone, whose reads go to the target by percent of the keys or by predicate; what is refused and how.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
SET jit = off;
CREATE SCHEMA route_test;
SET search_path = route_test;
CREATE ROLE regress_route_owner;
CREATE ROLE regress_route_reader;
GRANT USAGE, CREATE ON SCHEMA route_test TO regress_route_owner;
GRANT USAGE ON SCHEMA route_test TO regress_route_reader;
CREATE FUNCTION reads(view regclass) RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(DISTINCT d.refobjid::regclass::text, ', ') FROM pg_depend d JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
    WHERE r.ev_class = view AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> view
$$;
CREATE FUNCTION granted(relation regclass) RETURNS SETOF text LANGUAGE sql AS $$
    SELECT a.privilege_type || ' to ' || pg_get_userbyid(a.grantee) FROM pg_class c, aclexplode(c.relacl) a WHERE c.oid = relation AND a.grantee <> c.relowner ORDER BY 1
$$;
CREATE FUNCTION reach(migration text, goal text) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1 .. 600 LOOP
        EXIT WHEN EXISTS (SELECT FROM migrate.migration m WHERE m.name = reach.migration AND m.phase = goal);
        PERFORM pg_sleep(0.1);
    END LOOP;
    RETURN (SELECT m.phase FROM migrate.migration m WHERE m.name = reach.migration);
END $$;
CREATE FUNCTION untimed(report text) RETURNS text LANGUAGE sql AS $$ SELECT regexp_replace(report, '[0-9.]+ ms', 'T ms', 'g') $$;
CREATE TABLE users (id bigint PRIMARY KEY, tenant int NOT NULL, name text NOT NULL, bio text);
CREATE TABLE profiles (user_id bigint PRIMARY KEY, tenant_id int NOT NULL, display_name text NOT NULL, bio text NOT NULL);
CREATE INDEX ON users (tenant);
ALTER TABLE users OWNER TO regress_route_owner;
ALTER TABLE profiles OWNER TO regress_route_owner;
GRANT SELECT, INSERT, UPDATE ON users TO regress_route_reader;
INSERT INTO users SELECT g, g % 7, 'user ' || g, nullif('bio ' || g, 'bio 3') FROM generate_series(1, 2000) g;
SELECT migrate.allow('regress_route_owner');
SET ROLE regress_route_owner;
SET client_min_messages = notice;
SELECT migrate.define('m', 'users', 'profiles', $$ id AS user_id, tenant AS tenant_id, name AS display_name, coalesce(bio, '') AS bio $$, on_target_delete => 'delete');
SELECT migrate.add_view('m', 'profile');

-- what cannot be
SELECT migrate.add_view('m', 'users', shape => 'source', use => 'read');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.add_view('m', 'profile_read', use => 'write');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.add_view('m', 'profile', use => 'read');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('nobody', percent => 10);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', percent => 10);
\echo :LAST_ERROR_SQLSTATE

-- a view for reading: the source's rights to read, and no way to write
SELECT migrate.add_view('m', 'profile_read', use => 'read');
SELECT migrate.add_view('m', 'profile_read', use => 'read');
SELECT migrate.add_view('m', 'profile_read');
\echo :LAST_ERROR_SQLSTATE
SELECT granted('profile_read'), reads('profile_read');
UPDATE profile_read SET bio = 'lost' WHERE user_id = 1;
\echo :LAST_ERROR_SQLSTATE
INSERT INTO profile_read SELECT * FROM profile_read;
\echo :LAST_ERROR_SQLSTATE
SELECT migration, view, percent, predicate, by FROM migrate.routes;

SELECT line FROM unnest(string_to_array(migrate.plan('m'), E'\n')) line WHERE line ~ '^\| .route.,';

-- arguments
SELECT migrate.route('m');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', percent => 10, predicate => 'tenant_id = 1');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', percent => 101);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', percent => -1);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', percent => 0.001);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', percent => 'NaN');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', percent => 10, skip => '{phase}');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', percent => 10);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', percent => 0);
SET client_min_messages = warning;
SELECT migrate.start('m');
SELECT reach('m', 'ready');
SET client_min_messages = notice;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT migrate.route('m', percent => 10);
\echo :LAST_ERROR_SQLSTATE
ROLLBACK;

-- predicates
CREATE FUNCTION mine(int) RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT $1 = 1';
CREATE DOMAIN small AS int CHECK (VALUE < 10);
\set VERBOSITY default
SELECT migrate.route('m', predicate => 'nothing = 1');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => 'tenant_id +');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => 'tenant_id');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => 'tenant_id = 1; DROP TABLE users');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => 'tenant_id = 1) OR (true');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => 'tenant_id = 1 FROM users');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => 'tenant_id = 1, true');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => 'tenant_id IN (SELECT 1)');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => 'sum(tenant_id) > 1');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => 'generate_series(1, tenant_id) > 1');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => 'tenant_id > random() * 7');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => 'now() > ''2000-01-01''');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => 'mine(tenant_id)');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => 'tenant_id = 5::small');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => 'bio = ''''');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => 'true');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => 'profile_read IS NOT NULL');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', predicate => '');
\echo :LAST_ERROR_SQLSTATE

-- gates; back needs none
RESET ROLE;
INSERT INTO migrate._failure (flow, direction, key, sqlstate, origin, retry_at)
SELECT f.id, 'forward', '{1}', '23514', 'dual_write', now() + interval '1 hour' FROM migrate._flow f JOIN migrate._migration m ON m.id = f.migration WHERE m.name = 'm';
SET ROLE regress_route_owner;
SELECT migrate.route('m', percent => 10);
\echo :LAST_ERROR_SQLSTATE
SELECT untimed(migrate.route('m', percent => 10, dry_run => true, skip => '{failures}'));
RESET ROLE;
DELETE FROM migrate._failure;
SET ROLE regress_route_owner;
SELECT untimed(migrate.route('m', percent => 10, dry_run => true));
SELECT migration, view, percent, predicate, by FROM migrate.routes;

-- a key is read from one side, and its side changes once while the share grows. (What each side would show is told by a difference
-- that nothing but this test makes.)
UPDATE profiles SET display_name = 'target ' || user_id;
CREATE TEMP TABLE seen (step int, user_id bigint, PRIMARY KEY (step, user_id));
CREATE FUNCTION look(step int) RETURNS text LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO seen SELECT step, user_id FROM profile_read WHERE display_name LIKE 'target %';
    RETURN format('%s rows, %s keys, %s were read from the target before and are not now', (SELECT count(*) FROM profile_read), (SELECT count(DISTINCT user_id) FROM profile_read),
        (SELECT count(*) FROM seen a WHERE a.step = look.step - 1 AND NOT EXISTS (SELECT FROM seen b WHERE b.step = look.step AND b.user_id = a.user_id)));
END $$;
SELECT migrate.route('m', percent => 0.5);
SELECT look(1);
SELECT count(*) BETWEEN 1 AND 40 AS about_half_a_percent FROM seen WHERE step = 1;
SELECT migrate.route('m', percent => 10);
SELECT look(2);
SELECT count(*) BETWEEN 140 AND 260 AS about_a_tenth FROM seen WHERE step = 2;
SELECT migrate.route('m', percent => 50);
SELECT look(3);
SELECT count(*) BETWEEN 900 AND 1100 AS about_half FROM seen WHERE step = 3;
SELECT migrate.route('m', percent => 50);
SELECT reads('profile_read');
UPDATE profile_read SET bio = 'lost' WHERE user_id = 1;
\echo :LAST_ERROR_SQLSTATE

-- plans: by index, on the side that a key is read from
CREATE INDEX ON profiles (tenant_id);
ANALYZE users;
ANALYZE profiles;
EXPLAIN (COSTS OFF) SELECT * FROM profile_read WHERE user_id = 5;
EXPLAIN (COSTS OFF) SELECT * FROM profile_read ORDER BY user_id LIMIT 1;
EXPLAIN (COSTS OFF) SELECT p.bio FROM (VALUES (5), (6)) v(id) JOIN profile_read p ON p.user_id = v.id;
SELECT migrate.route('m', percent => 100);
SELECT look(4), reads('profile_read');
SELECT count(*) FROM seen WHERE step = 4;
EXPLAIN (COSTS OFF) SELECT * FROM profile_read WHERE user_id = 5;
UPDATE profile_read SET bio = 'lost' WHERE user_id = 1;
\echo :LAST_ERROR_SQLSTATE

-- less, and back: without gates, from any phase in which the source serves
SELECT migrate.pause('m');
SELECT migrate.route('m', percent => 20);
SELECT migrate.route('m', percent => 30);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', percent => 0);
SELECT reads('profile_read');
EXPLAIN (COSTS OFF) SELECT * FROM profile_read WHERE user_id = 5;
SELECT migrate.resume('m');
RESET ROLE;
SELECT verdict FROM migrate.validate('m');
SELECT count(*) FROM migrate.repair('m', execute => true);
SELECT verdict FROM migrate.validate('m');
SET ROLE regress_route_owner;
SELECT migrate.route('m', predicate => 'tenant_id IN (1, 2)');
SELECT migrate.route('m', predicate => '((tenant_id) = ANY (ARRAY[1, 2]))');
SELECT migration, view, percent, predicate, by FROM migrate.routes;
SELECT count(*), count(DISTINCT user_id) FROM profile_read;
EXPLAIN (COSTS OFF) SELECT * FROM profile_read WHERE tenant_id = 1 AND user_id = 5;
EXPLAIN (COSTS OFF) SELECT * FROM profile_read WHERE tenant_id = 3 AND user_id = 5;
SELECT migrate.route('m', predicate => 'user_id < 1000 AND tenant_id <> 3');
SELECT count(*), count(DISTINCT user_id) FROM profile_read;

-- who may read the source may read, and nobody writes
RESET ROLE;
SET ROLE regress_route_reader;
SELECT count(*) FROM profile_read;
DELETE FROM profile_read;
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', percent => 0);
\echo :LAST_ERROR_SQLSTATE
RESET ROLE;
SET ROLE regress_route_owner;

-- the switch brings the writes after, and rollback brings both back
SELECT migrate.cutover('m');
SELECT reads('profile_read'), reads('profile');
SELECT migrate.route('m', percent => 50);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.route('m', percent => 100);
SELECT migration, view, percent, predicate, by FROM migrate.routes;
SELECT migrate.rollback('m');
SELECT reads('profile_read'), reads('profile');

-- a gap in the dual writes: the reads come back
SELECT migrate.route('m', percent => 25);
ALTER TABLE users DISABLE TRIGGER USER;
SELECT migrate.route('m', percent => 26);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.retry('m');
SELECT reads('profile_read');
SELECT reach('m', 'ready');

-- cancel leaves it over the source; finalize over the target alone
SELECT migrate.route('m', percent => 25);
SET client_min_messages = warning;
SELECT migrate.cancel('m');
SELECT reads('profile_read');
SELECT migrate.route('m', percent => 25);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.drop('m');
SELECT count(*) FROM profile_read;
DROP VIEW profile, profile_read;
DELETE FROM profiles;
SELECT migrate.define('m', 'users', 'profiles', $$ id AS user_id, tenant AS tenant_id, name AS display_name, coalesce(bio, '') AS bio $$, on_target_delete => 'delete');

-- an existing view, unless somebody may write it
CREATE VIEW profile_read AS SELECT id AS user_id, tenant AS tenant_id, name AS display_name, coalesce(bio, '') AS bio FROM users;
GRANT SELECT, UPDATE ON profile_read TO regress_route_reader;
SELECT migrate.add_view('m', 'profile_read', use => 'read');
\echo :LAST_ERROR_SQLSTATE
REVOKE UPDATE ON profile_read FROM regress_route_reader;
SELECT migrate.add_view('m', 'profile_read', use => 'read');
SELECT migrate.set('m', 'defer_indexes', 'off');
SELECT migrate.start('m');
SELECT reach('m', 'ready');
SELECT migrate.route('m', percent => 40);
SELECT migrate.cutover('m');
SELECT migrate.finalize('m', force => 'm', drop_source => true);
SELECT reads('profile_read'), count(*) FROM profile_read;
SELECT kind, regexp_replace(why, ';.*', '') AS why FROM migrate.events WHERE migration = 'm' AND kind = 'route' ORDER BY id;
SELECT migrate.drop('m');
DROP VIEW profile_read;
DROP TABLE profiles;

-- every type of key has its place; several columns and several sources
CREATE TYPE colour AS ENUM ('red', 'green');
CREATE DOMAIN code AS text;
CREATE TABLE odd (region text, a numeric, b colour, c code, d uuid, e timestamptz, f char(5), g date, note text, PRIMARY KEY (a, b, c, d, e, f, g));
CREATE TABLE odd_us (LIKE odd INCLUDING ALL);
CREATE TABLE even (region text, a numeric, b colour, c code, d uuid, e timestamptz, f char(5), g date, note text, PRIMARY KEY (region, a, b, c, d, e, f, g));
INSERT INTO odd SELECT 'eu', g * 1.10, CASE g % 2 WHEN 0 THEN 'red' ELSE 'green' END::colour, 'c' || g, md5(g::text)::uuid, '2026-01-01'::timestamptz + g * interval '1 s', 'f' || g % 3, '2026-01-01'::date + g, 'n' FROM generate_series(1, 500) g;
INSERT INTO odd_us SELECT * FROM odd;
SELECT migrate.define('k', 'odd', 'even', $$ 'eu' AS region, a, b, c, d, e, f, g, note $$, on_target_delete => 'delete');
SELECT migrate.add_flow('k', 'odd_us', 'even', $$ 'us' AS region, a, b, c, d, e, f, g, note $$, on_target_delete => 'delete');
SELECT migrate.add_view('k', 'even_read', use => 'read');
SELECT migrate.start('k');
SELECT reach('k', 'ready');
SELECT migrate.route('k', percent => 30);
SELECT count(*), count(DISTINCT (region, a, b, c, d, e, f, g)) FROM even_read;
SELECT migrate.route('k', predicate => $$ region = 'eu' $$);
SELECT count(*), count(DISTINCT (region, a, b, c, d, e, f, g)) FROM even_read;
SELECT migrate.route('k', predicate => $$ note = 'n' AND b = 'red' $$);
SELECT count(*), count(DISTINCT (region, a, b, c, d, e, f, g)) FROM even_read;
SELECT migrate.cancel('k');
SELECT migrate.drop('k');
DROP TABLE seen;
RESET ROLE;
SELECT migrate.allow('regress_route_owner', 'nothing');
SET client_min_messages = warning;
DROP SCHEMA route_test CASCADE;
DROP ROLE regress_route_owner, regress_route_reader;
