# A streaming replica: the backfill waits while it lags, says why, and goes on; a synchronous one that hangs holds up nobody who
# does not wait for it anyway; on the replica one can look, and what one sees is never half of a switch; after a promotion in
# the middle of the backfill the launcher carries the migration on there.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use PostgreSQL::Test::Cluster;
use Test::More;

my $rows = 60_000;
my $m = 'users_to_profiles';
my $primary = new_server('primary', streaming => 1, preload => 1);
make_users($primary, $rows, references => 1);
$primary->backup('base');
my $replica = PostgreSQL::Test::Cluster->new('replica');
$replica->init_from_backup($primary, 'base', has_streaming => 1);
$replica->start;
wait_for($primary, 'the replica streams', "SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'");

my $stopped;    # the PID of a process that is held still
sub hold { $stopped = shift; kill 'STOP', $stopped; return }
sub release { kill 'CONT', $stopped if $stopped; undef $stopped; return }
END { release() }

# A throttle by the replica's lag, with value and limit.
sub is_throttled
{
	my ($limit) = @_;
	my $reason = '';
	poll('throttled', sub { $reason = value($primary, 'SELECT throttled_by FROM migrate.progress') // ''; $reason =~ /replica lag/ });
	like($reason, qr/^replica lag \d+ ms > $limit ms \(replica\)$/, 'progress has the reason, the value and the limit');
	return;
}

define_users($primary, max_rows_per_second => 500, batch_size => 200, max_replica_lag => '500 ms');
$primary->safe_psql('postgres', "SELECT migrate.add_view('$m', view => 'profile'); SELECT migrate.start('$m')");
poll('some rows are copied', sub { rows_copied($primary) > 1000 });

subtest 'lag' => sub {
	$replica->safe_psql('postgres', 'SELECT pg_wal_replay_pause()');
	is_throttled(500);
	my $held = rows_copied($primary);
	poll('time passes', sub { value($primary, 'SELECT clock_timestamp() - throttled_since > interval \'1 s\' FROM migrate._migration') eq 't' });
	cmp_ok(rows_copied($primary) - $held, '<=', 1000, 'the backfill waits');
	$replica->safe_psql('postgres', 'SELECT pg_wal_replay_resume()');
	poll('rows go on', sub { rows_copied($primary) > $held + 2000 });
	pass('the backfill goes on when the replica has caught up');
};

# Without us, sessions that do not wait for the replica are not held up by it.
my $local_writes = <<'SQL';
SET synchronous_commit = local;
SET lock_timeout = '10 s';
UPDATE users SET name = name || '.' WHERE id <= (SELECT max((checkpoint)[1]::bigint) + 20000 FROM migrate._range);
SQL
my $sync_wanted = "SELECT severity FROM migrate.preflight('$m') WHERE \"check\" = 'synchronous_replicas'";

subtest 'a synchronous replica that hangs' => sub {
	$primary->safe_psql('postgres', "ALTER SYSTEM SET synchronous_standby_names = '*'");
	$primary->safe_psql('postgres', 'SELECT pg_reload_conf()');
	wait_for($primary, 'the replica is synchronous', "SELECT sync_state = 'sync' FROM pg_stat_replication");
	my $before = rows_copied($primary);
	poll('rows go on', sub { rows_copied($primary) > $before + 1000 });
	wait_for($primary, 'it answers', $sync_wanted, 'info');
	hold($replica->safe_psql('postgres', "SELECT pid FROM pg_stat_activity WHERE backend_type = 'walreceiver'"));
	is_throttled(500);
	is(error_of($primary, $local_writes), '', 'a session that does not wait for the replica does not wait for us');
	wait_for($primary, 'preflight sees it', $sync_wanted, 'error');
	pass('preflight: start and cutover would hold their locks while they wait for the replica');
	my $held = rows_copied($primary);
	release();
	poll('rows go on', sub { rows_copied($primary) > $held + 1000 });
	pass('the backfill goes on when the replica answers');
};

subtest 'on the replica' => sub {
	is(scalar(worker_pids($replica)), 0, 'no worker runs there');
	$primary->wait_for_catchup($replica);
	is($replica->safe_psql('postgres', 'SELECT phase, state FROM migrate.progress'), 'backfilling|waiting', 'progress can be read');
	is($replica->safe_psql('postgres', 'SELECT phase, serves FROM migrate.migration'), 'backfilling|source', 'migration can be read');
	cmp_ok($replica->safe_psql('postgres', 'SELECT count(*) FROM migrate.events'), '>', 3, 'events can be read');
	is($replica->safe_psql('postgres', 'SELECT count(*) FROM migrate.failures'), 0, 'failures can be read');
	is($replica->safe_psql('postgres', "SELECT migrate.serves('$m')"), 'source', 'serves');
	cmp_ok($replica->safe_psql('postgres', "SELECT count(*) FROM migrate.get('$m')"), '>', 10, 'get');
	like($replica->safe_psql('postgres', "SELECT migrate.plan('$m')"), qr/rollback/, 'plan');
	like($replica->safe_psql('postgres', "SELECT severity FROM migrate.preflight('$m') WHERE \"check\" = 'recovery'"), qr/error/, 'preflight says that it is a replica');
	is($replica->safe_psql('postgres', "SELECT count(*) FROM migrate.mismatches('$m')"), 0, 'mismatches');
	# Every verb that would change something, by its own name.
	my @verbs = split /\n/, $replica->safe_psql('postgres', <<'SQL');
SELECT format('%I(%s)', p.proname, concat_ws(', ', CASE WHEN p.proname = 'allow' THEN quote_literal(current_user) ELSE quote_literal('users_to_profiles') END,
    CASE p.proname WHEN 'define' THEN '''users'', ''user_profiles''' WHEN 'add_flow' THEN '''users'', ''user_profiles''' WHEN 'add_view' THEN '''v'''
                   WHEN 'set' THEN '''workers'', ''2''' WHEN 'throttle' THEN 'ratio => 0.5' WHEN 'shadow' THEN '0.1' END))
FROM pg_proc p WHERE p.pronamespace = 'migrate'::regnamespace AND p.prosrc = 'migrate_verb' AND p.provolatile = 'v' ORDER BY 1
SQL
	cmp_ok(scalar(@verbs), '>=', 18, scalar(@verbs) . ' verbs');
	for my $verb (@verbs)
	{
		my ($name) = $verb =~ /^(\w+)/;
		like(error_of($replica, "SELECT migrate.$verb"), qr/ERROR:  25006: cannot execute migrate\.$name\(\) during recovery.*HINT:  Run it on the primary/s, "$name is refused");
	}
	# wait looks on; it registers no worker, which would keep its slot until the promotion.
	like(error_of($replica, "CALL migrate.wait('$m', timeout => '1 s')"), qr/did not reach phase ready within 1 s/, 'wait waits');
};

subtest 'promotion in the middle of the backfill' => sub {
	my $before = rows_copied($primary);
	$primary->wait_for_catchup($replica);
	$primary->stop('immediate');    # and is never started again: two primaries are beyond what any extension can mend
	cmp_ok(rows_copied($replica), '>=', $before, 'the checkpoint is on the replica');
	cmp_ok(rows_copied($replica), '<', $rows, 'the backfill is in its middle');
	$replica->promote;
	wait_for($replica, 'one worker comes by itself', "SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name = 'migrate_ext: $m'");
	$replica->safe_psql('postgres', "ALTER SYSTEM SET synchronous_standby_names = ''");
	$replica->safe_psql('postgres', 'SELECT pg_reload_conf()');
	$replica->safe_psql('postgres', "SELECT migrate.set('$m', 'max_rows_per_second', 'none')");
	wait_phase($replica, 'ready');
	cmp_ok(rows_copied($replica), '>=', $before, 'no checkpoint is lost');
	is(differing($replica), 0, 'no row differs on the promoted server');
};

subtest 'cutover and rollback as a replica sees them' => sub {
	$replica->backup('second');
	my $second = PostgreSQL::Test::Cluster->new('second');
	$second->init_from_backup($replica, 'second', has_streaming => 1);
	# Rows that the application deletes are pruned, which may cancel a query on any replica; here only a switch could.
	$second->append_conf('postgresql.conf', "hot_standby_feedback = on\nmax_standby_streaming_delay = -1\n");
	$second->start;
	wait_for($replica, 'the second replica streams', "SELECT count(*) = 1 FROM pg_stat_replication WHERE state = 'streaming'");
	# The number of rows stays, whatever is written; on the replica each query sees one state of all of it, or divides by zero.
	my $app = start_app($replica, 'app', <<"SQL", clients => 2, rate => 100);
\\set r random(1, 1000)
WITH gone AS (DELETE FROM users WHERE id = (SELECT id FROM users ORDER BY id OFFSET :r LIMIT 1 FOR UPDATE SKIP LOCKED) RETURNING id)
INSERT INTO users (name) SELECT 'instead of ' || id FROM gone;
SQL
	my $reader = start_app($second, 'reader', <<'SQL', clients => 2, rate => 50);
SELECT 1 / (count(*) = (SELECT count(*) FROM user_profiles) AND count(*) = (SELECT count(*) FROM profile))::int FROM users;
BEGIN ISOLATION LEVEL REPEATABLE READ;
SELECT count(*) AS before FROM profile \gset
SELECT (phase = 'cut_over')::int AS cut_over, (serves = 'target')::int AS target FROM migrate.migration \gset
SELECT 1 / (:cut_over = :target AND :before = count(*))::int FROM users;
END;
SQL
	poll('they work', sub { app_transactions($app) > 100 && app_transactions($reader) > 20 });
	for my $round (1 .. 2)
	{
		is(error_of($replica, "SELECT migrate.cutover('$m')"), '', "cutover $round");
		$replica->wait_for_catchup($second);
		is($second->safe_psql('postgres', "SELECT migrate.serves('$m')"), 'target', 'seen there');
		is(error_of($replica, "SELECT migrate.rollback('$m')"), '', "rollback $round");
		$replica->wait_for_catchup($second);
		is($second->safe_psql('postgres', "SELECT migrate.serves('$m')"), 'source', 'seen there');
	}
	is((stop_app($reader))[1], 0, 'failed transactions of readers on the replica');
	is((stop_app($app))[1], 0, 'failed transactions of the application');
	is($second->safe_psql('postgres', 'SELECT sum(confl_tablespace + confl_lock + confl_snapshot + confl_bufferpin + confl_deadlock) FROM pg_stat_database_conflicts'), 0, 'no query was cancelled there');
	$second->stop;
};

$replica->stop;
done_testing();
