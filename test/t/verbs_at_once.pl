# Verbs that meet: two DBAs at once, a verb that is cancelled, timed out or killed in the middle, two switches side by side, and
# application transactions that cross our locks. Each verb happens once or not at all, says which, and the application gets no
# deadlock from any of it.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use IPC::Run ();
use MigrateTest;
use Test::More;
use Time::HiRes qw(usleep);

my $seed = $ENV{MIGRATE_SEED} || int(rand(1 << 30));
srand($seed);
note("seed $seed");

# (A short deadlock_timeout, so that detectors look soon.)
my $node = new_server('verbs', conf => "autovacuum = off\nmax_parallel_workers = 0\ndeadlock_timeout = '150 ms'\n");
make_users($node, 2000);
define_users($node, batch_size => 2000);
$node->safe_psql('postgres', <<'SQL');
SELECT migrate.add_view('users_to_profiles', view => 'profile');
CREATE TABLE orders (id int PRIMARY KEY, item text);
CREATE TABLE purchases (id int PRIMARY KEY, item text);
INSERT INTO orders SELECT i, 'item ' || i FROM generate_series(1, 100) i;
SELECT migrate.define('orders', source => 'orders', target => 'purchases', on_target_delete => 'delete');
SELECT migrate.start('users_to_profiles'), migrate.start('orders');
SQL
wait_phase($node, 'ready');
wait_phase($node, 'ready', 'orders');

# A verb in a session of its own, begun and not waited for.
sub begin
{
	my ($name, $call) = @_;
	my $verb = { name => $name, out => '', error => '' };
	$verb->{run} = IPC::Run::start([ 'psql', '-X', '-At', '-v', 'VERBOSITY=verbose', '-d', $node->connstr('postgres') . " application_name=$name", '-c', $call ],
		'>', \$verb->{out}, '2>', \$verb->{error});
	return $verb;
}

sub end
{
	my ($verb) = @_;
	eval { $verb->{run}->finish };
	return $verb->{out} . $verb->{error};
}

sub wait_event
{
	my ($name, $types) = @_;
	return wait_for($node, "$name waits", "SELECT count(*) = 1 FROM pg_stat_activity WHERE application_name = '$name' AND wait_event_type IN ($types)");
}

# A report whose snapshot keeps every switch waiting.
sub report
{
	my $session = background($node);
	$session->query_safe($_) for 'BEGIN ISOLATION LEVEL REPEATABLE READ', 'SELECT count(*) FROM pg_class';
	return $session;
}

sub events
{
	my ($kind) = @_;
	return $node->safe_psql('postgres', "SELECT count(*) FROM migrate.events WHERE migration = 'users_to_profiles' AND kind = '$kind'");
}

my ($cutover, $rollback) = map { "SELECT migrate.$_('users_to_profiles')" } qw(cutover rollback);

subtest 'two DBAs cut over at once' => sub {
	my $report = report();
	my $first = begin('first', $cutover);
	wait_event('first', "'Extension', 'Timeout'");
	my $second = begin('second', $cutover);
	wait_event('second', "'Lock'");
	my $waiting = begin('waiting', "CALL migrate.wait('users_to_profiles', 'cut_over')");
	is($node->safe_psql('postgres', "SELECT phase || ' ' || migrate.serves(migration) FROM migrate.progress WHERE migration = 'users_to_profiles'"),
		'ready source', 'what goes on can be read meanwhile');
	like(error_of($node, "SET lock_timeout = '100 ms'; SELECT migrate.pause('users_to_profiles')"), qr/55P03/, 'a DBA who does not want to wait gets an error');
	$report->quit;
	like(end($first), qr/^ready -> cut_over$/m, 'the first has done it');
	like(end($second), qr/NOTICE.*the target serves already/, 'the second is told that it is done');
	like(end($waiting), qr/cut_over/, 'and wait() comes back');
	is(events('cutover'), 1, 'it happened once');
};

subtest 'rollback behind a rollback, then cutover and rollback at once' => sub {
	like($node->safe_psql('postgres', $rollback), qr/cut_over -> ready/, 'rolled back');
	my $report = report();
	my $there = begin('there', $cutover);
	wait_event('there', "'Extension', 'Timeout'");
	my $back = begin('back', $rollback);
	wait_event('back', "'Lock'");
	$report->quit;
	like(end($there), qr/^ready -> cut_over$/m, 'cutover');
	like(end($back), qr/^cut_over -> ready$/m, 'and rollback, one after the other');
	is(differing($node), 0, 'no row differs');
};

subtest 'cancel and pause during cutover' => sub {
	$node->safe_psql('postgres', "SELECT migrate.set('users_to_profiles', 'cutover_timeout', '15 s')");
	my $report = report();
	my $switch = begin('switch', $cutover);
	wait_event('switch', "'Extension', 'Timeout'");
	my $pause = begin('pause', "SELECT migrate.pause('users_to_profiles')");
	like(end($switch), qr/55P03/, 'cutover gives up');
	like(end($pause), qr/^ready -> ready, paused$/m, 'pause comes after it');
	$node->safe_psql('postgres', "SELECT migrate.resume('users_to_profiles'); SELECT migrate.set('users_to_profiles', 'cutover_timeout', '60 s')");
	$switch = begin('switch', $cutover);
	wait_event('switch', "'Extension', 'Timeout'");
	my $cancel = begin('cancel', "SELECT migrate.cancel('users_to_profiles')");
	wait_event('cancel', "'Lock'");
	$report->quit;
	like(end($switch), qr/^ready -> cut_over$/m, 'cutover');
	like(end($cancel), qr/55000.*cannot be cancelled in phase cut_over/, 'cancel comes too late, and says so');
	$node->safe_psql('postgres', $rollback);
};

subtest 'a verb behind a transaction that somebody left open says whom it waits for' => sub {
	my $session = background($node);
	$session->query_safe($_) for 'BEGIN', "SELECT migrate.set('users_to_profiles', 'sleep', '1 ms')";
	my $pid = $session->query_safe('SELECT pg_backend_pid()');
	my $verb = begin('waiting', "SELECT migrate.set('users_to_profiles', 'sleep', '0')");
	poll('it is told', sub { $verb->{run}->pump_nb; $verb->{error} =~ /NOTICE: .*"users_to_profiles" is in use, this call waits: PID $pid\n/ });
	like($verb->{error}, qr/is in use, this call waits: PID $pid\n/, 'with the PID');
	$session->query_safe('COMMIT');
	like(end($verb), qr/^1 ms -> 0/, 'and then it goes on');
	$session->quit;
};

subtest 'a worker behind such a transaction says so, too' => sub {
	$node->safe_psql('postgres', <<'SQL');
CREATE TABLE copies (id int PRIMARY KEY, item text);
SELECT migrate.define('copies', source => 'orders', target => 'copies', on_target_delete => 'delete');
SELECT migrate.set('copies', 'batch_size', '10'), migrate.set('copies', 'sleep', '1 s');
SELECT migrate.start('copies');
SQL
	wait_for($node, 'it copies', "SELECT rows_copied > 0 FROM migrate.progress WHERE migration = 'copies'");
	my $session = background($node);
	$session->query_safe($_) for 'BEGIN', "SELECT migrate.set('copies', 'sleep', '0')";
	my $pid = $session->query_safe('SELECT pg_backend_pid()');
	ok(wait_for($node, 'progress names it', "SELECT last_error LIKE '55P03: %; in the way: PID $pid' FROM migrate.progress WHERE migration = 'copies'"), 'progress names it');
	$session->query_safe('COMMIT');
	$session->quit;
	wait_phase($node, 'ready', 'copies');
	$node->safe_psql('postgres', "SELECT migrate.cancel('copies'), migrate.drop('copies')");
};

subtest 'two migrations cut over side by side' => sub {
	my $report = report();
	my @both = (begin('one', $cutover), begin('other', "SELECT migrate.cutover('orders')"));
	wait_event($_->{name}, "'Extension', 'Timeout'") for @both;
	$report->quit;
	like(end($_), qr/^ready -> cut_over$/m, "$_->{name} does not wait for the other") for @both;
	$node->safe_psql('postgres', $rollback);
};

subtest 'a session that dies leaves no lock' => sub {
	my $report = report();
	my $switch = begin('switch', $cutover);
	wait_event('switch', "'Extension', 'Timeout'");
	$node->safe_psql('postgres', "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'switch'");
	like(end($switch), qr/57P01|terminat/, 'killed');
	$report->quit;
	like($node->safe_psql('postgres', $cutover), qr/ready -> cut_over/, 'the next one just does it');
	$node->safe_psql('postgres', $rollback);
};

# A transaction that has written the table reads the view, which the switch has locked before it waits for the table.
subtest 'the application gets no deadlock from a switch' => sub {
	$node->safe_psql('postgres', "SELECT migrate.set('users_to_profiles', 'lock_timeout', '2 s')");
	my $app = background($node);
	$app->query_safe($_) for 'BEGIN', "UPDATE users SET bio = 'crossing' WHERE id = 3";
	my $switch = begin('switch', $cutover);
	# Whenever the switch is seen to wait for the table for so long that its own detector has looked already, the application asks for
	# the view. (An error ends the test: on_error_die. The view is let go of again, lest the switch gets no farther than to it.)
	my $waits = <<'SQL';
SELECT l.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid) WHERE a.application_name = 'switch' AND l.relation = 'users'::regclass AND NOT l.granted
SQL
	my $crossed = 0;
	for (1 .. 40)
	{
		next unless value($node, $waits);
		usleep(160_000);
		next unless value($node, $waits);
		$app->query_safe($_) for 'SAVEPOINT before', 'SELECT count(*) FROM profile WHERE user_id = 1', 'ROLLBACK TO before';
		$crossed++;
	}
	note("crossed $crossed times");
	$app->query_safe('COMMIT');
	$app->quit;
	like(end($switch), qr/^ready -> cut_over$/m, 'cutover when the transaction has ended');
	unlike(slurp_log(), qr/deadlock detected/, 'and no deadlock was found');
};

sub slurp_log { return PostgreSQL::Test::Utils::slurp_file($node->logfile) }

# A DBA's statement_timeout strikes anywhere: the switch has happened, with all that belongs to it, or it has not.
subtest 'timeouts in the middle of a verb' => sub {
	$node->safe_psql('postgres', "SELECT migrate.set('users_to_profiles', 'lock_timeout', '10 ms')");
	my $app = start_app($node, 'app', "\\set id random(1, 2000)\nUPDATE users SET name = 'a' || :id WHERE id = :id;\nSELECT count(*) FROM profile WHERE user_id = :id;\n", clients => 4, rate => 100);
	my ($done, $struck, $wrong) = (0, 0, 0);
	for my $round (1 .. ($ENV{MIGRATE_LONG} ? 400 : 40))
	{
		my $verb = phase($node) eq 'ready' ? 'cutover' : 'rollback';
		my $timeout = int(2**rand(11));
		my $error = error_of($node, "SET statement_timeout = $timeout; SELECT migrate.$verb('users_to_profiles')");
		$error =~ /57014|55P03/ ? $struck++ : $error eq '' ? $done++ : fail("$verb after $timeout ms: $error");
		$wrong++ unless $node->safe_psql('postgres', <<'SQL') eq 't';
SELECT (m.phase = 'cut_over') = (pg_get_viewdef('profile'::regclass) ~ 'FROM user_profiles')
    AND (SELECT count(*) FROM migrate._gaps(m.id)) = 0 AND m.phase IN ('ready', 'cut_over')
FROM migrate._migration m WHERE m.name = 'users_to_profiles'
SQL
	}
	note("$done switches done, $struck timed out");
	cmp_ok($done, '>', 0, 'some were done');
	cmp_ok($struck, '>', 0, 'some timed out');
	is($wrong, 0, 'none was half done');
	my (undef, $failed) = stop_app($app);
	is($failed, 0, 'the application has no failed statement');
	wait_for($node, 'what was recorded is applied', 'SELECT count(*) = 0 FROM migrate.failures');
	is(differing($node), 0, 'no row differs');
};

$node->stop;
done_testing();
