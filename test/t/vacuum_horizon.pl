# A migration does not hold vacuum up: none of its phases, and none of those who wait for it, keeps a snapshot (or a
# transaction ID) longer than one batch or one range. A small hot table beside it stays small, and so do our own tables.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use IPC::Run ();
use MigrateTest;
use Test::More;

my $rows = $ENV{MIGRATE_LONG} ? 400_000 : 60_000;    # ranges of validation have 10,000
my $node = new_server('vacuum_horizon', conf => "autovacuum = off\nmax_parallel_workers = 0\n");
make_users($node, $rows, references => 1);
# The mapping takes its time, so that each phase lasts for many batches or ranges.
$node->safe_psql('postgres', <<'SQL');
CREATE FUNCTION slow(v text, id bigint) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
    IF id % 40 = 0 THEN PERFORM pg_sleep(0.005); END IF;
    RETURN v;
END $$;
SELECT migrate.define('users_to_profiles', source => 'users', target => 'user_profiles',
    mapping => $$ id AS user_id, slow(name, id) AS display_name, coalesce(bio, '') AS bio, created_at $$,
    reverse => $$ user_id AS id, display_name AS name, bio, created_at $$, on_target_delete => 'delete');
SELECT migrate.set('users_to_profiles', 'batch_size', '100'), migrate.set('users_to_profiles', 'batch_time', '10 ms'), migrate.set('users_to_profiles', 'max_rows_per_second', '400'), migrate.set('users_to_profiles', 'shadow_rate', '0.05'), migrate.set('users_to_profiles', 'shadow_time', '20 s');
CREATE INDEX profile_name ON user_profiles (display_name);
CREATE TABLE hot (id int PRIMARY KEY, n int NOT NULL);
INSERT INTO hot SELECT i, 0 FROM generate_series(1, 20) i;
SQL

my $app = start_app($node, 'hot', "\\set id random(1, 20)\nUPDATE hot SET n = n + 1 WHERE id = :id;\n", clients => 2, rate => 600);
poll('the hot table is updated', sub { app_transactions($app) > 100 });

# Ours: workers, and sessions called dba. Whoever has a snapshot or a transaction ID now is to begin another transaction. (The age of
# its xmin would tell nothing while a transaction of the application's is open.)
sub passed
{
	my ($what) = @_;
	my $now = $node->safe_psql('postgres', 'SELECT clock_timestamp()');
	return wait_for($node, "$what gives up its snapshot", <<"SQL");
SELECT count(*) = 0 FROM pg_stat_activity WHERE (backend_type = 'migrate_ext worker' OR application_name = 'dba')
    AND (backend_xmin IS NOT NULL OR backend_xid IS NOT NULL) AND xact_start <= '$now'
SQL
}

# While $going is true, those of us who are there give up their snapshots, again and again. $least: so often at least.
sub moves_on
{
	my ($what, $going, $least) = @_;
	my $times = 0;
	while ((value($node, $going) // '') eq 't')
	{
		passed($what);
		$times++ if (value($node, $going) // '') eq 't';
		last if $times >= 4;
	}
	cmp_ok($times, '>=', $least, "$what: snapshots are given up while it goes on");
	return;
}

sub in_phase { return "SELECT phase = '$_[0]' AND failed_since IS NULL FROM migrate._migration" }

# What vacuum leaves of the hot table, in pages, at the worst of a few looks. (A page has room for some 200 versions of a row.)
sub hot_pages
{
	my $worst = 0;
	$node->safe_psql('postgres', 'VACUUM FULL hot');    # what it has grown to before, while nobody vacuumed, counts for nothing
	for (1 .. 3)
	{
		my $before = app_transactions($app);
		poll('the hot table is updated', sub { app_transactions($app) > $before + 1000 });
		$node->safe_psql('postgres', 'VACUUM (TRUNCATE off) hot');
		my $pages = $node->safe_psql('postgres', "SELECT pg_relation_size('hot') / 8192");
		$worst = $pages if $pages > $worst;
	}
	return $worst;
}

my $control = hot_pages();

# (Where the machine is busy with something else a batch may last, so there is more than one look.)
sub stays_small
{
	my $pages;
	for (1 .. 4)
	{
		$pages = hot_pages();
		last if $pages <= 3 * $control + 6;
	}
	cmp_ok($pages, '<=', 3 * $control + 6, "the hot table has not grown ($control pages before)");
	return;
}

# CALL wait() is there all the time.
my ($shown, $waited) = ('', '');
my $waiting = IPC::Run::start([ 'psql', '-X', '-At', '-d', $node->connstr('postgres') . ' application_name=dba', '-c', "CALL migrate.wait('users_to_profiles')" ],
	'>', \$shown, '2>', \$waited) if $node->safe_psql('postgres', "SELECT migrate.start('users_to_profiles')");
wait_for($node, 'backfilling', in_phase('backfilling'));
moves_on('backfill', "SELECT rows_done < $rows - 10000 AND phase = 'backfilling' FROM migrate._migration, migrate._range", 3);
is($node->safe_psql('postgres', <<'SQL'), '', 'our own tables stay small');
SELECT string_agg(format('%s: %s pages', oid::regclass, pg_relation_size(oid) / 8192), ', ') FROM pg_class
WHERE relnamespace = 'migrate'::regnamespace AND relkind = 'r' AND pg_relation_size(oid) > 12 * 8192
SQL
note($node->safe_psql('postgres', "SELECT count(*) || ' events' FROM migrate._event"), ', ', $node->safe_psql('postgres', "SELECT n_tup_upd || ' updates of the range' FROM pg_stat_user_tables WHERE relid = 'migrate._range'::regclass"));
stays_small();

# Enough of small batches. Rows of the application's that stay locked: the backfill ends with them.
my $holder = background($node);
# (Written, though nothing that is mapped changes: a batch that locks no row copies one that is merely locked.)
$holder->query_safe($_) for 'BEGIN', "UPDATE users SET name = name WHERE id > $rows - 200";
$node->safe_psql('postgres', "SELECT migrate.set('users_to_profiles', 'max_rows_per_second', 'none')");
wait_for($node, 'the rows that are locked are waited for', "SELECT throttled_by LIKE 'waiting for 200 locked rows%' FROM migrate.progress")
  or diag($node->safe_psql('postgres', 'SELECT * FROM migrate.progress'));

# It looks at them again and again, and leaves no dead rows: nobody could vacuum them before the lock's holder ends.
sub requeue { return split /\|/, $node->safe_psql('postgres', "SELECT seq_scan + coalesce(idx_scan, 0), n_tup_ins + n_tup_upd + n_tup_del FROM pg_stat_user_tables WHERE relid = 'migrate._requeue'::regclass") }
poll('what it wrote is known', sub { (requeue())[1] >= 200 });
my ($looks, $written) = requeue();
moves_on('the wait for locked rows', in_phase('backfilling'), 3);
poll('it looks again', sub { (requeue())[0] > $looks + 20 });
is((requeue())[1], $written, 'rows that stay locked are not written again');
# The index and the foreign key come back. Each scan of CREATE INDEX CONCURRENTLY (there are two) and of VALIDATE CONSTRAINT needs a snapshot
# for as long as it takes, as if somebody had typed it. But none is held while it waits: for a report that is older, …
my $report = background($node);
my $reports_pid = $report->query_safe('SELECT pg_backend_pid()');
$report->query_safe($_) for 'BEGIN ISOLATION LEVEL REPEATABLE READ', 'SELECT count(*) FROM pg_class';
$holder->query_safe('COMMIT');
wait_for($node, 'the index waits for the report', "SELECT count(*) = 1 FROM pg_stat_progress_create_index WHERE current_locker_pid = $reports_pid");
passed('an index that waits for a report');
is($node->safe_psql('postgres', "SELECT count(*) FROM pg_stat_progress_create_index WHERE current_locker_pid = $reports_pid"), 1, 'it waits still');
# … nor for a lock.
$holder->query_safe($_) for 'BEGIN', 'LOCK TABLE users IN EXCLUSIVE MODE';
$report->query_safe('COMMIT');
$report->quit;
wait_for($node, 'the foreign key waits for a lock', "SELECT throttled_by LIKE 'adding foreign key % in the way: PID %' FROM migrate.progress");
passed('a foreign key that waits for a lock') for 1 .. 2;
$holder->query_safe('COMMIT');
$holder->quit;

wait_for($node, 'validating', in_phase('validating'));
is($node->safe_psql('postgres', "SELECT indisvalid AND (SELECT bool_and(convalidated) FROM pg_constraint WHERE conrelid = 'user_profiles'::regclass) FROM pg_index WHERE indexrelid = 'profile_name'::regclass"), 't', 'index and foreign key are back');
moves_on('validation', in_phase('validating'), 2);
wait_for($node, 'shadowing', in_phase('shadowing'));
moves_on('shadow reads', in_phase('shadowing'), 2);
wait_phase($node, 'ready');
$waiting->finish;
like($waited, qr/ready/, 'wait() came to its end');
stays_small();
# A validation that takes long holds up no other verb.
my $dba = background($node);
$dba->query_safe($_) for 'BEGIN', "SELECT verdict FROM migrate.validate('users_to_profiles', 'counts')";
is(error_of($node, "SET lock_timeout = '10 s'; SELECT migrate.pause('users_to_profiles')"), '', 'pause beside a validation under way');
$dba->query_safe('COMMIT');
$dba->quit;
# After the cutover, while it is watched.
$node->safe_psql('postgres', "SELECT migrate.resume('users_to_profiles'), migrate.set('users_to_profiles', 'watch_time', '1 hour'), migrate.cutover('users_to_profiles')");
my $looked = "SELECT count(*) = 1 FROM migrate._watch WHERE looked_at";
wait_for($node, 'the first look', "$looked IS NOT NULL");
moves_on('the watch', in_phase('cut_over'), 3);
my $last = $node->safe_psql('postgres', 'SELECT looked_at FROM migrate._watch');
stays_small();
wait_for($node, 'it has looked meanwhile', "$looked > '$last'");

my (undef, $failed) = stop_app($app);
is($failed, 0, 'failed transactions');
is(differing($node), 0, 'no row differs');
$node->stop;
done_testing();
