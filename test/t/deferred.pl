# Indexes and foreign keys set aside for the copy, under load: no statement of the application fails, and all comes back exactly
# as it was, whatever happens while an index is built: the worker is killed, paused, cancelled, the database dumped or dropped.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use Test::More;

my $rows = 20_000;
my $node = new_server('deferred');
my $m = 'users_to_profiles';

# All that can be said of the target's indexes and foreign keys.
my $looks = <<'SQL';
SELECT string_agg(x, E'\n' ORDER BY x) FROM (
    SELECT concat_ws(' | ', pg_get_indexdef(i.indexrelid), i.indisvalid, obj_description(i.indexrelid, 'pg_class'),
        (SELECT string_agg(coalesce(nullif(attstattarget, -1), 0)::text, ',' ORDER BY attnum) FROM pg_attribute WHERE attrelid = i.indexrelid),
        (SELECT spcname FROM pg_class c JOIN pg_tablespace t ON t.oid = c.reltablespace WHERE c.oid = i.indexrelid)) AS x
    FROM pg_index i WHERE indrelid = 'user_profiles'::regclass
    UNION ALL
    SELECT concat_ws(' | ', conname, pg_get_constraintdef(oid), convalidated, obj_description(oid, 'pg_constraint'))
    FROM pg_constraint WHERE conrelid = 'user_profiles'::regclass AND contype = 'f') y
SQL
my $before;

sub tables
{
	my ($db) = @_;
	make_users($node, $rows, db => $db, references => 1);
	$node->safe_psql($db, <<'SQL');
CREATE INDEX profile_name ON user_profiles (lower(display_name) text_pattern_ops) WITH (fillfactor = 80) TABLESPACE elsewhere WHERE bio <> 'x';
ALTER INDEX profile_name ALTER COLUMN 1 SET STATISTICS 200;
COMMENT ON INDEX profile_name IS 'found by name';
CREATE INDEX profile_made ON user_profiles USING brin (created_at);
COMMENT ON CONSTRAINT user_profiles_user_id_fkey ON user_profiles IS 'a profile is of a user';
SQL
	$before = $node->safe_psql($db, $looks);
	return;
}

sub all_is_back
{
	my ($db, $what) = @_;
	is($node->safe_psql($db, $looks), $before, "$what: indexes and foreign keys are as they were");
	is($node->safe_psql($db, "SELECT count(*) FROM migrate._deferred WHERE state <> 'restored'"), 0, "$what: nothing is aside");
	return;
}

# An old snapshot, for which CREATE INDEX CONCURRENTLY waits.
sub old_snapshot
{
	my ($db) = @_;
	my $session = background($node, db => $db);
	my $pid = $session->query_safe('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT pg_backend_pid();');
	$session->query_safe('SELECT count(*) FROM pg_class');
	return ($session, $pid);
}

# Starts, and comes back while the first index waits for the old snapshot.
sub start_until_it_waits
{
	my ($db, $pid) = @_;
	$node->safe_psql($db, "SELECT migrate.start('$m')");
	wait_for($node, 'an index is being built', "SELECT count(*) > 0 FROM pg_stat_progress_create_index WHERE current_locker_pid = $pid", 't', $db);
	is($node->safe_psql($db, "SELECT count(*) FROM pg_index WHERE indrelid = 'user_profiles'::regclass AND NOT indisvalid"), 1, 'an index is there, and invalid');
	like($node->safe_psql($db, 'SELECT state, throttled_by FROM migrate.progress'), qr/^running\|building index profile_name \(1 of 3\): waiting for .* for PID $pid$/, 'progress says what it does and for whom it waits');
	return;
}

my $tablespace = $node->basedir . '/elsewhere';
mkdir $tablespace;
$node->safe_psql('postgres', "CREATE TABLESPACE elsewhere LOCATION '$tablespace'");
tables('postgres');

subtest 'the worker is killed while an index is built' => sub {
	define_users($node);
	my ($session, $pid) = old_snapshot('postgres');
	start_until_it_waits('postgres', $pid);
	is($node->safe_psql('postgres', "SELECT count(*) FROM pg_constraint WHERE conrelid = 'user_profiles'::regclass AND contype = 'f'"), 0, 'the foreign key is aside');
	my ($worker) = worker_pids($node);
	kill 'KILL', $worker;
	poll('the server is back', sub { my $up = value($node, "SELECT count(*) FROM pg_stat_activity WHERE pid = $worker"); defined $up && $up eq '0' });
	eval { $session->{run}->finish };
	is($node->safe_psql('postgres', "SELECT count(*) FROM pg_index WHERE indrelid = 'user_profiles'::regclass AND NOT indisvalid"), 1, 'an invalid index is left');
	is(error_of($node, "INSERT INTO users (name) VALUES ('later'); DELETE FROM users WHERE id = 7"), '', 'the application writes');
	is(error_of($node, "CALL migrate.wait('$m', timeout => '120 s')"), '', 'wait goes on to ready');
	all_is_back('postgres', 'after a kill');
	is(differing($node), 0, 'no row differs');
	like($node->safe_psql('postgres', "SELECT string_agg(why, ', ' ORDER BY id) FROM migrate.events WHERE kind = 'restored'"), qr/profile_name.*profile_made.*user_profiles_user_id_fkey/, 'the events tell');
	$node->safe_psql('postgres', "SELECT migrate.cancel('$m'); SELECT migrate.drop('$m')");
	all_is_back('postgres', 'cancelled when ready');
	is($node->safe_psql('postgres', 'SELECT count(*) FROM user_profiles'), 0, 'the target is empty, as before start');
	is(error_of($node, 'DELETE FROM users WHERE id = 8'), '', 'the application deletes from the source');
};

my $app = start_app($node, 'app', writing_users("random(1, $rows)"), clients => 3);

sub let_work
{
	my $goal = app_transactions($app) + 200;
	poll('the application works', sub { app_transactions($app) >= $goal });
	return;
}

subtest 'pause, resume and cancel while an index is built, under load' => sub {
	define_users($node);
	my ($session, $pid) = old_snapshot('postgres');
	start_until_it_waits('postgres', $pid);
	let_work();
	is(error_of($node, "SET statement_timeout = '20 s'; SELECT migrate.pause('$m')"), '', 'pause does not wait for the index');
	wait_for($node, 'the worker has stopped', "SELECT count(*) = 0 FROM pg_stat_activity WHERE backend_type = 'migrate_ext worker'");
	let_work();
	$node->safe_psql('postgres', "SELECT migrate.resume('$m')");
	wait_for($node, 'it is being built again', "SELECT count(*) > 0 FROM pg_stat_progress_create_index WHERE current_locker_pid = $pid");
	is(error_of($node, "SET statement_timeout = '20 s'; SELECT migrate.cancel('$m')"), '', 'cancel does not wait for the index');
	$session->quit;
	wait_for($node, 'all is back', 'SELECT count(*) = 0 FROM migrate._still_deferred((SELECT id FROM migrate._migration))');
	all_is_back('postgres', 'cancelled while an index was built');
	is($node->safe_psql('postgres', 'SELECT count(*) FROM user_profiles'), 0, 'the target is empty');
	let_work();
	$node->safe_psql('postgres', "SELECT migrate.drop('$m')");
};

subtest 'wait in a transaction block, for which the index waits' => sub {
	define_users($node);
	my $session = $node->background_psql('postgres', on_error_stop => 0);
	my $pid = $session->query('BEGIN; DECLARE c CURSOR FOR SELECT 1; SELECT pg_backend_pid();');
	start_until_it_waits('postgres', $pid);
	$session->query("CALL migrate.wait('$m', timeout => '60 s');");
	like($session->{stderr}, qr/waits until this transaction ends.*CALL migrate\.wait\('$m'\); outside of a transaction block/s, 'it says so');
	$session->quit;
	is(error_of($node, "CALL migrate.wait('$m', timeout => '170 s')"), '', 'ready');
	$node->safe_psql('postgres', "SELECT migrate.cancel('$m'); SELECT migrate.drop('$m')");
};

subtest 'the whole way under load' => sub {
	define_users($node);
	$node->safe_psql('postgres', "SELECT migrate.start('$m')");
	is(error_of($node, "CALL migrate.wait('$m', timeout => '170 s')"), '', 'ready');
	all_is_back('postgres', 'ready');
	is(differing($node), 0, 'no row differs');
	let_work();
	is($node->safe_psql('postgres', 'SELECT count(*) FROM migrate._failure'), 0, 'no dual write failed');
	is(error_of($node, "SELECT migrate.cancel('$m')"), '', 'cancel');
	all_is_back('postgres', 'cancelled');
	is($node->safe_psql('postgres', 'SELECT count(*) FROM user_profiles'), 0, 'no row is left in the way of the application');
	let_work();
	$node->safe_psql('postgres', "SELECT migrate.drop('$m')");
};

subtest 'a long reader of the source keeps its foreign key, and nobody from starting' => sub {
	define_users($node);
	my $reader = background($node);
	$reader->query_safe('BEGIN; SELECT count(*) FROM users WHERE id < 10;');
	is(error_of($node, "SELECT migrate.start('$m')"), '', 'start');
	is($node->safe_psql('postgres', "SELECT string_agg(name, ',') FROM migrate._deferred WHERE kind = 'foreign_key'"), '', 'the foreign key stays');
	like($node->safe_psql('postgres', "SELECT why FROM migrate.events WHERE kind = 'not set aside'"), qr/^the foreign keys of the target: .*PID \d+ .* holds ACCESS SHARE on (public\.)?users/s, 'an event says so, and who was in the way');
	is($node->safe_psql('postgres', 'SELECT count(*) FROM migrate._deferred'), 2, 'the indexes are set aside');
	$reader->query_safe('COMMIT');
	$reader->quit;
	is(error_of($node, "CALL migrate.wait('$m', timeout => '170 s')"), '', 'ready');
	all_is_back('postgres', 'beside a reader');
	is(differing($node), 0, 'no row differs');
};

my ($done, $failed, $longest) = stop_app($app);
cmp_ok($done, '>', 1000, 'transactions of the application');
is($failed, 0, 'failed transactions of the application');
note("longest transaction $longest ms");

subtest 'a dump from the middle' => sub {
	$node->safe_psql('postgres', "CREATE DATABASE middle");
	$node->safe_psql('middle', 'CREATE EXTENSION migrate_ext');
	tables('middle');
	define_users($node, db => 'middle', batch_size => 100, max_rows_per_second => 300);
	$node->safe_psql('middle', "SELECT migrate.start('$m')");
	wait_for($node, 'a worker is at work', 'SELECT sum(rows_done) > 100 FROM migrate._range', 't', 'middle');
	my $file = $node->basedir . '/middle.dump';
	$node->command_ok([ 'pg_dump', '-Fc', '-f', $file, '-d', 'middle' ], 'pg_dump');
	$node->safe_psql('postgres', 'CREATE DATABASE copied');
	$node->command_ok([ 'pg_restore', '--exit-on-error', '-j', '2', '-d', 'copied', $file ], 'pg_restore');
	is($node->safe_psql('copied', "SELECT count(*) FROM pg_index WHERE indrelid = 'user_profiles'::regclass"), 1, 'the copy has not the indexes');
	$node->safe_psql('copied', "SELECT migrate.set('$m', 'max_rows_per_second', 'none'); SELECT migrate.resume('$m')");
	is(error_of($node, "CALL migrate.wait('$m', timeout => '170 s')", db => 'copied'), '', 'the copy gets ready');
	all_is_back('copied', 'in the copy');
	is(differing($node, 'copied'), 0, 'no row differs');
	$node->safe_psql('postgres', 'DROP DATABASE copied WITH (FORCE)');
};

subtest 'DROP DATABASE while an index waits' => sub {
	my ($session, $pid) = old_snapshot('middle');
	$node->safe_psql('middle', "SELECT migrate.set('$m', 'max_rows_per_second', 'none')");
	start_until_it_waits('middle', $pid);
	is(error_of($node, 'DROP DATABASE middle WITH (FORCE)'), '', 'DROP DATABASE WITH (FORCE)');
	eval { $session->{run}->finish };
	wait_for($node, 'the worker is gone', "SELECT count(*) = 0 FROM pg_stat_activity WHERE datname = 'middle'");
};

$node->stop;
done_testing();
