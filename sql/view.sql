-- add_view: both shapes; what is made, what is adopted, what is refused and how.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE SCHEMA view_test;
SET search_path = view_test;
CREATE ROLE regress_view_owner;
CREATE ROLE regress_view_other;
CREATE ROLE regress_view_reader;
GRANT USAGE, CREATE ON SCHEMA view_test TO regress_view_owner, regress_view_other;
GRANT USAGE ON SCHEMA view_test TO regress_view_reader;
CREATE FUNCTION reads(view regclass) RETURNS text LANGUAGE sql AS $$
    SELECT string_agg(DISTINCT d.refobjid::regclass::text, ', ') FROM pg_depend d JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
    WHERE r.ev_class = view AND d.refclassid = 'pg_class'::regclass AND d.refobjid <> view
$$;
CREATE FUNCTION granted(relation regclass) RETURNS SETOF text LANGUAGE sql AS $$
    SELECT a.privilege_type || ' to ' || CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid(a.grantee) END
    FROM pg_class c, aclexplode(c.relacl) a WHERE c.oid = relation AND a.grantee <> c.relowner ORDER BY 1
$$;
CREATE TABLE users (id bigserial PRIMARY KEY, name text NOT NULL, bio varchar(50), created_at timestamptz NOT NULL DEFAULT '2026-01-01');
CREATE TABLE profiles (user_id bigint PRIMARY KEY, display_name text NOT NULL, bio varchar(50), created_at timestamptz NOT NULL, extra int);
ALTER TABLE users OWNER TO regress_view_owner;
ALTER TABLE profiles OWNER TO regress_view_owner;
GRANT SELECT, INSERT ON users TO regress_view_reader;
GRANT UPDATE (bio) ON users TO regress_view_reader;
COMMENT ON TABLE users IS 'people';
COMMENT ON COLUMN users.bio IS 'in short';
INSERT INTO users (name, bio) VALUES ('Ada', 'first'), ('Bob', NULL);
SET client_min_messages = notice;
SELECT migrate.define('m', 'users', 'profiles', $$ id AS user_id, name AS display_name, bio, created_at $$, on_target_delete => 'delete');

-- shape target: a new view over the source, with the source's grants
SELECT migrate.add_view('m', 'profile');
SELECT reads('profile');
SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute WHERE attrelid = 'profile'::regclass ORDER BY attnum;
SELECT relowner::regrole FROM pg_class WHERE oid = 'profile'::regclass;
SELECT granted('profile');
SELECT attname, attacl FROM pg_attribute WHERE attrelid = 'profile'::regclass AND attacl IS NOT NULL;
SELECT * FROM profile ORDER BY user_id;
UPDATE profile SET bio = 'second' WHERE user_id = 2;
INSERT INTO profile (display_name) VALUES ('Cid') RETURNING *;
SELECT * FROM users ORDER BY id;
SELECT migrate.add_view('m', 'profile');

-- what cannot be
SELECT migrate.add_view('m', 'profile', shape => 'source');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.add_view('m', 'p2', shape => 'round');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.add_view('nobody', 'p2');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.add_view('m', 'users');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.add_view('m', 'profiles', shape => 'source');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.add_view('m', 'pg_temp.p2');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.add_view('m', 'no_such_schema.p2');
\echo :LAST_ERROR_SQLSTATE
CREATE SCHEMA view_test_closed;
SELECT migrate.add_view('m', 'view_test_closed.p2');
\echo :LAST_ERROR_SQLSTATE
DROP SCHEMA view_test_closed;

-- an existing view is adopted when its columns are the same: owner, options and grants stay
CREATE VIEW wrong AS SELECT id AS user_id, name::varchar(10) AS display_name, 1 AS other FROM users;
SELECT migrate.add_view('m', 'wrong');
\echo :LAST_ERROR_SQLSTATE
CREATE VIEW "Right one" WITH (security_barrier = true, check_option = 'local') AS
    SELECT created_at, bio, id AS user_id, name AS display_name FROM users;
ALTER VIEW "Right one" OWNER TO regress_view_owner;
GRANT SELECT ON "Right one" TO PUBLIC;
SELECT migrate.add_view('m', '"Right one"');
SELECT reads('"Right one"');
SELECT relowner::regrole, reloptions FROM pg_class WHERE oid = '"Right one"'::regclass;
SELECT granted('"Right one"');

-- who owns the view must have the rights on both tables
ALTER TABLE profiles OWNER TO regress_view_other;
SELECT migrate.add_view('m', 'p3');
\echo :LAST_ERROR_SQLSTATE
GRANT SELECT, INSERT, UPDATE, DELETE ON profiles TO regress_view_owner;
SELECT migrate.add_view('m', 'p3');
ALTER TABLE profiles OWNER TO regress_view_owner;

-- dropping a planned migration leaves the views of shape target over the source
SELECT migrate.drop('m');
SELECT migrate.drop('m');
SELECT count(*) FROM profile;
DROP VIEW profile, "Right one", wrong, p3;

-- shape source: the view takes the table's name
SELECT migrate.define('s', 'users', 'profiles', $$ id AS user_id, name AS display_name, created_at $$, on_target_delete => 'delete');
SELECT migrate.add_view('s', 'users', shape => 'source');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.drop('s');
SELECT migrate.define('s', 'users', 'profiles', $$ id AS user_id, name AS display_name, bio, created_at $$, on_target_delete => 'delete');
CREATE VIEW early AS SELECT count(*) FROM users;
CREATE TABLE users_migrate ();
SELECT migrate.add_view('s', 'users', shape => 'source');
SELECT reads('users');
SELECT relkind, relowner::regrole, obj_description(oid) FROM pg_class WHERE oid = 'users'::regclass;
SELECT granted('users');
SELECT attname, attacl, col_description(attrelid, attnum) FROM pg_attribute WHERE attrelid = 'users'::regclass AND attacl IS NOT NULL;
SET ROLE regress_view_reader;
SELECT name, bio FROM users ORDER BY id;
RESET ROLE;
INSERT INTO users (name) VALUES ('Dora') RETURNING id, name, created_at = '2026-01-01' AS has_default;
SELECT migrate.add_view('s', 'users', shape => 'source');
SELECT migrate.cancel('s');
SELECT relkind FROM pg_class WHERE oid = 'users'::regclass;
SELECT to_regclass('users_migrate2') IS NULL AS gone;
SELECT migrate.add_view('s', 'users', shape => 'source');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.drop('s');

-- columns of another type: exact types, written where PostgreSQL can
CREATE TABLE wide (user_id numeric PRIMARY KEY, display_name varchar(200) COLLATE "C" NOT NULL, shout text);
ALTER TABLE wide OWNER TO regress_view_owner;
SELECT migrate.define('w', 'users', 'wide', $$ id AS user_id, name AS display_name, upper(name) AS shout $$, on_target_delete => 'keep');
SELECT migrate.add_view('w', 'wide_view');
SELECT attname, format_type(atttypid, atttypmod), (SELECT collname FROM pg_collation WHERE oid = attcollation)
FROM pg_attribute WHERE attrelid = 'wide_view'::regclass ORDER BY attnum;
SELECT migrate.drop('w');
DROP VIEW wide_view;

-- two flows: the view's name or its columns tell which one it is for
CREATE TABLE contact (id bigint PRIMARY KEY, name text NOT NULL);
CREATE TABLE about (id bigint PRIMARY KEY, bio text);
ALTER TABLE contact OWNER TO regress_view_owner;
ALTER TABLE about OWNER TO regress_view_owner;
SELECT migrate.define('two', 'users', 'contact', on_target_delete => 'keep');
SELECT migrate.add_flow('two', 'users', 'about', on_target_delete => 'keep', flow => 'about');
SELECT migrate.add_view('two', 'nothing_known');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.add_view('two', 'about_view', flow => 'nothing_known');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.add_view('two', 'about_view', flow => 'about');
SELECT * FROM about_view ORDER BY id;
SELECT migrate.drop('two');

-- row-level security of the source binds who reads through the view
ALTER TABLE users ENABLE ROW LEVEL SECURITY;
SELECT migrate.define('r', 'users', 'contact', on_target_delete => 'keep');
SELECT migrate.add_view('r', 'contact_view');
\echo :LAST_ERROR_SQLSTATE
SELECT migrate.drop('r');

-- who inserts through the view needs the sequences of the target's defaults
ALTER TABLE users DISABLE ROW LEVEL SECURITY;
CREATE TABLE serials (id bigserial PRIMARY KEY, name text NOT NULL, further serial);
ALTER TABLE serials OWNER TO regress_view_owner;
SELECT migrate.define('q', 'users', 'serials', on_target_delete => 'delete');
SELECT migrate.add_view('q', 'serial_view');  -- (users_id_seq is closed to the reader as well)
DROP VIEW serial_view;
SELECT migrate.drop('q');
GRANT USAGE ON SEQUENCE users_id_seq TO regress_view_reader;
SELECT migrate.define('q', 'users', 'serials', on_target_delete => 'delete');
SELECT migrate.add_view('q', 'serial_view');
\echo :LAST_ERROR_SQLSTATE
GRANT USAGE ON SEQUENCE view_test.serials_further_seq, serials_id_seq TO regress_view_reader;
SELECT migrate.add_view('q', 'serial_view');
REVOKE USAGE ON SEQUENCE serials_id_seq FROM regress_view_reader;
SELECT problem, hint FROM migrate._migration m, migrate._views_gate(m, 'target') WHERE m.name = 'q';
SELECT problem, hint FROM migrate._migration m, migrate._views_gate(m, 'source') WHERE m.name = 'q';
SELECT migrate.drop('q');
DROP VIEW serial_view;
REVOKE USAGE ON SEQUENCE users_id_seq FROM regress_view_reader;

-- logical replication does not follow a source that steps aside
SELECT migrate.define('n', 'users', 'profiles', $$ id AS user_id, name AS display_name, bio, created_at $$, on_target_delete => 'delete');
SET client_min_messages = error;
CREATE PUBLICATION regress_view_pub FOR TABLE users;
CREATE SUBSCRIPTION regress_view_sub CONNECTION 'dbname=nowhere' PUBLICATION p WITH (connect = false);
SET allow_system_table_mods = on;
INSERT INTO pg_subscription_rel (srsubid, srrelid, srsubstate) SELECT oid, 'users'::regclass, 'r' FROM pg_subscription WHERE subname = 'regress_view_sub';
RESET allow_system_table_mods;
SET client_min_messages = warning;
SELECT migrate.add_view('n', 'users', shape => 'source');
\echo :LAST_ERROR_SQLSTATE
ALTER SUBSCRIPTION regress_view_sub SET (slot_name = NONE);
DROP SUBSCRIPTION regress_view_sub;
SELECT migrate.add_view('n', 'users', shape => 'source');
DROP PUBLICATION regress_view_pub;

-- what is granted under the name meanwhile is the table's when it has it again; what reads the view is named
REVOKE INSERT ON users FROM regress_view_reader;
REVOKE UPDATE (bio) ON users FROM regress_view_reader;
GRANT DELETE ON users TO regress_view_other WITH GRANT OPTION;
GRANT UPDATE (name) ON users TO regress_view_other;
CREATE VIEW later AS SELECT name FROM users;
SELECT migrate.cancel('n');
\echo :LAST_ERROR_SQLSTATE
DROP VIEW view_test.later;
SELECT migrate.cancel('n');
SELECT relkind FROM pg_class WHERE oid = 'users'::regclass;
SELECT granted('users');
SELECT attname, attacl FROM pg_attribute WHERE attrelid = 'users'::regclass AND attacl IS NOT NULL;
SELECT migrate.drop('n');

-- security_invoker (of PostgreSQL 15): the rights of PUBLIC, and of who has columns alone
SELECT current_setting('server_version_num')::int >= 150000 AS has_invoker \gset
\if :has_invoker
CREATE TABLE open (id bigint PRIMARY KEY, v text);
CREATE TABLE closed (id bigint PRIMARY KEY, v text);
ALTER TABLE open OWNER TO regress_view_owner;
ALTER TABLE closed OWNER TO regress_view_owner;
ALTER TABLE open ENABLE ROW LEVEL SECURITY;
ALTER TABLE closed ENABLE ROW LEVEL SECURITY;
GRANT SELECT ON open TO PUBLIC;
SELECT migrate.define('i', 'open', 'closed', on_target_delete => 'delete');
SELECT migrate.add_view('i', 'open_view');
\echo :LAST_ERROR_SQLSTATE
REVOKE SELECT ON open FROM PUBLIC;
GRANT SELECT (id, v), INSERT (id) ON open TO regress_view_reader;
SELECT migrate.add_view('i', 'open_view');
GRANT SELECT (id, v) ON closed TO regress_view_reader;
SELECT migrate.add_view('i', 'open_view');
GRANT INSERT (id) ON closed TO regress_view_reader;
SELECT migrate.add_view('i', 'open_view');
ALTER VIEW open_view SET (security_invoker = on);
REVOKE SELECT (id, v) ON closed FROM regress_view_reader;
SELECT problem, hint FROM migrate._migration m, migrate._views_gate(m, 'target') WHERE m.name = 'i';
SELECT migrate.drop('i');
DROP VIEW open_view;
\endif

SET client_min_messages = warning;
DROP SCHEMA view_test CASCADE;
DROP ROLE regress_view_owner, regress_view_other, regress_view_reader;
