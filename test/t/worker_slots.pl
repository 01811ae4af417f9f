# Too few worker slots after a restart, with the launcher: the last free slot is enough, who has none says so, the log stays
# short, and the rest goes on when a slot is free. And a reload of hostile settings in the middle of the work.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $m = 'users_to_profiles';
my $node = new_server('slots', preload => 1, conf => "max_logical_replication_workers = 0\nmax_parallel_workers = 0\nmax_worker_processes = 6\n");

sub database
{
	my ($db, $rows, $rate) = @_;
	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql($db, 'CREATE EXTENSION migrate_ext');
	make_users($node, $rows, db => $db, references => 1);
	define_users($node, db => $db, max_rows_per_second => $rate, batch_size => 200);
	$node->safe_psql($db, "SELECT migrate.start('$m')");
	wait_for($node, 'some rows are copied', 'SELECT sum(rows_done) > 200 FROM migrate._range', 't', $db);
	return;
}

subtest 'reload' => sub {
	database('reloaded', 20_000, 3000);
	my $before = rows_copied($node, 'reloaded');
	my %hostile = (
		statement_timeout => '1 ms', lock_timeout => '1 ms', idle_in_transaction_session_timeout => '1 ms', default_transaction_isolation => 'serializable',
		default_transaction_read_only => 'on', search_path => 'nowhere', datestyle => 'SQL, DMY', intervalstyle => 'sql_standard', timezone => 'Asia/Kathmandu',
		extra_float_digits => '0', bytea_output => 'escape', synchronous_commit => 'off', enable_indexscan => 'off', row_security => 'off');
	$node->append_conf('postgresql.conf', "$_ = '$hostile{$_}'") for sort keys %hostile;
	my ($pid) = worker_pids($node);
	$node->reload;
	{
		local $ENV{PGOPTIONS} = '-c statement_timeout=0 -c lock_timeout=0 -c default_transaction_read_only=off -c default_transaction_isolation=read\ committed -c search_path=public';
		wait_for($node, 'the reload is seen', 'SHOW default_transaction_read_only', 'off');
		poll('rows go on', sub { rows_copied($node, 'reloaded') > $before + 2000 });
		is((worker_pids($node))[0], $pid, 'the same worker goes on');
		$node->safe_psql('reloaded', "SELECT migrate.set('$m', 'max_rows_per_second', 'none')");
		wait_phase($node, 'ready', undef, 'reloaded');
		is(differing($node, 'reloaded'), 0, 'no row differs');
		is($node->safe_psql('reloaded', 'SELECT coalesce(last_error, note) FROM migrate._pace'), '', 'no error was met');
	}
	my $conf = slurp_file($node->data_dir . '/postgresql.conf');
	$conf =~ s/^$_ = '\Q$hostile{$_}\E'\n//m for keys %hostile;
	unlink $node->data_dir . '/postgresql.conf';
	append_to_file($node->data_dir . '/postgresql.conf', $conf);
	$node->reload;
	wait_for($node, 'the settings are back', 'SHOW statement_timeout', '0');
	$node->safe_psql('postgres', 'DROP DATABASE reloaded WITH (FORCE)');
};

# Who cannot be retried needs no worker for it, which would end at once, each time.
subtest 'failures of a migration that stands still' => sub {
	my $db = 'still';
	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql($db, "CREATE EXTENSION migrate_ext; CREATE TABLE s (id int PRIMARY KEY, v int); INSERT INTO s SELECT g, g FROM generate_series(1, 100) g; CREATE TABLE t (id int PRIMARY KEY, v int CONSTRAINT positive CHECK (v > 0));"
		  . " SELECT migrate.define('still', 's', 't'); SELECT migrate.set('still', 'shadow_time', '0'); SELECT migrate.start('still')");
	wait_phase($node, 'ready', 'still', $db);
	wait_for($node, 'the worker has ended', "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'migrate_ext worker'", '0');
	$node->append_conf('postgresql.conf', 'log_min_messages = debug1');
	$node->reload;
	wait_for($node, 'the reload is seen', 'SHOW log_min_messages', 'debug1');
	my $from = -s $node->logfile;
	my $started = sub { my $n = () = slurp_file($node->logfile, $from) =~ /starting background worker process "migrate_ext worker/g; $n };
	my @stands = (paused => "SELECT migrate.pause('still')", failed => "SELECT migrate.resume('still'); UPDATE migrate._migration SET failed_since = now(), failed_reason = 'test'");
	while (my ($how, $sql) = splice @stands, 0, 2)
	{
		$node->safe_psql($db, $sql);
		wait_for($node, 'no worker is left', "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'migrate_ext worker'", '0');
		my $before = $started->();
		$node->safe_psql($db, "UPDATE s SET v = -1 WHERE id = $_") for 1 .. 10;
		$node->safe_psql($db, "UPDATE s SET v = -2 WHERE id = $_") for 1 .. 10;
		is($started->() - $before, 0, "$how: no worker is started");
		cmp_ok($node->safe_psql($db, 'SELECT count(*) FROM migrate.failures'), '>=', 10, 'the failures are recorded');
	}
	$node->safe_psql($db, "ALTER TABLE t DROP CONSTRAINT positive; SELECT migrate.retry('still')");
	wait_for($node, 'retry starts one, which mends them', 'SELECT count(*) FROM migrate.failures', '0', $db);
	is($node->safe_psql($db, 'SELECT count(*) FROM (TABLE s EXCEPT TABLE t) d'), 0, 'no row differs');
	$node->append_conf('postgresql.conf', 'log_min_messages = warning');
	$node->reload;
	$node->safe_psql('postgres', "DROP DATABASE $db WITH (FORCE)");
};

subtest 'two databases, one slot beside the launcher' => sub {
	# (Databases are looked into in the order of pg_database, mostly that of their creation.)
	database('a', 15_000, 300);
	database('b', 15_000, 300);
	# In b a second migration, which will not have a slot either.
	$node->safe_psql('b', "CREATE TABLE one (id int PRIMARY KEY); INSERT INTO one SELECT generate_series(1, 100); CREATE TABLE two (id int PRIMARY KEY); SELECT migrate.define('second', 'one', 'two', on_target_delete => 'delete');"
		  . " SELECT migrate.set('second', 'max_rows_per_second', '1'); SELECT migrate.start('second')");
	wait_for($node, 'the second is at it', "SELECT phase = 'backfilling' FROM migrate.migration WHERE name = 'second'", 't', 'b');
	my $from = -s $node->logfile;
	$node->append_conf('postgresql.conf', 'max_worker_processes = 2');
	$node->restart;
	wait_for($node, 'the worker of the first comes by itself', "SELECT string_agg(application_name, ',') = 'migrate_ext: $m' FROM pg_stat_activity WHERE backend_type = 'migrate_ext worker' AND datname = 'a'");
	is($node->safe_psql('b', "SELECT state, workers FROM migrate.progress WHERE migration = '$m'"), 'waiting|', 'the other waits for a slot');
	$node->safe_psql('a', "SELECT migrate.set('$m', 'max_rows_per_second', 'none')");
	wait_phase($node, 'ready', $m, 'a');
	is(differing($node, 'a'), 0, 'no row differs');
	wait_for($node, 'then comes that of the second', "SELECT string_agg(application_name, ',') = 'migrate_ext: $m' FROM pg_stat_activity WHERE backend_type = 'migrate_ext worker' AND datname = 'b'");
	like($node->safe_psql('b', "SELECT throttled_by FROM migrate.progress WHERE migration = 'second'"), qr/^no background worker slot is free: all 2 of max_worker_processes are in use$/, 'what has no slot says so in progress');
	$node->safe_psql('b', "SELECT migrate.set(name, 'max_rows_per_second', 'none') FROM migrate.migration");
	wait_phase($node, 'ready', $m, 'b');
	is(differing($node, 'b'), 0, 'no row differs');
	# The launcher comes again each minute; whoever waits need not.
	poll('wait goes on with the last', sub { error_of($node, "CALL migrate.wait('second', timeout => '20 s')", db => 'b') eq '' }) unless $ENV{MIGRATE_LONG};
	wait_phase($node, 'ready', 'second', 'b');
	is($node->safe_psql('b', "SELECT throttled_by IS NULL FROM migrate.progress WHERE migration = 'second'"), 't', 'and its note is gone');
	my $lines = () = slurp_file($node->logfile, $from) =~ /slot is free/g;
	cmp_ok($lines, '<=', 8, "$lines lines in the log are about slots");
};

$node->stop;
done_testing();
