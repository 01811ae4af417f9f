# The vulnerabilities of PostgreSQL Anonymizer, which has the shape of this extension (a user's expressions, generated views,
# workers, a superuser's verbs), each tried here under its number.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use Test::More;

my $node = new_server('cves', conf => "log_error_verbosity = terse\nlog_min_messages = log\n");
# Whatever runs as a superuser is told in the log.
$node->safe_psql('postgres', <<'SQL');
CREATE ROLE mallory LOGIN;
CREATE SCHEMA lair AUTHORIZATION mallory;
GRANT CREATE ON SCHEMA public TO mallory;
SELECT migrate.allow('mallory');
CREATE TABLE public.secret (id int, v text);
INSERT INTO public.secret VALUES (1, 'secret');
SET ROLE mallory;
SET search_path = lair;
CREATE FUNCTION spy(v text, place text) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
    RAISE LOG 'lair: % as % (superuser: %)', place, current_user, (SELECT r.rolsuper FROM pg_catalog.pg_roles r WHERE r.rolname = current_user);
    RETURN v;
END $$;
CREATE FUNCTION is_fair(v text) RETURNS boolean IMMUTABLE LANGUAGE sql AS $$ SELECT lair.spy(v, 'domain') IS NOT NULL $$;
CREATE TABLE s (id int PRIMARY KEY, v text);
CREATE TABLE t (id int PRIMARY KEY, v text);
INSERT INTO s SELECT i, 'v' || i FROM generate_series(1, 10) i;
SQL

sub as_mallory { return $node->safe_psql('postgres', "SET search_path = lair, public;\n$_[0]", extra_params => [ '-U', 'mallory' ]); }

sub error_as_mallory { return error_of($node, $_[0], user => 'mallory'); }

# What has run as a superuser since the last call; and that something ran at all, where it should.
my $from = -s $node->logfile;

sub ran
{
	my $log = PostgreSQL::Test::Utils::slurp_file($node->logfile, $from);
	$from = -s $node->logfile;
	return $log =~ /lair: (.*? as \w+ \(superuser: \w+\))/g;
}

sub no_superuser
{
	my ($place) = @_;
	my @ran = ran();
	is(join(', ', grep { /superuser: t/ } @ran), '', 'nothing ran as a superuser');
	ok((grep { /^$place as mallory/ } @ran) > 0, "$place ran as its owner") if $place;
	return;
}

sub ready_migration
{
	my ($name, $define) = @_;
	as_mallory($define // "SELECT migrate.define('$name', 's', 't', on_target_delete => 'delete')");
	as_mallory("SELECT migrate.start('$name')");
	wait_phase($node, 'ready', $name);
	return;
}

subtest 'CVE-2024-2338: a mapping that breaks out of the generated view' => sub {
	for my $text ('id, v FROM lair.s; SELECT lair.spy(v, 1) --', 'id, v FROM public.secret', 'id, v UNION SELECT id, v FROM public.secret', 'id, (SELECT v FROM public.secret) AS v',
		q{id, v FROM lair.s; ALTER ROLE mallory SUPERUSER}, q{id) AS (SELECT lair.spy('', 'mapping')}, 'id, v /*', q{id, lair.spy(v, 'mapping') AS v WHERE true INTO x})
	{
		isnt(error_as_mallory("SELECT migrate.define('m', 'lair.s', 'lair.t', \$m\$ $text \$m\$, on_target_delete => 'delete')"), '', "refused: $text");
		isnt(error_as_mallory("SELECT migrate.define('m', 'lair.s', 'lair.t', filter => \$m\$ $text \$m\$, on_target_delete => 'delete')"), '', "… nor is it a filter");
		isnt(error_as_mallory("SELECT migrate.define('m', 'lair.s', 'lair.t', reverse => \$m\$ $text \$m\$, on_target_delete => 'delete')"), '', "… nor a reverse");
	}
	is($node->safe_psql('postgres', q{SELECT rolsuper FROM pg_roles WHERE rolname = 'mallory'}), 'f', 'mallory is who he was');
	no_superuser();
};

subtest 'CVE-2024-2339: the owner\'s function, run by a superuser\'s verb' => sub {
	$node->safe_psql('postgres', <<'SQL');
SELECT migrate.define('m', 'lair.s', 'lair.t', $$ id, lair.spy(v, 'mapping') AS v $$, filter => $$ lair.spy('a', 'filter') = 'a' $$, on_target_delete => 'delete');
SELECT migrate.preflight('m'), migrate.plan('m'), migrate.set('m', 'accept_reverse_gaps', 'on');
SELECT migrate.start('m');
SQL
	wait_phase($node, 'ready', 'm');
	$node->safe_psql('postgres', "UPDATE lair.s SET v = 'superuser' WHERE id = 1; SELECT * FROM migrate.validate('m', 'rows'); SELECT migrate.cutover('m', dry_run => true); SELECT migrate.cancel('m'); SELECT migrate.drop('m')");
	no_superuser($_) for 'mapping';
	as_mallory('TRUNCATE t');
};

subtest 'CVE-2026-2360: an operator or function planted before CREATE EXTENSION' => sub {
	$node->safe_psql('postgres', 'CREATE DATABASE planted');
	$node->safe_psql('planted', 'GRANT CREATE ON SCHEMA public TO mallory; CREATE SCHEMA lair AUTHORIZATION mallory');
	$node->safe_psql('planted', <<'SQL', extra_params => [ '-U', 'mallory' ]);
CREATE FUNCTION public.trap(oid, regclass) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE LOG 'lair: operator as % (superuser: t)', current_user; RETURN true; END $$;
CREATE FUNCTION public.trap(name, text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE LOG 'lair: operator as % (superuser: t)', current_user; RETURN true; END $$;
CREATE FUNCTION public.format(text, regclass) RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE LOG 'lair: function as % (superuser: t)', current_user; RETURN ''; END $$;
CREATE OPERATOR public.= (LEFTARG = oid, RIGHTARG = regclass, FUNCTION = public.trap);
CREATE OPERATOR public.= (LEFTARG = name, RIGHTARG = text, FUNCTION = public.trap);
SQL
	$node->safe_psql('planted', 'SET search_path = public, pg_catalog; CREATE EXTENSION migrate_ext; SET search_path = public; DROP EXTENSION migrate_ext');
	no_superuser();
	$node->safe_psql('planted', 'DROP SCHEMA IF EXISTS migrate; CREATE SCHEMA migrate AUTHORIZATION mallory');
	like(error_of($node, 'CREATE EXTENSION migrate_ext', db => 'planted'), qr/schema/, 'a schema of somebody else\'s is refused');
};

subtest 'CVE-2026-2361: temporary views that stand before the real ones' => sub {
	my $temp = join '', map { "CREATE TEMP VIEW $_ AS SELECT 1 AS id, lair.spy('', 'temporary view') AS v;\n" } qw(s t _migration _flow _mapping migration flow_3_forward pg_class pg_trigger pg_constraint);
	as_mallory("$temp SET search_path = pg_temp, lair, pg_catalog; SELECT migrate.define('m', 'lair.s', 'lair.t', on_target_delete => 'delete'); SELECT count(*) FROM migrate.preflight('m'); SELECT migrate.add_view('m', 'lair.w')");
	as_mallory("$temp SET search_path = pg_temp, lair, pg_catalog; SELECT migrate.start('m')");
	wait_phase($node, 'ready', 'm');
	my $verdict = as_mallory("$temp SET search_path = pg_temp, lair, pg_catalog; UPDATE lair.s SET v = 'temp' WHERE id = 1; SELECT verdict FROM migrate.validate('m', 'rows')");
	is($verdict, 'equal', 'the real tables were compared');
	as_mallory("$temp SET search_path = pg_temp, lair, pg_catalog; SELECT migrate.cutover('m'); SELECT migrate.rollback('m'); SELECT migrate.cancel('m'); SELECT migrate.drop('m'); DROP VIEW lair.w; TRUNCATE lair.t");
	is(join(', ', ran()), '', 'no temporary view was read at all');
	like(error_as_mallory("CREATE TEMP VIEW v AS SELECT 1 AS id; SELECT migrate.define('m', 'pg_temp.v', 'lair.t')"), qr/42809/, 'nor can one be migrated');
};

subtest 'CVE-2026-9617: injection through the name of a column' => sub {
	for my $name (q{"; SELECT lair.spy('', 'name'); --}, qq{x\n) AS (SELECT lair.spy('', 'name'}, 'é' x 31 . 'x')
	{
		my $quoted = '"' . ($name =~ s/"/""/gr) . '"';
		as_mallory("CREATE TABLE s2 (id int PRIMARY KEY, $quoted text DEFAULT 'd'); CREATE TABLE t2 (id int PRIMARY KEY, $quoted text); INSERT INTO s2 VALUES (1), (2)");
		ready_migration('m', "SELECT migrate.define('m', 's2', 't2', on_target_delete => 'delete')");
		as_mallory("UPDATE s2 SET $quoted = 'x' WHERE id = 1; SELECT migrate.add_view('m', 'w2')");
		as_mallory('UPDATE t2 SET id = 7 WHERE id = 2');
		is(as_mallory("SELECT verdict FROM migrate.validate('m'); SELECT count(*) FROM migrate.repair('m', true); SELECT verdict FROM migrate.validate('m')") =~ s/.*\n//sr, 'equal', 'damage is found and repaired: ' . ($name =~ s/\n/ /r));
		as_mallory("SELECT migrate.cutover('m'); SELECT migrate.finalize('m', force => 'm'); SELECT migrate.drop('m'); DROP VIEW w2; DROP TABLE s2, t2");
	}
	is(join(', ', ran()), '', 'no name was run');
};

subtest 'CVE-2026-19633: operators, casts to domains, and literals that a superuser reads' => sub {
	as_mallory(<<'SQL');
CREATE DOMAIN guarded AS text CHECK (lair.is_fair(VALUE));
CREATE TYPE pair AS (v guarded);
CREATE FUNCTION plus(a text, b text) RETURNS text IMMUTABLE LANGUAGE sql AS $$ SELECT lair.spy(a, 'operator') || b $$;
CREATE OPERATOR <+> (LEFTARG = text, RIGHTARG = text, FUNCTION = plus);
CREATE TABLE s3 (id int PRIMARY KEY, v text, p pair DEFAULT '(x)'::pair);
CREATE TABLE t3 (id int PRIMARY KEY, v guarded, p pair);
INSERT INTO s3 SELECT i, 'v' FROM generate_series(1, 5) i;
SQL
	ready_migration('m', q{SELECT migrate.define('m', 's3', 't3', $$ id, v <+> 'x' AS v, p $$, reverse => $$ id, v::text AS v, p $$, on_target_delete => 'delete')});
	no_superuser($_) for 'operator';
	# A view takes over the source's defaults, at add_view as at cutover: theirs are literals, too.
	as_mallory("SELECT migrate.add_view('m', 'w3'); SELECT migrate.cutover('m', dry_run => true); SELECT migrate.cutover('m')");
	no_superuser('domain');
	is(as_mallory("INSERT INTO w3 (id, v) VALUES (100, 'new'); SELECT p FROM t3 WHERE id = 100"), '(x)', '… and the default is taken over');
	as_mallory("SELECT migrate.rollback('m'); SELECT migrate.cancel('m'); SELECT migrate.drop('m'); DROP VIEW w3");
	no_superuser('domain');
};

subtest 'CVE-2026-83534: the worker connects as the bootstrap superuser' => sub {
	as_mallory(<<'SQL');
CREATE FUNCTION escape() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    way text;
BEGIN
    FOREACH way IN ARRAY ARRAY['SET ROLE postgres', 'RESET ROLE', 'SET SESSION AUTHORIZATION DEFAULT', 'DECLARE c CURSOR WITH HOLD FOR SELECT lair.spy(relname::text, ''held cursor'') FROM pg_catalog.pg_class LIMIT 1', 'CREATE TEMP TABLE s (id int)',
        'SET search_path = lair', 'LISTEN x'] LOOP
        BEGIN
            EXECUTE way;
        EXCEPTION WHEN OTHERS THEN NULL;
        END;
        PERFORM lair.spy('', 'trigger');
    END LOOP;
    RETURN NEW;
END $$;
CREATE TRIGGER escape BEFORE INSERT OR UPDATE ON t FOR EACH ROW EXECUTE FUNCTION escape();
SQL
	ready_migration('m');
	no_superuser('trigger');
	my $of_db = 'ALTER DATABASE postgres SET search_path = lair, public, pg_catalog; ALTER DATABASE postgres SET row_security = off; ALTER DATABASE postgres SET check_function_bodies = off';
	$node->safe_psql('postgres', "ALTER DATABASE postgres OWNER TO mallory");
	as_mallory("$of_db; SELECT migrate.retry('m')");
	as_mallory("UPDATE t SET v = 'damage' WHERE id = 1; SELECT * FROM migrate.validate('m'); SELECT * FROM migrate.repair('m', true)");
	as_mallory("SELECT migrate.cancel('m'); SELECT migrate.drop('m')");
	no_superuser('trigger');
	# A deferred trigger would run at the worker's commit, as the worker: the write that queues it is refused.
	as_mallory(<<'SQL');
ALTER DATABASE postgres RESET ALL;
DROP TRIGGER escape ON t;
TRUNCATE t;
SQL
	ready_migration('m');
	as_mallory('CREATE CONSTRAINT TRIGGER later AFTER INSERT OR UPDATE ON t INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION escape()');
	as_mallory("DELETE FROM t WHERE id = 3; SELECT * FROM migrate.validate('m')");
	ran();
	error_as_mallory("SELECT * FROM migrate.repair('m', true)");
	is(as_mallory('SELECT count(*) FROM t WHERE id = 3'), 0, 'a repair that would queue a deferred trigger is refused');
	no_superuser();
	as_mallory("SELECT migrate.cancel('m'); SELECT migrate.drop('m'); TRUNCATE t; DROP TRIGGER later ON t");
};

# Not one of theirs, but of their kind: a name that is resolved while a lock is waited for may mean something else afterwards.
subtest 'a sequence that becomes a view while cutover waits for it' => sub {
	as_mallory(q{CREATE SEQUENCE q; ALTER TABLE s ALTER id SET DEFAULT nextval('q')});
	ready_migration('m');
	ran();
	my $thief = background($node, user => 'mallory');
	$thief->query_safe(q{BEGIN; ALTER SEQUENCE lair.q RENAME TO old_q; CREATE VIEW lair.q AS SELECT length(lair.spy('1', 'sequence'))::bigint AS last_value, true AS is_called});
	my $cutover = background($node, user => 'mallory');
	my $pid = $cutover->query_safe('SELECT pg_backend_pid()');
	$cutover->query_until(qr/called/, "\\echo called\nSELECT migrate.cutover('m', dry_run => true);\n");
	wait_for($node, 'cutover waits for the sequence', "SELECT EXISTS (SELECT FROM pg_locks WHERE pid = $pid AND NOT granted)");
	$thief->query_safe('COMMIT');
	$cutover->query_safe('SELECT 1');
	$_->quit for $thief, $cutover;
	no_superuser('sequence');
};

$node->stop;
done_testing();
