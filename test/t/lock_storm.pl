# A hundred clients on hot rows, with impatient timeouts; VACUUM, ANALYZE, index builds, dumps, reports and an eager autovacuum
# beside them. Through every phase change and clean-up the application gets no error and no deadlock.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use IPC::Run ();
use MigrateTest;
use PostgreSQL::Test::Utils;
use Test::More;

my $rows = 5000;
my $clients = $ENV{STORM_CLIENTS} || 100;
my $node = new_server('lock_storm', conf => <<'CONF');
max_connections = 150
max_parallel_workers = 0
deadlock_timeout = '300 ms'
autovacuum_naptime = 1
autovacuum_vacuum_threshold = 20
autovacuum_vacuum_scale_factor = 0
autovacuum_analyze_threshold = 20
autovacuum_analyze_scale_factor = 0
autovacuum_vacuum_cost_delay = 0
CONF
make_users($node, $rows);
$node->safe_psql('postgres', <<'SQL');
CREATE ROLE app LOGIN;
ALTER ROLE app SET lock_timeout = '5 s';
ALTER ROLE app SET statement_timeout = '20 s';
ALTER ROLE app SET idle_in_transaction_session_timeout = '20 s';
GRANT SELECT, INSERT, UPDATE, DELETE ON users, user_profiles TO app;
GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO app;
SQL

# One line of SQL that runs again and again in its own session until it is ended.
sub again_and_again
{
	my ($name, $every, $sql) = @_;
	my $file = $node->basedir . "/$name.again";
	append_to_file($file, "$sql\n\\watch $every\n");
	my $psql = { out => '', error => '' };
	$psql->{run} = IPC::Run::start([ 'psql', '-X', '-At', '-d', $node->connstr('postgres') . " application_name=$name", '-f', $file ],
		'<', \undef, '>', \$psql->{out}, '2>', \$psql->{error});
	return $psql;
}

sub end_all
{
	$_->{run}->kill_kill for @_;
	return;
}

# What the application does. Rows are locked in the order of their keys, so that it has no deadlocks of its own; and of a row it
# writes one side only, the table or the view: where it writes both, one of two writers must fail once it is cut over.
my $script = <<"SQL";
\\set a random(1, 60)
\\set b random(1, 60)
\\set c random(1, $rows)
\\set d random(61, 100)
\\set id random(1, $rows)
\\set kind random(1, 8)
\\if :kind <= 3
WITH k AS MATERIALIZED (SELECT id FROM users WHERE id IN (:a, :b, :c) ORDER BY id FOR UPDATE) UPDATE users u SET name = 'name ' || :c FROM k WHERE u.id = k.id;
\\elif :kind = 4
BEGIN;
UPDATE users SET bio = 'bio ' || :c WHERE id = :a;
SELECT count(*) FROM PROFILE WHERE user_id = :b;
COMMIT;
\\elif :kind = 5
INSERT INTO users (name) VALUES ('new');
\\elif :kind = 6
DELETE FROM users WHERE id = :id AND id > 100;
\\elif :kind = 7
UPDATE PROFILE SET NAMED = 'seen' WHERE user_id = :d;
\\else
SELECT count(*) FROM PROFILE WHERE user_id BETWEEN :id AND :id + 10;
\\endif
SQL

sub app
{
	my ($name, $profile, $named) = @_;
	my $mine = $script =~ s/PROFILE/$profile/gr =~ s/NAMED/$named/gr =~ s/user_id/$profile eq 'users' ? 'id' : 'user_id'/gre;
	my $app = start_app($node, $name, $mine, clients => $clients, rate => 100, user => 'app');
	poll("$name is under way", sub { app_transactions($app) > 150 });
	return $app;
}

# Of the application.
sub deadlocks
{
	my $log = PostgreSQL::Test::Utils::slurp_file($node->logfile);
	return scalar(() = $log =~ /app@.*deadlock detected/g);
}

# Without the extension: what to compare with.
my ($done, $failed, $longest) = stop_app(app('control', 'users', 'name'));
is($failed, 0, 'control: no failed transactions');
is(deadlocks(), 0, 'control: no deadlocks');

sub define
{
	define_users($node, batch_size => 200, max_rows_per_second => 4000);
	# (Statements take longer than the default of 10 ms where the machine is busy with something else, too.)
	$node->safe_psql('postgres', "SELECT migrate.set('users_to_profiles', 'cutover_timeout', '2 s'), migrate.set('users_to_profiles', 'lock_timeout', '30 ms')");
	return;
}

define();
$node->safe_psql('postgres', "SELECT migrate.add_view('users_to_profiles', view => 'profile'); GRANT SELECT, UPDATE ON profile TO app");
my $app = app('storm', 'profile', 'display_name');
my @others = (
	again_and_again('vacuum', 1, 'VACUUM users, user_profiles'),
	again_and_again('analyze', 1.3, 'ANALYZE users, user_profiles'),
	again_and_again('report', 1.7, 'WITH s AS MATERIALIZED (SELECT pg_sleep(0.3)) SELECT count(*) FROM users, s'));
# Which of the oldest statements of the application wait for one of us now: for a lock that it has or, a queue, for one that it waits for itself.
my $sampler = again_and_again('sampler', 0.1, <<'SQL' =~ s/\s+/ /gr);
WITH ours AS MATERIALIZED (SELECT array_agg(pid) AS pids FROM pg_stat_activity WHERE backend_type = 'migrate_ext worker' OR application_name = 'dba')
SELECT concat_ws(' ', 'look', extract(epoch FROM clock_timestamp()),
    (SELECT string_agg(format('%s/%s', a.pid, extract(epoch FROM a.query_start)), ' ') FROM ours,
        (SELECT * FROM pg_stat_activity WHERE usename = 'app' AND wait_event_type = 'Lock' ORDER BY query_start LIMIT 10) a WHERE pg_blocking_pids(a.pid) && ours.pids))
SQL

# How many looks there were, in how many somebody waited for us, and for how long a statement was seen to at most, in ms.
sub waits_for_us
{
	my ($out) = @_;
	my ($looks, $with, $most, %since) = (0, 0, 0);
	for my $look ($out =~ /^look (.*)$/mg)
	{
		my ($now, @waiting) = split / /, $look;
		$looks++;
		$with++ if @waiting;
		%since = map { $_ => $since{$_} // $now } @waiting;
		for (values %since) { $most = $now - $_ if $now - $_ > $most }
	}
	return ($looks, $with, 1000 * $most);
}

# A verb, called until it gets through: being refused is polite.
sub verb
{
	my ($call, %option) = @_;
	my $refused = 0;
	local $ENV{PGAPPNAME} = 'dba';
	my $through = poll($call, sub {
			my $error = error_of($node, "SELECT migrate.$call");
			return 1 if $error eq '';
			$error =~ /55P03|55000: .*(gates?|dual writes are not applied|refused)/s ? $refused++ : fail("$call: $error");
			return $error !~ /55P03|55000/ });
	ok($through, $call);
	note("$call was refused $refused times") if $refused;
	return;
}

my $m = 'users_to_profiles';
verb("start('$m')");
poll('the backfill is under way', sub { rows_copied($node) > 300 });
verb("cancel('$m')");
verb("drop('$m')");
$node->safe_psql('postgres', 'TRUNCATE user_profiles');
define();
$node->safe_psql('postgres', "SELECT migrate.add_view('$m', view => 'profile')");
verb("start('$m')");
# Index work, and a dump, through the backfill.
# (These may have a deadlock with VACUUM, which is no business of ours.)
$node->psql('postgres', $_) for 'CREATE INDEX CONCURRENTLY users_name ON users (name)', 'REINDEX INDEX CONCURRENTLY users_pkey';
command_ok_quietly('pg_dump', '-f', '/dev/null', '-d', $node->connstr('postgres'));
wait_phase($node, 'ready');
verb("validate('$m')");
# A trigger is switched off and on: armed again under load. (Nobody writes meanwhile: it is done under a lock.)
$node->safe_psql('postgres', 'BEGIN; LOCK TABLE users; ALTER TABLE users DISABLE TRIGGER USER; ALTER TABLE users ENABLE TRIGGER USER; COMMIT');
verb("retry('$m')");
wait_phase($node, 'ready');

# A report and a reader that stay open, and a transaction that is prepared: cutover backs off from them, and names them.
sub stays_open
{
	my $session = background($node);
	$session->query_safe($_) for @_;
	return ($session, $session->query_safe('SELECT pg_backend_pid()'));
}
my ($report, $reports_pid) = stays_open('BEGIN ISOLATION LEVEL REPEATABLE READ', 'SELECT count(*) FROM users');
my ($reader, $readers_pid) = stays_open('BEGIN', 'SELECT count(*) FROM profile');
# (Rows that are locked the application would wait for: what is prepared writes one of its own.)
$node->safe_psql('postgres', "BEGIN; INSERT INTO users (name) VALUES ('prepared'); PREPARE TRANSACTION 'branch'");
{
	local $ENV{PGAPPNAME} = 'dba';
	my $error = error_of($node, "SELECT migrate.cutover('$m')");
	like($error, qr/ERROR:  55P03.*\bPID $reports_pid\b/s, 'cutover gives up beside a report of REPEATABLE READ, and names it');
	$report->query_safe('COMMIT');
	$error = error_of($node, "SELECT migrate.cutover('$m')");
	like($error, qr/ERROR:  55P03.*\bPID $readers_pid\b/s, 'it gives up beside an idle reader, and names him');
	like($error, qr/prepared transaction 'branch'/, 'and the prepared transaction');
}
is($node->safe_psql('postgres', "SELECT migrate.serves('$m')"), 'source', 'nothing has changed');
$reader->query_safe('COMMIT');
$_->quit for $report, $reader;
$node->safe_psql('postgres', "COMMIT PREPARED 'branch'");

verb("cutover('$m')");
verb("rollback('$m')");
verb("cutover('$m')");
my $before = app_transactions($app);
poll('writes of both sides go on', sub { app_transactions($app) > $before });
wait_for($node, 'what was recorded is applied', 'SELECT count(*) = 0 FROM migrate.failures');
verb("finalize('$m', force => '$m')");
verb("drop('$m')");
end_all(@others);
my ($storm_done, $storm_failed, $storm_longest) = stop_app($app);
$sampler->{run}->pump_nb if $sampler->{run}->pumpable;
diag($_->{error}) for grep { $_->{error} } @others, $sampler;
my ($looks, $with, $most) = waits_for_us($sampler->{out});
end_all($sampler);
cmp_ok($looks, '>', 10, 'it was watched');
note(sprintf('in %d of %d looks the application waited for us, for %d ms at most; its longest transaction took %d ms, %d ms without us',
		$with, $looks, $most, $storm_longest, $longest));
# Behind a switch that waits for its lock in the queue, they would wait for as long as it does.
cmp_ok($most, '<', 1000, 'no statement of the application waited for us for long');
is($storm_failed, 0, 'no failed transaction through every phase change');
is(deadlocks(), 0, 'no deadlock');
$node->stop;
done_testing();

sub command_ok_quietly
{
	my @command = @_;
	my $ok = IPC::Run::run(\@command, '>', \my $out, '2>', \my $error);
	ok($ok, $command[0]) or diag($error);
	return;
}
