-- define and add_flow: what is accepted, what is refused and how.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE SCHEMA define_test;
SET search_path = define_test;

CREATE TABLE users (id bigint PRIMARY KEY, name text NOT NULL, bio text, email text UNIQUE, created_at timestamptz NOT NULL DEFAULT now(), age int);
CREATE TABLE user_profiles (user_id bigint PRIMARY KEY, display_name text NOT NULL, bio text NOT NULL DEFAULT '', created_at timestamptz NOT NULL);
SET client_min_messages = notice;

-- the quickstart's definition: what is not carried is said, and a second time it is a no-op
SELECT migrate.define('users_to_profiles', source => 'users', target => 'user_profiles',
    mapping => $$ id AS user_id, name AS display_name, coalesce(bio, '') AS bio, created_at $$);
SELECT migrate.define('users_to_profiles', source => 'users', target => 'user_profiles',
    mapping => $$ id AS user_id, name AS display_name, coalesce(bio, '') AS bio, created_at $$);
SELECT migrate.define('users_to_profiles', source => 'users', target => 'user_profiles', mapping => $$ id AS user_id, name AS display_name, created_at $$);
\echo :LAST_ERROR_SQLSTATE
SELECT phase FROM migrate.migration WHERE name = 'users_to_profiles';
SELECT direction, columns, reads, key_dest, key_view, key_origin, key_const, filtered, plain
FROM migrate._mapping JOIN migrate._flow f ON f.id = flow JOIN migrate._migration m ON m.id = f.migration
WHERE m.name = 'users_to_profiles' ORDER BY direction;
SELECT migrate.drop('users_to_profiles');

-- without a mapping: equal names
CREATE TABLE users_copy (name text, id bigint PRIMARY KEY, age bigint, extra text);
SELECT migrate.define('by_name', 'users', 'users_copy');
SELECT migrate.drop('by_name');

-- a filter, a constant in the key, a composite key, and a mapping given back
CREATE TABLE regional (region text, id bigint, name text, PRIMARY KEY (region, id));
SELECT migrate.define('eu', 'users', 'regional', $$ 'eu' AS region, id, name $$, filter => 'age > 17');
-- (Servers before 16 qualify every column.)
SELECT regexp_replace(pg_get_viewdef(view), '(users|regional)\.|[()]', '', 'g') AS mapping FROM migrate._mapping m JOIN migrate._flow f ON f.id = m.flow JOIN migrate._migration g ON g.id = f.migration WHERE g.name = 'eu' ORDER BY direction;
SELECT migrate.drop('eu');

-- the mapping is a select list and nothing else
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id FROM users; DROP TABLE users; -- $$);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id FROM users $$);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id LIMIT 1 $$);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ $$);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id, $$);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id, (SELECT 'x') AS display_name, created_at $$);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id, max(name) AS display_name, created_at $$);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id, string_agg(name, '') OVER () AS display_name, created_at $$);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id, regexp_split_to_table(name, ' ') AS display_name, created_at $$);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id, name AS display_name, created_at $$, filter => 'true) OR (SELECT true');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id, name AS display_name, created_at $$, filter => 'age > 1, true');
\echo :LAST_ERROR_SQLSTATE

-- immutable, typed, complete
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id, name AS display_name, now() AS created_at $$);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id, created_at::text AS display_name, created_at $$);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id, name AS display_name, created_at $$, filter => 'created_at > now()');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id, name AS display_name, age AS created_at $$);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id, name AS display_name, created_at, ctid::text AS bio $$);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id, name, created_at $$);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id, nosuch AS display_name, created_at $$);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'users', 'user_profiles', $$ id AS user_id, bio, created_at $$);
\echo :LAST_ERROR_SQLSTATE
CREATE TABLE computed (id bigint PRIMARY KEY, name text, upper_name text GENERATED ALWAYS AS (upper(name)) STORED);
SELECT migrate.define('m', 'users', 'computed', $$ id, name, name AS upper_name $$);
\echo :LAST_ERROR_SQLSTATE

-- keys
CREATE TABLE t_nokey (id bigint, name text);
SELECT migrate.define('m', 'users', 't_nokey', $$ id, name $$);
\echo :LAST_ERROR_SQLSTATE
CREATE TABLE t_deferrable (id bigint PRIMARY KEY DEFERRABLE, name text);
SELECT migrate.define('m', 'users', 't_deferrable', $$ id, name $$);
CREATE TABLE t_partial (id bigint NOT NULL, name text);
CREATE UNIQUE INDEX ON t_partial (id) WHERE name IS NOT NULL;
SELECT migrate.define('m', 'users', 't_partial', $$ id, name $$);
CREATE TABLE t_nullable (id bigint UNIQUE, name text);
SELECT migrate.define('m', 'users', 't_nullable', $$ id, name $$);
CREATE TABLE t_expression (id bigint PRIMARY KEY, name text);
SELECT migrate.define('m', 'users', 't_expression', $$ id + 1 AS id, name $$);
SELECT migrate.define('m', 'users', 't_expression', $$ age AS id, name $$);
CREATE TABLE t_text_key (id text PRIMARY KEY, name text);
SELECT migrate.define('m', 'users', 't_text_key', $$ id::text AS id, name $$);
CREATE TABLE s_collated (id text COLLATE "C" PRIMARY KEY, name text);
SELECT migrate.define('m', 's_collated', 't_text_key');
ALTER TABLE users ALTER email DROP NOT NULL;
SELECT migrate.define('m', 'users', 't_text_key', $$ email AS id, name $$);

-- keys that the target's column would round: they would not be found again
CREATE FUNCTION pg_temp.keyed(source_type text, target_type text) RETURNS text LANGUAGE plpgsql AS $$
DECLARE
    said text;
    help text;
BEGIN
    EXECUTE format('CREATE TABLE s_typed (id %s PRIMARY KEY, v text); CREATE TABLE t_typed (id %s PRIMARY KEY, v text)', source_type, target_type);
    PERFORM migrate.define('m', 's_typed', 't_typed');
    SELECT coalesce((SELECT f.reverse_gaps[1] FROM migrate._flow f WHERE f.target = 't_typed'::regclass), 'both ways') INTO said;
    RAISE EXCEPTION USING ERRCODE = 'UNDO1';
EXCEPTION WHEN SQLSTATE 'UNDO1' THEN RETURN said;
WHEN OTHERS THEN
    GET STACKED DIAGNOSTICS help = PG_EXCEPTION_HINT;
    RETURN format('%s: %s HINT: %s', SQLSTATE, SQLERRM, help);
END $$;
SET client_min_messages = warning;
SELECT a AS source, b AS target, pg_temp.keyed(a, b) FROM (VALUES
    ('numeric(12,3)', 'numeric(12,2)'), ('numeric', 'numeric(12,2)'), ('timestamptz', 'timestamptz(3)'), ('timestamp(6)', 'timestamp(0)'), ('time(3)', 'time(2)'),
    ('interval', 'interval day to second'), ('numeric(12,2)', 'numeric(12,3)'), ('numeric(10,2)', 'numeric(12,2)'), ('timestamptz', 'timestamptz(6)'),
    ('int', 'numeric(12,2)'), ('varchar(20)', 'varchar(40)'), ('text', 'varchar(5)'), ('char(5)', 'char(10)'), ('bit(3)', 'bit(3)')) x(a, b);
RESET client_min_messages;

-- tables
CREATE UNLOGGED TABLE t_unlogged (id bigint PRIMARY KEY, name text);
SELECT migrate.define('m', 'users', 't_unlogged', $$ id, name $$);
\echo :LAST_ERROR_SQLSTATE
CREATE TEMPORARY TABLE t_temporary (id bigint PRIMARY KEY, name text);
SELECT migrate.define('m', 'users', 't_temporary', $$ id, name $$);
CREATE VIEW v AS SELECT id, name FROM users;
SELECT migrate.define('m', 'users', 'v', $$ id, name $$);
DROP VIEW v;
CREATE TABLE t_parent (id bigint PRIMARY KEY, name text);
CREATE TABLE t_child () INHERITS (t_parent);
SELECT migrate.define('m', 'users', 't_child', $$ id, name $$);
SELECT migrate.define('m', 'users', 't_parent', $$ id, name $$);
CREATE TABLE t_rules (id bigint PRIMARY KEY, name text);
CREATE RULE r AS ON INSERT TO t_rules DO INSTEAD NOTHING;
SELECT migrate.define('m', 'users', 't_rules', $$ id, name $$);
CREATE TABLE t_rls (id bigint PRIMARY KEY, name text);
ALTER TABLE t_rls FORCE ROW LEVEL SECURITY;
SELECT migrate.define('m', 'users', 't_rls', $$ id, name $$);
CREATE TABLE t_parted (id bigint PRIMARY KEY, name text) PARTITION BY RANGE (id);
CREATE TABLE t_parted_1 PARTITION OF t_parted FOR VALUES FROM (0) TO (100);
SELECT migrate.define('m', 'users', 't_parted_1', $$ id, name $$);
SELECT migrate.define('m', 'users', 'users', $$ id, name $$);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('m', 'pg_catalog.pg_class', 't_expression', $$ oid::bigint AS id, relname AS name $$);
SELECT migrate.define('m', 'nosuch', 't_expression');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define('', 'users', 't_expression');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.define(repeat('x', 64), 'users', 't_expression');
SELECT migrate.define('m', NULL, 't_expression');
SELECT migrate.define('m', 'users', 't_expression', on_target_delete => 'perhaps');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.start('nosuch');
\echo :LAST_ERROR_SQLSTATE
-- nothing of all that is left
SELECT count(*) FROM migrate._migration WHERE name IN ('m', '');
SELECT count(*) FROM pg_class WHERE relnamespace = 'migrate'::regnamespace AND relname LIKE 'flow\_%';

-- names that want quoting
CREATE TABLE "weird ""name""
with newline" ("select" int PRIMARY KEY, "a""b" text, "größe" text, "$1" text);
CREATE TABLE "sixty_three_bytes_long_name_äöü_sixty_three_bytes_long_name" ("from" int PRIMARY KEY, "x;y" text, "größe" text, "'q'" text);
SELECT migrate.define('it''s "odd"; DROP', '"weird ""name""
with newline"', '"sixty_three_bytes_long_name_äöü_sixty_three_bytes_long_name"', $$ "select" AS "from", "a""b" AS "x;y", "größe", "$1" AS "'q'" $$);
SELECT migrate.drop('it''s "odd"; DROP');

-- two targets of one source, two sources of one target
CREATE TABLE contact (id bigint PRIMARY KEY, email text);
SELECT migrate.define('split', 'users', 'user_profiles', $$ id AS user_id, name AS display_name, created_at $$);
SELECT migrate.add_flow('split', 'users', 'contact', $$ id, email $$);
SELECT migrate.add_flow('split', 'users', 'contact', $$ id, email $$);
SELECT migrate.add_flow('split', 'users', 'contact', $$ id, email $$, on_target_delete => 'keep');
\echo :LAST_ERROR_SQLSTATE
SELECT f.name, f.source, f.target, f.on_target_delete, f.not_carried FROM migrate._flow f ORDER BY f.id;
-- a script that is run again finds all as it was, also when its migration is past the phase planned
SELECT migrate.cancel('split');
SELECT migrate.define('split', 'users', 'user_profiles', $$ id AS user_id, name AS display_name, created_at $$);
SELECT migrate.add_flow('split', 'users', 'contact', $$ id, email $$);
SELECT migrate.add_flow('split', 'users', 'users_copy');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.drop('split');

-- several sources of one target: without a constant nobody could say whose a row of the target is
CREATE TABLE more_users (id bigint PRIMARY KEY, email text);
CREATE TABLE marked_contact (id bigint PRIMARY KEY, email text, origin text);
SELECT migrate.define('union', 'users', 'contact', $$ id, email $$, on_target_delete => 'keep');
SELECT migrate.add_flow('union', 'more_users', 'contact', $$ id, email $$, flow => 'more');
SELECT f.name, m.direction, f.reverse_gaps FROM migrate._flow f JOIN migrate._mapping m ON m.flow = f.id ORDER BY 1, 2;
SELECT migrate.drop('union');
SELECT migrate.define('union', 'more_users', 'marked_contact', $$ id, email, 'more' AS origin $$);
SELECT migrate.add_flow('union', 'users', 'marked_contact', $$ id, email, 'users' AS origin $$, flow => 'users', on_target_delete => 'keep');
SELECT f.name, m.direction, m.filtered FROM migrate._flow f JOIN migrate._mapping m ON m.flow = f.id ORDER BY 1, 2;
SELECT migrate.drop('union');

-- rights
CREATE ROLE define_stranger;
CREATE ROLE define_owner;
ALTER TABLE users OWNER TO define_owner;
GRANT USAGE ON SCHEMA define_test TO define_stranger;
SET ROLE define_stranger;
SELECT migrate.define('m', 'users', 'contact', $$ id, email $$);
RESET ROLE;
SELECT migrate.allow('define_stranger');
SET ROLE define_stranger;
SELECT migrate.define('m', 'users', 'contact', $$ id, email $$);
\echo :LAST_ERROR_SQLSTATE
RESET ROLE;
SELECT migrate.allow('define_stranger', 'everything');
SELECT migrate.allow(NULL);
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.allow('define_stranger', 'nothing');

SET client_min_messages = warning;
DROP SCHEMA define_test CASCADE;
DROP ROLE define_stranger, define_owner;
