-- preflight: each check finds what it is for. One migration a check; define() refuses some of these itself, so they are made after it.
\set SHOW_CONTEXT never
SET client_min_messages = warning;
CREATE SCHEMA pf;
SET search_path = pf;

-- What check `c` of migration `m` says.
CREATE FUNCTION found(m text, c text) RETURNS SETOF text LANGUAGE sql AS $$
    SELECT format(E'%s: %s', p.severity, p.message) || CASE WHEN p.hint = '' THEN '' ELSE E'\n  HINT: ' || p.hint END
    FROM migrate.preflight(m) p WHERE p."check" = c
$$;
-- Source and target tables s_<name> and t_<name>, and a migration between them.
CREATE FUNCTION make(name text, target_columns text DEFAULT 'id int PRIMARY KEY, v text', mapping text DEFAULT 'id, v') RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('CREATE TABLE s_%s (id int PRIMARY KEY, v text, n int NOT NULL DEFAULT 0)', name);
    EXECUTE format('CREATE TABLE t_%s (%s)', name, target_columns);
    PERFORM migrate.define(name, ('pf.s_' || name)::regclass, ('pf.t_' || name)::regclass, mapping);
END $$;
\pset tuples_only on
\pset format unaligned

-- A clean migration.
SELECT make('clean', 'id int PRIMARY KEY, v text, n int NOT NULL DEFAULT 0', 'id, v, n');
SELECT severity, "check", regexp_replace(message, '\d+ (bytes|kB)', '… \1', 'g') FROM migrate.preflight('clean') WHERE "check" NOT IN ('replicas', 'slots', 'long_transactions', 'prepared_transactions', 'worker_slots', 'wal_level', 'synchronous_replicas');

-- flows
SELECT make('flows');
DROP TABLE t_flows CASCADE;
SELECT regexp_replace(found('flows', 'flows'), 'OID \d+', 'OID …');

-- ownership
CREATE ROLE regress_migrate_pf;
GRANT USAGE ON SCHEMA pf TO regress_migrate_pf;
SELECT make('ownership');
ALTER TABLE t_ownership OWNER TO regress_migrate_pf;
SELECT found('ownership', 'ownership');
CREATE ROLE regress_migrate_owner;
SELECT migrate.allow('regress_migrate_owner');
GRANT USAGE, CREATE ON SCHEMA pf TO regress_migrate_owner;
SET ROLE regress_migrate_owner;
SELECT make('owned');
RESET ROLE;
ALTER TABLE s_owned OWNER TO regress_migrate_pf;
SET ROLE regress_migrate_owner;
SELECT found('owned', 'ownership');
SELECT found('clean', 'ownership');
RESET ROLE;

-- persistence
SELECT make('persistence');
ALTER TABLE s_persistence SET UNLOGGED;
SELECT found('persistence', 'persistence');

-- inheritance
SELECT make('inheritance');
CREATE TABLE child () INHERITS (s_inheritance);
SELECT found('inheritance', 'inheritance');

-- partitions
CREATE TABLE s_parts (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
CREATE TABLE s_parts_1 PARTITION OF s_parts FOR VALUES FROM (0) TO (10);
CREATE TABLE t_parts (id int PRIMARY KEY, v text);
SELECT migrate.define('parts', 's_parts', 't_parts', 'id, v');
SELECT found('parts', 'partitions');
CREATE UNLOGGED TABLE s_parts_2 PARTITION OF s_parts FOR VALUES FROM (10) TO (20);
SELECT found('parts', 'partitions');

-- rules
SELECT make('rules');
CREATE RULE "a rule" AS ON UPDATE TO s_rules DO ALSO NOTHING;
SELECT found('rules', 'rules');

-- row_security
SELECT make('row_security');
ALTER TABLE s_row_security ENABLE ROW LEVEL SECURITY;
SELECT found('row_security', 'row_security');
CREATE POLICY own ON s_row_security USING (v = current_user);
ALTER TABLE t_row_security ENABLE ROW LEVEL SECURITY;
SELECT found('row_security', 'row_security');
ALTER TABLE t_row_security FORCE ROW LEVEL SECURITY;
SELECT found('row_security', 'row_security');

-- subscription
SELECT make('subscription');
SET client_min_messages = error;
CREATE SUBSCRIPTION regress_migrate_sub CONNECTION 'dbname=nowhere' PUBLICATION p WITH (connect = false);
SET allow_system_table_mods = on;
INSERT INTO pg_subscription_rel (srsubid, srrelid, srsubstate) SELECT oid, 't_subscription'::regclass, 'r' FROM pg_subscription WHERE subname = 'regress_migrate_sub';
RESET allow_system_table_mods;
SELECT found('subscription', 'subscription');
ALTER SUBSCRIPTION regress_migrate_sub SET (slot_name = NONE);
DROP SUBSCRIPTION regress_migrate_sub;

-- publication
SELECT make('publication', 'id int NOT NULL UNIQUE, v text');
CREATE PUBLICATION regress_migrate_pub FOR TABLE s_publication;
SELECT found('publication', 'publication');
ALTER PUBLICATION regress_migrate_pub ADD TABLE t_publication;
SELECT found('publication', 'publication');
ALTER TABLE t_publication REPLICA IDENTITY USING INDEX t_publication_id_key;
SELECT found('publication', 'publication');
DROP PUBLICATION regress_migrate_pub;
-- of all tables, and (from PostgreSQL 15 on) of all in a schema: the same of the target; the extension's own tables are among the first
SELECT make('published', 'id int NOT NULL UNIQUE, v text');
CREATE PUBLICATION regress_migrate_pub FOR ALL TABLES WITH (publish = 'insert');
SELECT found('published', 'publication');
ALTER PUBLICATION regress_migrate_pub SET (publish = 'insert, update, delete, truncate');
SELECT found('published', 'publication');
SELECT migrate.start('published');
\echo :LAST_ERROR_SQLSTATE
DROP PUBLICATION regress_migrate_pub;
DO $$ BEGIN EXECUTE 'CREATE PUBLICATION regress_migrate_pub FOR ' || CASE WHEN current_setting('server_version_num')::int >= 150000 THEN 'TABLES IN SCHEMA pf' ELSE 'TABLE t_published' END; END $$;
SELECT found('published', 'publication');
ALTER TABLE t_published REPLICA IDENTITY FULL;
SELECT found('published', 'publication');
DROP PUBLICATION regress_migrate_pub;
CREATE PUBLICATION regress_migrate_pub FOR ALL TABLES;
SELECT found('publication', 'publication');
SELECT migrate.drop('publication');  -- which deletes from every table of the extension's
DROP PUBLICATION regress_migrate_pub;
SELECT c.relname AS has_no_replica_identity FROM pg_class c WHERE c.relnamespace = 'migrate'::regnamespace AND c.relkind = 'r' AND c.relreplident <> 'f'
    AND NOT EXISTS (SELECT FROM pg_index i WHERE i.indrelid = c.oid AND i.indisprimary);
SET client_min_messages = warning;

-- key_index, source_key
SELECT make('keys', 'id int NOT NULL UNIQUE, v text');
ALTER TABLE t_keys ALTER id DROP NOT NULL;
SELECT found('keys', 'key_index');
ALTER TABLE t_keys DROP CONSTRAINT t_keys_id_key;
SELECT found('keys', 'key_index');
ALTER TABLE s_keys DROP CONSTRAINT s_keys_pkey;
SELECT found('keys', 'source_key');
ALTER TABLE s_keys ADD UNIQUE (id) DEFERRABLE, ALTER id SET NOT NULL;
SELECT found('keys', 'source_key');

-- key_cast: casts between a key's type and text, either way
CREATE TYPE mood AS ENUM ('sad', 'happy');
CREATE TABLE s_cast (k mood PRIMARY KEY, v text);
CREATE TABLE t_cast (k mood PRIMARY KEY, v text);
SELECT migrate.define('cast', 's_cast', 't_cast', 'k, v', on_target_delete => 'delete');
CREATE FUNCTION as_text(mood) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT 'sad' $$;
CREATE FUNCTION as_mood(text) RETURNS mood LANGUAGE sql IMMUTABLE AS $$ SELECT 'sad'::pf.mood $$;
CREATE CAST (mood AS text) WITH FUNCTION as_text (mood) AS ASSIGNMENT;
SELECT found('cast', 'key_cast');
SELECT migrate.start('cast');
DROP CAST (mood AS text);
SELECT found('cast', 'key_cast');
CREATE CAST (text AS mood) WITH FUNCTION as_mood (text) AS ASSIGNMENT;
SELECT found('cast', 'key_cast');
SELECT migrate.define('cast_again', 's_cast', 't_cast', 'k, v', on_target_delete => 'delete');
DROP CAST (text AS mood);

-- target_empty
SELECT make('target_empty');
INSERT INTO t_target_empty VALUES (1, 'somebody else''s');
SELECT found('target_empty', 'target_empty');
CREATE TABLE s_share (id int PRIMARY KEY, v text);
CREATE TABLE t_share (kind text, id int, v text, PRIMARY KEY (kind, id));
INSERT INTO t_share VALUES ('other', 1, 'not ours');
SELECT migrate.define('share', 's_share', 't_share', $$ 'mine' AS kind, id, v $$);
SELECT found('share', 'target_empty');
INSERT INTO t_share VALUES ('mine', 1, 'ours');
SELECT found('share', 'target_empty');
CREATE TABLE t_share_typed (c char(5), b boolean, d date, id int, v text, PRIMARY KEY (c, b, d, id));
SET DateStyle = 'SQL, DMY';
SELECT migrate.define('share_typed', 's_share', 't_share_typed', $$ 'eu' AS c, true AS b, date '04/03/2026' AS d, id, v $$, on_target_delete => 'delete');
RESET DateStyle;
INSERT INTO t_share_typed VALUES ('eu', false, '2026-03-04', 1, 'not ours'), ('eu', true, '2026-04-03', 1, 'not ours');
SELECT found('share_typed', 'target_empty');
INSERT INTO t_share_typed VALUES ('eu', true, '2026-03-04', 1, 'ours');
SELECT found('share_typed', 'target_empty');

-- not_null, nullable_source
SELECT make('nulls', 'id int PRIMARY KEY, v text NOT NULL, w text');
SELECT found('nulls', 'nullable_source');
ALTER TABLE t_nulls ALTER w SET NOT NULL;
SELECT found('nulls', 'not_null');

-- narrowing
CREATE TABLE s_narrow (id int PRIMARY KEY, a bigint, b text, c numeric, d timestamp, e int);
CREATE TABLE t_narrow (id int PRIMARY KEY, a int, b varchar(10), c numeric(6,2), d date, e bigint);
SELECT migrate.define('narrow', 's_narrow', 't_narrow', $$ id, a, b, c, d, e $$);
SELECT found('narrow', 'narrowing');

-- generated, defaults
CREATE TABLE s_generated (id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, v text DEFAULT 'x', g int GENERATED ALWAYS AS (1) STORED);
CREATE TABLE t_generated (id int PRIMARY KEY, v text, g int);
SELECT migrate.define('generated', 's_generated', 't_generated', $$ id, v, g $$);
SELECT found('generated', 'generated');
SELECT found('generated', 'defaults');
SELECT make('identity', 'id int PRIMARY KEY GENERATED ALWAYS AS IDENTITY, v text');
CREATE TABLE s_beside (id int PRIMARY KEY, n int GENERATED ALWAYS AS IDENTITY);
CREATE TABLE t_beside (id int PRIMARY KEY, n int GENERATED ALWAYS AS IDENTITY);
SELECT migrate.define('beside', 's_beside', 't_beside', on_target_delete => 'delete');
SELECT found('beside', 'generated');
ALTER TABLE t_beside ALTER n SET GENERATED BY DEFAULT;
ALTER TABLE s_beside ALTER n SET GENERATED BY DEFAULT;
SELECT found('beside', 'generated');
SELECT found('identity', 'generated');

-- constraints
CREATE TABLE other (id int PRIMARY KEY);
CREATE DOMAIN short AS text CHECK (length(VALUE) < 5);
SELECT make('constraints', 'id int PRIMARY KEY, v text UNIQUE CHECK (v <> ''''), o int REFERENCES other, s short', 'id, v, n AS o, v::short AS s');
CREATE UNIQUE INDEX plain_index ON t_constraints (o);
SELECT found('constraints', 'constraints');
SELECT migrate.set('constraints', 'dual_write', 'strict');
SELECT found('constraints', 'constraints');

-- Values exchanged between rows by one statement: the columns in another order, a key of the mapping is none.
CREATE TABLE s_exchange (id int PRIMARY KEY, a int, b int, c int UNIQUE DEFERRABLE, d int UNIQUE DEFERRABLE, UNIQUE (a, b) DEFERRABLE);
CREATE TABLE t_exchange (id int PRIMARY KEY, b int, a int, c int UNIQUE, d int UNIQUE DEFERRABLE, UNIQUE (b, a));
CREATE UNIQUE INDEX "C" ON t_exchange (c);
SELECT migrate.define('exchange', 's_exchange', 't_exchange', 'id, a, b, c, d');
SELECT found('exchange', 'constraints');

-- deferred_constraints
SELECT make('deferred', 'id int PRIMARY KEY, v text UNIQUE DEFERRABLE INITIALLY DEFERRED, o int REFERENCES other DEFERRABLE INITIALLY DEFERRED', 'id, v, n AS o');
SELECT found('deferred', 'deferred_constraints');

-- foreign_key_actions: to the source, to another table
CREATE TABLE s_fk (id int PRIMARY KEY, o int REFERENCES other ON DELETE CASCADE);
CREATE TABLE t_fk (id int PRIMARY KEY REFERENCES s_fk ON DELETE CASCADE, o int REFERENCES other ON DELETE CASCADE ON UPDATE SET NULL);
SELECT migrate.define('fk', 's_fk', 't_fk', 'id, o');
SELECT found('fk', 'foreign_key_actions');
-- … and from another table to the source, whose rows the way back deletes where a key of the target changes; a swap moves such keys
SELECT make('part_of');
CREATE TABLE part (id int REFERENCES s_part_of ON DELETE CASCADE, o int REFERENCES s_part_of);
SELECT found('part_of', 'foreign_key_actions');
SELECT migrate.set('part_of', 'cutover', 'swap');
SELECT found('part_of', 'foreign_key_actions');
SELECT migrate.set('part_of', 'cutover', 'view');
ALTER TABLE part DROP CONSTRAINT part_id_fkey, ADD FOREIGN KEY (id) REFERENCES s_part_of ON DELETE CASCADE ON UPDATE CASCADE;
SELECT found('part_of', 'foreign_key_actions');
ALTER TABLE s_part_of ALTER id ADD GENERATED ALWAYS AS IDENTITY;
SELECT found('part_of', 'foreign_key_actions');

-- triggers
SELECT make('triggers');
CREATE FUNCTION noop() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NEW; END';
CREATE TRIGGER before_all BEFORE INSERT ON t_triggers FOR EACH ROW EXECUTE FUNCTION noop();
CREATE TRIGGER always AFTER INSERT ON s_triggers FOR EACH ROW EXECUTE FUNCTION noop();
SELECT found('triggers', 'source_triggers');
ALTER TABLE s_triggers ENABLE ALWAYS TRIGGER always;
SELECT found('triggers', 'source_triggers');
SELECT found('triggers', 'target_triggers');

-- referencing_keys, dependents, sequences, grants
CREATE TABLE s_left (id serial PRIMARY KEY, v text);
CREATE TABLE t_left (id int PRIMARY KEY, v text);
SELECT migrate.define('left', 's_left', 't_left', 'id, v');
CREATE TABLE referrer (id int PRIMARY KEY REFERENCES s_left);
CREATE VIEW reader AS SELECT v FROM s_left;
CREATE MATERIALIZED VIEW keeper AS SELECT v FROM s_left;
GRANT SELECT, UPDATE ON s_left TO regress_migrate_pf;
GRANT SELECT ON s_left TO PUBLIC;
SELECT found('left', c) FROM unnest('{referencing_keys,dependents,sequences,grants}'::text[]) c;
GRANT SELECT ON t_left TO PUBLIC;
SELECT found('left', 'grants');

-- not_carried, carried_twice, reverse, on_target_delete
SELECT make('back', 'id int PRIMARY KEY, v text', 'id, upper(v) AS v');
CREATE TABLE t_back2 (id int PRIMARY KEY, n int);
CREATE TABLE t_back3 (id int PRIMARY KEY, n int);
SELECT migrate.add_flow('back', 's_back', 't_back2', 'id, n');
SELECT migrate.add_flow('back', 's_back', 't_back3', 'id, n');
SELECT found('back', c) FROM unnest('{not_carried,carried_twice,reverse,on_target_delete}'::text[]) c;
SELECT migrate.set('back', 'accept_reverse_gaps', 'on'), migrate.set('back', 'on_target_delete', 'keep');
SELECT found('back', c) FROM unnest('{reverse,on_target_delete}'::text[]) c;

-- worker_slots: a warning that depends on the server
SELECT migrate.set('clean', 'workers', '64');
SELECT regexp_replace(found('clean', 'worker_slots'), '\d+', '…', 'g');

-- size: guessed until the table is analyzed
SELECT make('size');
INSERT INTO s_size SELECT g, 'v' FROM generate_series(1, 1000) g;
SELECT left(found('size', 'size'), 40);
ANALYZE s_size;
SELECT left(found('size', 'size'), 40);

-- Names with quotes, newlines, percent signs and 63 bytes of multibyte letters, and a wide table.
DO $$
DECLARE
    odd text := E'a "b" ''c''\n%s|`';
    long text := repeat('é', 31);
BEGIN
    EXECUTE format('CREATE TABLE %I (%I int PRIMARY KEY, %I text, %I text)', odd, odd, long, 'select');
    EXECUTE format('CREATE TABLE %I (%I int PRIMARY KEY, %I text, %I text)', long, odd, long, 'select');
    PERFORM migrate.define(odd, format('pf.%I', odd)::regclass, format('pf.%I', long)::regclass);
    EXECUTE (SELECT format('CREATE TABLE wide_s (id int PRIMARY KEY, %s)', string_agg(format('c%s int', g), ', ')) FROM generate_series(1, 299) g);
    CREATE TABLE wide_t (LIKE wide_s INCLUDING INDEXES);
    PERFORM migrate.define('wide', 'pf.wide_s', 'pf.wide_t');
END $$;
SELECT severity, "check", message FROM migrate.preflight(E'a "b" ''c''\n%s|`') WHERE severity IN ('error', 'warning') AND "check" NOT IN ('long_transactions', 'prepared_transactions', 'slots');
SELECT severity, "check", message FROM migrate.preflight('wide') WHERE severity IN ('error', 'warning') AND "check" NOT IN ('long_transactions', 'prepared_transactions', 'slots');

-- start refuses what preflight finds.
SELECT migrate.start('target_empty');
SELECT migrate.start('persistence');
SELECT phase FROM migrate.migration WHERE name = 'target_empty';
SELECT * FROM migrate.preflight('no such migration');

SELECT count(migrate.drop(name)) FROM migrate.migration;
SELECT migrate.allow('regress_migrate_owner', 'nothing');
DROP SCHEMA pf CASCADE;
DROP ROLE regress_migrate_pf, regress_migrate_owner;
