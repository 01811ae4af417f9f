-- plan: the runbook, complete and the same each time; what it tells to paste can be pasted.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE ROLE regress_dba SUPERUSER;
SET SESSION AUTHORIZATION regress_dba;  -- who is named below, whatever the superuser is called
CREATE SCHEMA plan;
SET search_path = plan;
CREATE TABLE users (id bigserial PRIMARY KEY, name text NOT NULL, bio text, secret text, created_at timestamptz NOT NULL DEFAULT now());
CREATE TABLE orders (id int PRIMARY KEY, user_id bigint REFERENCES users);
CREATE TABLE profiles (user_id bigint PRIMARY KEY REFERENCES users ON DELETE CASCADE, display_name varchar(40) NOT NULL, bio text NOT NULL, "na|me" text, added int DEFAULT 1);
CREATE TABLE loud (id bigint PRIMARY KEY, shout text);
INSERT INTO users (name, bio, secret) SELECT 'u' || g, nullif('b' || g % 3, 'b2'), 's' FROM generate_series(1, 300) g;
ANALYZE users;
SELECT migrate.define('plan', 'users', 'profiles', $$ id AS user_id, name AS display_name, coalesce(bio, '') AS bio,
    CASE WHEN name ~ ', FROM' THEN 'a, b' ELSE "name" || '|' END AS "na|me" $$, filter => $$ id <> 7 $$);
SELECT migrate.add_flow('plan', 'users', 'loud', $$ id, upper(name) AS shout $$);
\pset tuples_only on
\pset format unaligned
-- Sizes and the checks of the server depend on the machine; servers before 16 print users.name where later ones print name.
CREATE FUNCTION runbook(m text) RETURNS SETOF text LANGUAGE sql AS $$
    SELECT regexp_replace(CASE WHEN line LIKE '| `plan.%' THEN regexp_replace(line, '\d+ (bytes|kB)', '… \1', 'g') ELSE line END, '([ (])users\.', '\1', 'g')
    FROM regexp_split_to_table(migrate.plan(m), E'\n') AS line
    WHERE line !~ 'errors, .* notes|(slots|replicas|transactions|wal_level):'
$$;
SELECT runbook('plan');

-- Other options, other words.
SELECT migrate.set('plan', 'dual_write', 'strict'), migrate.set('plan', 'shadow_rate', '0.02'), migrate.set('plan', 'max_rows_per_second', '500'), migrate.set('plan', 'workers', '2');
SELECT line FROM runbook('plan') AS line WHERE line ~ 'strict|shadow|rows/s';

-- Twice the same.
SELECT migrate.plan('plan') = migrate.plan('plan');

-- The comparison it gives, as printed: after a copy by hand it counts 0, and each kind of difference once.
INSERT INTO profiles SELECT id, name, coalesce(bio, ''), name || '|' FROM users WHERE id <> 7;
SELECT regexp_replace(substring(migrate.plan('plan') FROM 'SELECT count\(\*\) AS differing[^;]*profiles[^;]*;'), ';$', '') AS comparison \gset
:comparison;
UPDATE profiles SET bio = 'x' WHERE user_id = 1;
DELETE FROM profiles WHERE user_id = 2;
INSERT INTO profiles VALUES (7, 'extra', '', 'extra|');
:comparison;

SELECT migrate.plan('no such migration');
SELECT count(migrate.drop(name)) FROM migrate.migration;
DROP SCHEMA plan CASCADE;
RESET SESSION AUTHORIZATION;
DROP ROLE regress_dba;
