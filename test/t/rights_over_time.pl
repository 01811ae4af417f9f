# Rights over time: a writer with few of them, under row security, before, during and after cutover and after rollback;
# owners that change between the verbs; and what a trigger of the target's owner leaves behind for a writer's commit.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use Test::More;

my $node = new_server('rights');
$node->safe_psql('postgres', <<'SQL');
CREATE ROLE boss LOGIN;
CREATE ROLE writer LOGIN;
CREATE ROLE heir LOGIN;
CREATE SCHEMA r AUTHORIZATION boss;
GRANT USAGE ON SCHEMA r TO writer;
GRANT ALL ON SCHEMA r TO heir;
SELECT migrate.allow('boss'), migrate.allow('heir');
SET ROLE boss;
SET search_path = r;
CREATE TABLE s (id int PRIMARY KEY, v text, tenant text);
CREATE TABLE t (id int PRIMARY KEY, v text, tenant text);
INSERT INTO s SELECT i, 'v' || i, CASE WHEN i % 2 = 0 THEN 'writer' ELSE 'other' END FROM generate_series(1, 20) i;
ALTER TABLE s ENABLE ROW LEVEL SECURITY;
ALTER TABLE t ENABLE ROW LEVEL SECURITY;
CREATE POLICY own ON s TO writer USING (tenant = current_user);
CREATE POLICY own ON t TO writer USING (tenant = current_user);
GRANT SELECT, INSERT, UPDATE, DELETE ON s TO writer;
SQL

sub as { my ($role, $sql) = @_; return $node->safe_psql('postgres', "SET search_path = r;\n$sql", extra_params => [ '-U', $role ]); }

my $key = 100;

# The writer's own rows can be written, others' neither seen nor written, and both sides are equal afterwards.
sub writes_own_rows
{
	my ($when, $relation, $other) = @_;
	$key += 10;
	subtest "a writer with few rights $when" => sub {
		is(as('writer', "SELECT count(*) FILTER (WHERE tenant <> 'writer') FROM $relation"), 0, 'others\' rows are hidden');
		as('writer', "INSERT INTO $relation VALUES ($key, 'new', 'writer'), ($key + 1, 'gone', 'writer'); UPDATE $relation SET v = '$when' WHERE id IN (2, $key); DELETE FROM $relation WHERE id = $key + 1");
		is(as('writer', "UPDATE $relation SET v = 'stolen' WHERE id = 1 RETURNING id"), '', 'nor written');
		like(error_of($node, "INSERT INTO r.$relation VALUES ($key + 2, 'x', 'other')", user => 'writer'), qr/42501/, 'nor made');
		if ($other)
		{
			like(error_of($node, "SELECT FROM r.$other", user => 'writer'), qr/42501/, "$other is not the writer's to read");
			like(error_of($node, "UPDATE r.$other SET v = 'x'", user => 'writer'), qr/42501/, '… or to write');
		}
		is($node->safe_psql('postgres', 'SELECT * FROM migrate._failure'), '', 'every dual write was applied');
		is($node->safe_psql('postgres', 'SELECT count(*) FROM r.s FULL JOIN r.t USING (id) WHERE (s.v, s.tenant) IS DISTINCT FROM (t.v, t.tenant)'), 0, 'both sides are equal');
	};
	return;
}

as('boss', "SELECT migrate.define('m', 's', 't', on_target_delete => 'delete'); SELECT migrate.start('m')");
wait_phase($node, 'ready', 'm');
writes_own_rows('before cutover', 's', 't');
is(as('writer', "SELECT count(*) FROM pg_class c WHERE c.relnamespace = 'migrate'::regnamespace AND c.relkind IN ('r', 'v', 'S') AND CASE c.relkind WHEN 'S' THEN has_sequence_privilege(c.oid, 'USAGE, SELECT, UPDATE') ELSE has_any_column_privilege(c.oid, 'SELECT, INSERT, UPDATE') END"),
	0, 'the writer has no right on anything of the extension\'s');
# The view asks for the rights of who uses it, for the policies' sake. Views of PostgreSQL 13 and 14 cannot; there the writer uses the tables.
my $has_view = server_major() >= 15;
my ($before, $after) = $has_view ? qw(w w) : qw(s t);
my $refusal = $has_view ? qr/42501.*writer lacks rights on table r\.t/s : qr/0A000.*would pass by/s;
like(error_of($node, "SELECT migrate.add_view('m', 'r.w')", user => 'boss'), $refusal, 'a view that the writer could not use after cutover is refused');
as('boss', 'GRANT SELECT, INSERT, UPDATE, DELETE ON t TO writer');
as('boss', "SELECT migrate.add_view('m', 'r.w')") if $has_view;
writes_own_rows('through the view before cutover', $before);

# In the middle of a transaction of the writer's that began before the switch
my $open = background($node, user => 'writer');
$open->query_safe("BEGIN; UPDATE r.$before SET v = 'in flight' WHERE id = 4");
my $cutover = background($node, user => 'boss');
$cutover->query_until(qr/called/, "\\echo called\nSELECT migrate.cutover('m');\n");
$open->query_safe("UPDATE r.$before SET v = 'still in flight' WHERE id = 6; COMMIT");
$cutover->query_safe('SELECT 1');
wait_for($node, 'the switch', "SELECT phase FROM migrate._migration", 'cut_over');
$_->quit for $open, $cutover;
is(as('writer', "SELECT string_agg(v, ',' ORDER BY id) FROM $after WHERE id IN (4, 6)"), 'in flight,still in flight', 'what was in flight is there');
writes_own_rows('through the view after cutover', $after);
writes_own_rows('at the old table after cutover', 's');
# After cutover the view's dual writes go to the source: the writer needs no right on that either.
as('boss', 'REVOKE ALL ON s FROM writer');
writes_own_rows('through the view, without rights on the old table', $after, 's');
as('boss', 'GRANT SELECT, INSERT, UPDATE, DELETE ON s TO writer');
as('boss', "SELECT migrate.rollback('m')");
writes_own_rows('through the view after rollback', $before);
writes_own_rows('at the table after rollback', 's');

# Each verb asks again who owns the tables.
sub refused_for
{
	my ($table, $verb, $call) = @_;
	as('postgres', "ALTER TABLE r.$table OWNER TO heir");
	like(error_of($node, "SELECT migrate.$call", user => 'boss'), qr/42501.*does not own table r\.$table/s, "$verb is refused to who no longer owns $table");
	like(error_of($node, "SELECT migrate.$call", user => 'heir'), qr/42704/, '… and the heir of one table has no say in the migration');
	as('postgres', "ALTER TABLE r.$table OWNER TO boss");
	return;
}

refused_for($_, 'cutover', "cutover('m')") for qw(s t);
refused_for($_, 'pause', "pause('m')") for qw(s t);
as('boss', "SELECT migrate.pause('m')");
refused_for($_, 'resume', "resume('m')") for qw(s t);
as('boss', "SELECT migrate.resume('m')");
for my $verb (qw(retry validate repair cancel))
{
	refused_for($_, $verb, "$verb('m')") for qw(s t);
}
as('boss', "SELECT migrate.cutover('m')");
for my $table (qw(s t))
{
	refused_for($table, 'rollback', "rollback('m')");
	refused_for($table, 'finalize', "finalize('m', force => 'm')");
}
# Another owner after cutover: writers do not notice.
as('postgres', 'ALTER TABLE r.s OWNER TO heir; ALTER TABLE r.t OWNER TO heir; GRANT heir TO boss');
writes_own_rows('after a change of both owners', $after);
as('boss', "SELECT migrate.finalize('m', force => 'm'); SELECT migrate.drop('m'); DROP VIEW IF EXISTS w");
as('postgres', 'REVOKE heir FROM boss; ALTER TABLE r.s OWNER TO boss; ALTER TABLE r.t OWNER TO boss; TRUNCATE r.t');
as('boss', "SELECT migrate.define('m', 's', 't', on_target_delete => 'delete')");
refused_for($_, 'start', "start('m')") for qw(s t);
refused_for($_, 'drop', "drop('m')") for qw(s t);

# What a trigger of the target's owner leaves behind runs at the writer's commit as the writer. PostgreSQL's own cascades let
# the owner of the referencing table do the same, and this test keeps the two alike (README, "Limits").
as('boss', <<'SQL');
CREATE FUNCTION told() RETURNS text LANGUAGE plpgsql AS $$ BEGIN RAISE WARNING 'run as %', current_user; RETURN ''; END $$;
CREATE FUNCTION leave() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'DECLARE c CURSOR WITH HOLD FOR SELECT r.told()'; RETURN COALESCE(NEW, OLD); END $$;
CREATE TABLE child (id int REFERENCES s ON DELETE CASCADE);
CREATE TRIGGER leave BEFORE DELETE ON child FOR EACH ROW EXECUTE FUNCTION leave();
INSERT INTO child VALUES (2);
SQL
sub told { my ($sql) = @_; my ($status, undef, $err) = $node->psql('postgres', $sql, extra_params => [ '-U', 'writer' ]); return join ',', $err =~ /run as (\w+)/g; }

my $cascade = told('DELETE FROM r.s WHERE id = 2');
as('boss', "DROP TABLE child; SELECT migrate.start('m')");
wait_phase($node, 'ready', 'm');
as('boss', 'CREATE TRIGGER leave BEFORE UPDATE ON t FOR EACH ROW EXECUTE FUNCTION leave()');
is($cascade, 'writer', 'a cursor that a cascade has left behind runs as the writer');
is(told("UPDATE r.s SET v = 'held' WHERE id = 4"), $cascade, '… and so does one that a dual write has left behind');
as('boss', "SELECT migrate.cancel('m'); SELECT migrate.drop('m')");

# The owner changes while a statement runs that has written its rows and not carried them over yet, because a trigger of the
# application's holds it up; through SQL, and directly.
for my $path ('through SQL', 'directly')
{
	subtest "another owner in the midst of a statement, $path" => sub {
		as('postgres', <<'SQL');
DROP TABLE r.s, r.t CASCADE;
SET ROLE boss;
CREATE TABLE r.s (id int PRIMARY KEY, v text);
CREATE TABLE r.t (id int PRIMARY KEY, v text);
GRANT INSERT ON r.s TO writer;
SELECT migrate.define('m', 'r.s', 'r.t', on_target_delete => 'delete');
SELECT migrate.set('m', 'dual_write', 'strict'), migrate.start('m');
CREATE OR REPLACE FUNCTION r.hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN NULL; END $$;
CREATE TRIGGER zz AFTER INSERT ON r.s FOR EACH ROW EXECUTE FUNCTION r.hold();
SQL
		wait_phase($node, 'ready', 'm');
		as('boss', 'CREATE FUNCTION r.pass() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$; CREATE TRIGGER pass AFTER INSERT ON r.t FOR EACH ROW EXECUTE FUNCTION r.pass()') if $path eq 'through SQL';
		my ($holder, $open) = (background($node), background($node, user => 'writer'));
		$holder->query_safe('SELECT pg_advisory_lock(1)');
		$open->query_until(qr/called/, "\\echo called\nINSERT INTO r.s VALUES (1, 'in flight');\n");
		wait_for($node, 'the trigger', "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted", 1);
		as('postgres', 'ALTER TABLE r.t OWNER TO heir');
		$holder->query_safe('SELECT pg_advisory_unlock(1)');
		$open->query_safe('SELECT 1');
		is($node->safe_psql('postgres', 'SELECT v FROM r.t'), 'in flight', 'the row is there');
		$_->quit for $holder, $open;
		as('postgres', "SELECT migrate.cancel('m'), migrate.drop('m')");
	};
}

# Reads that are routed, the watch that rolls back as whoever cut over, and a swap, by owners that change.
as('postgres', <<'SQL');
DROP TABLE r.s, r.t CASCADE;
SET ROLE boss;
SET search_path = r;
CREATE TABLE s (id int GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, v text CONSTRAINT s_v CHECK (v <> ''), w int DEFAULT 1);
CREATE TABLE t (id bigint PRIMARY KEY, v text CONSTRAINT t_v CHECK (v <> ''), w int);
CREATE INDEX s_w ON s (w);
CREATE INDEX t_w ON t (w);
CREATE STATISTICS s_vw (ndistinct) ON v, w FROM s;
CREATE STATISTICS t_vw (ndistinct) ON v, w FROM t;
INSERT INTO s (v) SELECT 'v' || i FROM generate_series(1, 5) i;
SELECT migrate.define('m', 's', 't', on_target_delete => 'delete'), migrate.add_view('m', 'r.reads', use => 'read'), migrate.set('m', 'watch_time', '1 hour'), migrate.set('m', 'on_limit', 'rollback');
SELECT migrate.start('m');
SQL
wait_phase($node, 'ready', 'm');
refused_for($_, 'route', "route('m', percent => 10)") for qw(s t);
as('boss', "SELECT migrate.route('m', percent => 10); SELECT migrate.cutover('m'); ALTER TABLE s ADD CONSTRAINT refuses CHECK (v <> 'refused') NOT VALID");
as('postgres', "ALTER TABLE t OWNER TO heir; UPDATE t SET v = 'refused' WHERE id = 1");
wait_for($node, 'the rollback is refused', "SELECT count(*) > 0 FROM migrate._event WHERE kind = 'rollback refused' AND why ~ 'role boss does not own table r.t'");
as('boss', 'ALTER TABLE s DROP CONSTRAINT refuses');
is(as('boss', "SELECT migrate.serves('m')"), 'target', 'nothing is rolled back for who does not own the tables any more');
as('postgres', 'ALTER TABLE t OWNER TO boss');
wait_for($node, 'the rollback', "SELECT phase FROM migrate._migration WHERE name = 'm'", 'ready');

# What a swap has renamed is named back as the tables' owner of then.
as('boss', "SELECT migrate.set('m', 'watch_time', '0'), migrate.set('m', 'cutover', 'swap'); SELECT migrate.cutover('m')");
as('boss', "INSERT INTO s (v) VALUES ('as boss')");
as('postgres', "ALTER TABLE s OWNER TO heir; ALTER TABLE s_old OWNER TO heir; ALTER STATISTICS s_vw OWNER TO heir; ALTER STATISTICS s_vw_old OWNER TO heir; ALTER VIEW reads OWNER TO heir; SELECT migrate.rollback('m')");
is(as('postgres', q{SELECT string_agg(i.indexrelid::regclass::text, ' ' ORDER BY i.indexrelid::regclass::text) FROM pg_index i WHERE i.indrelid = 's'::regclass}), 's_pkey s_w', 'a swap is undone for another owner of both tables');
is(as('heir', q{SELECT string_agg(v, ' ' ORDER BY id) FROM s WHERE id > 5}), 'as boss', '… with what was written meanwhile');
as('postgres', "SELECT migrate.cutover('m'); SELECT migrate.rollback('m'); SELECT migrate.cancel('m'); SELECT migrate.drop('m')");

$node->stop;
done_testing();
