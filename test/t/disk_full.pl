# A full disk, and one whose writes are not kept. Data: the worker backs off with the reason in progress and events, the log
# stays short, the application's statements fail with the disk's error alone, and when there is room again it goes on by itself.
# WAL: the server crashes, recovers when there is room, and the migration goes on. Nothing acknowledged is lost.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $dir = PostgreSQL::Test::Utils::tempdir();
my $shim = "$dir/disk_faults.so";
my @compile = ('g++', '-O1', '-shared', '-fPIC', '-o', $shim, "$FindBin::RealBin/../lib/disk_faults.cpp", '-ldl');
is(system(@compile), 0, 'the faults are compiled') or BAIL_OUT("@compile");
my ($full, $sync_fails) = ("$dir/full", "$dir/sync_fails");
$ENV{DISK_FULL} = $full;
$ENV{SYNC_FAILS} = $sync_fails;

my $m = 'users_to_profiles';
my $rows = 40_000;
my $node;
{
	local $ENV{LD_PRELOAD} = $shim;
	$node = new_server('disk', preload => 1, conf => "min_wal_size = 32MB\nmax_wal_size = 1GB\nfsync = on\nautovacuum = off\nlog_checkpoints = off\n");
}

sub fill { my ($folder) = @_; append_to_file("$full.new", $folder); rename "$full.new", $full or die $!; return }
sub free { unlink $full; return }
sub log_size { return -s $node->logfile }

# A database with a migration in its backfill, at so many rows a second.
sub database
{
	my ($db, $rate) = @_;
	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql($db, 'CREATE EXTENSION migrate_ext');
	make_users($node, $rows, db => $db, references => 1);
	define_users($node, db => $db, max_rows_per_second => $rate, batch_size => 500);
	$node->safe_psql($db, "SELECT migrate.add_view('$m', view => 'profile'); SELECT migrate.start('$m')");
	poll('some rows are copied', sub { rows_copied($node, $db) > 2000 });
	return;
}

# The next event needs another page: what the worker would write down does not find room itself.
sub full_event_page
{
	my ($db) = @_;
	$node->safe_psql($db, 'ALTER TABLE migrate._event ALTER why SET STORAGE PLAIN; TRUNCATE migrate._event');
	$node->safe_psql($db, "INSERT INTO migrate._event (migration, name, owner, by, kind, why) SELECT id, name, owner, owner, 'test', repeat('x', 8000) FROM migrate._migration");
	is($node->safe_psql($db, "SELECT pg_relation_size('migrate._event')"), 8192, 'the page is full');
	return;
}

# One UPDATE after the other; gives the ids that were acknowledged, and all errors.
sub write_one_by_one
{
	my ($db, $name, $bio, @ids) = @_;
	# (From a file: a server that ends meanwhile would break the pipe.)
	my $script = "$dir/one_by_one.sql";
	unlink $script;
	append_to_file($script, join '', map { "UPDATE users SET name = '$name', bio = $bio WHERE id = $_ RETURNING 'done ' || id;\n" } @ids);
	my (undef, $out, $error) = $node->psql($db, "\\set VERBOSITY verbose\n\\i $script", on_error_stop => 0, timeout => 120);
	return ([ $out =~ /^done (\d+)$/mg ], [ $error =~ /(?:ERROR|FATAL|PANIC|server closed|connection).*/g ]);
}

# Every acknowledged write is found on both sides.
sub is_kept
{
	my ($db, $name, $ids, $what) = @_;
	my $list = join ',', @$ids, 0;
	is($node->safe_psql($db, "SELECT count(*) FROM users u JOIN user_profiles p ON p.user_id = u.id WHERE u.id IN ($list) AND u.name = '$name' AND p.display_name = '$name'"),
		scalar(@$ids), "$what: all " . @$ids . ' acknowledged writes are on both sides');
	return;
}

sub finish
{
	my ($db) = @_;
	is(error_of($node, "SELECT migrate.set('$m', 'max_rows_per_second', 'none')", db => $db), '', 'set');
	wait_phase($node, 'ready', undef, $db);
	is(differing($node, $db), 0, 'no row differs');
	is($node->safe_psql($db, 'SELECT count(*) FROM migrate.failures'), 0, 'no failure is left');
	return;
}

my $waits = "SELECT state = 'throttled' AND throttled_by LIKE 'could not write: %No space left on device (53100)' FROM migrate.progress";

subtest 'the disk of the data is full' => sub {
	database('data', 2_000);
	my $from = log_size();
	fill($node->data_dir . '/base');
	wait_for($node, 'the worker waits', $waits, 't', 'data');
	my $held = rows_copied($node, 'data');
	like($node->safe_psql('data', 'SELECT last_error FROM migrate.progress'), qr/^53100: could not extend file .*No space left on device/, 'progress has the error');
	is($node->safe_psql('data', "SELECT count(*) FROM migrate.events WHERE kind = 'throttled' AND why LIKE 'could not write: %(53100)'"), 1, 'there is an event');
	my ($acknowledged, $errors) = write_one_by_one('data', 'full', "repeat('y', 1000)", 1 .. 40);
	cmp_ok(scalar(@$errors), '>', 0, 'statements of the application fail');
	is(scalar(grep { !/53100: could not extend file/ } @$errors), 0, 'by nothing but the disk') or note(join "\n", @$errors);
	my ($shorter, $none) = write_one_by_one('data', 'short', "''", 101 .. 110);
	is(@$shorter + @$none, 10, 'writes that find room are done, others are not');
	is(error_of($node, "SELECT migrate.pause('$m'); SELECT migrate.resume('$m');", db => 'data'), '', 'pause and resume');
	wait_for($node, 'it has tried again', $waits, 't', 'data');
	free();
	poll('rows go on by themselves', sub { rows_copied($node, 'data') > $held + 1000 });

	# Again, and now not even the event finds room.
	full_event_page('data');
	fill($node->data_dir . '/base');
	wait_for($node, 'the worker waits', $waits, 't', 'data');
	wait_for($node, 'and says in pg_stat_activity what for', "SELECT count(*) = 1 FROM pg_stat_activity WHERE backend_type = 'migrate_ext worker' AND state = 'idle' AND query LIKE 'waits % s after: could not extend file%'", 't', 'data');
	pass('progress has the reason though no event can be written');
	if ($ENV{MIGRATE_LONG})
	{
		poll('a minute passes', sub { ($node->safe_psql('data', "SELECT clock_timestamp() > throttled_since + interval '60 s' FROM migrate.progress")) eq 't' });
	}
	free();
	finish('data');
	is_kept('data', 'full', $acknowledged, 'data');
	is_kept('data', 'short', $shorter, 'data');
	my $lines = () = slurp_file($node->logfile, $from) =~ /No space left on device/g;
	cmp_ok($lines - @$errors - @$none, '<=', $ENV{MIGRATE_LONG} ? 16 : 10, "the worker wrote few lines to the log, not one for each try");
};

subtest 'full while cutover runs' => sub {
	full_event_page('data');
	fill($node->data_dir . '/base');
	like(error_of($node, "SELECT migrate.cutover('$m')", db => 'data'), qr/53100: could not extend file/, 'cutover fails by the disk');
	free();
	is(phase($node, $m, 'data'), 'ready', 'nothing has changed');
	is($node->safe_psql('data', "SELECT migrate.serves('$m')"), 'source', 'the source serves');
	is($node->safe_psql('data', "SELECT count(*) FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid WHERE r.ev_class = 'profile'::regclass AND d.refobjid = 'user_profiles'::regclass"), 0, 'the view reads it');
	is($node->safe_psql('data', "SELECT count(*) FROM pg_trigger WHERE tgrelid = 'user_profiles'::regclass AND NOT tgisinternal"), 0, 'no trigger was left');
	is(error_of($node, "UPDATE users SET name = 'after it' WHERE id < 20; DELETE FROM users WHERE id = 20; INSERT INTO users (name) VALUES ('new')", db => 'data'), '', 'the application writes');
	is(differing($node, 'data'), 0, 'no row differs');
	is(error_of($node, "SELECT migrate.cutover('$m')", db => 'data'), '', 'cutover when there is room');
	full_event_page('data');
	fill($node->data_dir . '/base');
	like(error_of($node, "SELECT migrate.rollback('$m')", db => 'data'), qr/53100: could not extend file/, 'rollback fails by the disk');
	free();
	is(phase($node, $m, 'data'), 'cut_over', 'nothing has changed');
	is(error_of($node, "UPDATE profile SET display_name = 'after that' WHERE user_id < 20", db => 'data'), '', 'the application writes');
	is(error_of($node, "SELECT migrate.rollback('$m')", db => 'data'), '', 'rollback when there is room');
	is(differing($node, 'data'), 0, 'no row differs');
	$node->safe_psql('postgres', 'DROP DATABASE data WITH (FORCE)');
};

# While nothing finds room, the verb fails by the disk and leaves all as it was; when there is room, it works.
sub finds_no_room
{
	my ($db, $call, $unchanged) = @_;
	full_event_page($db);
	my $before = $node->safe_psql($db, $unchanged);
	fill($node->data_dir . '/base');
	like(error_of($node, "SELECT migrate.$call", db => $db), qr/53100: could not extend file/, "$call fails by the disk");
	free();
	is($node->safe_psql($db, $unchanged), $before, "$call: nothing has changed");
	return;
}

subtest 'full while an index is built, ranges are compared, and at the end' => sub {
	$node->safe_psql('postgres', 'CREATE DATABASE stages');
	# (The build of the index is to need a temporary file: what else there is of the backfill is not.)
	$node->safe_psql('stages', "CREATE EXTENSION migrate_ext; ALTER DATABASE stages SET maintenance_work_mem = '1MB'");
	make_users($node, $rows, db => 'stages', references => 1);
	$node->safe_psql('stages', 'CREATE INDEX wide ON user_profiles (display_name, bio, created_at)');
	define_users($node, db => 'stages');
	$node->safe_psql('stages', "SELECT migrate.add_view('$m', view => 'profile')");
	fill($node->data_dir . '/base/pgsql_tmp');
	$node->safe_psql('stages', "SELECT migrate.start('$m')");
	wait_for($node, 'the worker waits', $waits, 't', 'stages');
	like($node->safe_psql('stages', 'SELECT phase, last_error FROM migrate.progress'), qr/^backfilling\|53100: could not write to file "base\/pgsql_tmp\/.*No space left on device/, 'the index finds no room');
	my ($acknowledged, $errors) = write_one_by_one('stages', 'without index', "'bio'", 1 .. 20);
	is(@$acknowledged . ' ' . @$errors, '20 0', 'the application writes');
	# Room for the index; none for what is noted of a range that was compared.
	fill($node->data_dir . '/' . $node->safe_psql('stages', "SELECT pg_relation_filepath('migrate._validation_range')"));
	poll('the worker waits in validation', sub { (value($node, "SELECT phase FROM migrate.progress WHERE ($waits)", 'stages') // '') eq 'validating' });
	is($node->safe_psql('stages', 'SELECT count(*) FROM migrate._validation_range'), 0, 'no range is noted');
	is($node->safe_psql('stages', "SELECT indisvalid AND (SELECT bool_and(convalidated) FROM pg_constraint WHERE conrelid = 'user_profiles'::regclass) FROM pg_index WHERE indexrelid = 'wide'::regclass"), 't', 'index and foreign key are back');
	($acknowledged, $errors) = write_one_by_one('stages', 'unvalidated', "'bio'", 1 .. 20);
	is(@$acknowledged . ' ' . @$errors, '20 0', 'the application writes');
	free();
	wait_phase($node, 'ready', undef, 'stages');
	is($node->safe_psql('stages', 'SELECT verdict, source_rows, target_rows FROM migrate._validation'), "equal|$rows|$rows", 'all rows were compared');
	is_kept('stages', 'unvalidated', $acknowledged, 'stages');

	is(error_of($node, "SELECT migrate.cutover('$m')", db => 'stages'), '', 'cutover');
	finds_no_room('stages', "finalize('$m', force => '$m')", "SELECT phase, (SELECT count(*) FROM pg_trigger WHERE tgname LIKE '!migrate%') FROM migrate._migration");
	is(error_of($node, "UPDATE profile SET display_name = 'after that' WHERE user_id < 20", db => 'stages'), '', 'the application writes');
	is(differing($node, 'stages'), 0, 'no row differs');
	is(error_of($node, "SELECT migrate.finalize('$m', force => '$m'), migrate.drop('$m')", db => 'stages'), '', 'finalize when there is room');
};

subtest 'full while tables are swapped' => sub {
	$node->safe_psql('stages', <<'SQL');
CREATE TABLE account (id int PRIMARY KEY, v text);
CREATE TABLE account_big (id bigint PRIMARY KEY, v text);
INSERT INTO account SELECT i, 'v' FROM generate_series(1, 1000) i;
SELECT migrate.define('m', 'account', 'account_big', on_target_delete => 'delete'), migrate.set('m', 'cutover', 'swap'), migrate.start('m');
SQL
	wait_phase($node, 'ready', 'm', 'stages');
	my $tables = "SELECT phase, string_agg(concat_ws(' ', c.oid, relname), ', ' ORDER BY relname) FROM migrate._migration, pg_class c WHERE relname LIKE 'account%' GROUP BY phase";
	my $equal = "SELECT count(*) FROM %s a FULL JOIN %s b USING (id) WHERE a.v IS DISTINCT FROM b.v";
	for my $step ([ 'cutover', "'m'", 'account_big' ], [ 'rollback', "'m'", 'account_old' ], [ 'cutover', "'m'", 'account_big' ], [ 'finalize', "'m', drop_source => true, force => 'm'", 'account_old' ])
	{
		my ($verb, $arguments, $other) = @$step;
		finds_no_room('stages', "$verb($arguments)", $tables);
		is(error_of($node, "UPDATE account SET v = '$verb' WHERE id % 7 = 1", db => 'stages'), '', 'the application writes');
		is($node->safe_psql('stages', sprintf($equal, 'account', $other)), 0, 'no row differs');
		is(error_of($node, "SELECT migrate.$verb($arguments)", db => 'stages'), '', "$verb when there is room");
	}
	is($node->safe_psql('stages', "SELECT count(*) FILTER (WHERE v = 'finalize'), count(*), pg_typeof(min(id)) FROM account"), '143|1000|bigint', 'nothing is lost');
	$node->safe_psql('postgres', 'DROP DATABASE stages WITH (FORCE)');
};

# The server is up, started by hand where its postmaster has ended.
sub comes_back
{
	poll('the server is back', sub {
			return 1 if defined value($node, 'SELECT 1');
			system_log('pg_ctl', '-w', '-s', '-D', $node->data_dir, '-l', $node->logfile, 'start');
			return 0;
		});
	return;
}

# The server ends in a PANIC under writes; when the fault is gone it recovers, and the migration goes on.
sub crash
{
	my ($db, $begin, $end, $message) = @_;
	database($db, 4_000);
	my $from = log_size();
	my $name = "before the crash of $db";
	$begin->();
	my ($acknowledged, $errors) = write_one_by_one($db, $name, "repeat('z', 2000)", 1 .. 2000);
	# Other writes, where those did not suffice.
	poll('the server fails', sub {
			$node->psql($db, "SELECT pg_logical_emit_message(true, 'test', repeat('x', 4000000))", timeout => 30);
			return slurp_file($node->logfile, $from) =~ $message;
		});
	like(slurp_file($node->logfile, $from), $message, 'the server fails');
	$end->();
	comes_back();
	is_kept_on_source($db, $name, $acknowledged);
	is(error_of($node, "UPDATE users SET name = 'after the crash' WHERE id = 1; DELETE FROM users WHERE id = 2; INSERT INTO users (name) VALUES ('new')", db => $db), '', 'the application writes');
	finish($db);
	is_kept($db, $name, [ grep { $_ > 2 } @$acknowledged ], $db);
	is(error_of($node, "SELECT migrate.cutover('$m')", db => $db), '', 'cutover');
	$node->safe_psql('postgres', "DROP DATABASE $db WITH (FORCE)");
	return;
}

sub is_kept_on_source
{
	my ($db, $name, $ids) = @_;
	my $list = join ',', @$ids, 0;
	is($node->safe_psql($db, "SELECT count(*) FROM users WHERE id IN ($list) AND name = '$name'"), scalar(@$ids), 'no acknowledged write is lost');
	return;
}

subtest 'the disk of the WAL is full' => sub {
	crash('wal', sub { fill($node->data_dir . '/pg_wal') }, \&free, qr/PANIC:  could not write to file "pg_wal\/.*No space left on device/);
};

subtest 'the disk does not keep what is written' => sub {
	crash('sync', sub { append_to_file($sync_fails, 'x') }, sub { unlink $sync_fails }, qr/PANIC:  could not fdatasync file/);
};

$node->stop;
done_testing();
