# Option cancel_blockers: a switch that has waited long enough for somebody ends what he does, having named him first; only where it is
# set, only what its caller may end, and never in a rehearsal.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use IPC::Run ();
use MigrateTest;
use Test::More;

my $node = new_server('cancel_blockers', conf => 'autovacuum = off');
my $m = 'users_to_profiles';
$node->safe_psql('postgres', 'CREATE ROLE dba LOGIN; CREATE ROLE app LOGIN; GRANT CREATE ON SCHEMA public TO dba');
$node->safe_psql('postgres', "SELECT migrate.allow('dba')");
make_users($node, 1000);
$node->safe_psql('postgres', "ALTER TABLE users OWNER TO dba; ALTER TABLE user_profiles OWNER TO dba; GRANT ALL ON users, user_profiles TO app");
define_users($node, cutover_timeout => '3 s');
$node->safe_psql('postgres', "SELECT migrate.add_view('$m', 'profile'), migrate.start('$m')");
wait_phase($node, 'ready');

# A transaction that has executed the statements and stays open; gives session and PID.
sub holder
{
	my ($user, @statements) = @_;
	my $session = background($node, user => $user);
	$session->query_safe($_) for 'BEGIN', @statements;
	return ($session, $session->query_safe('SELECT pg_backend_pid()'));
}

# What psql says of the call, notices and all.
sub said
{
	my ($call, $user) = @_;
	my ($status, $out, $error) = $node->psql('postgres', "SELECT migrate.$call", extra_params => [ '-U', $user // 'postgres' ], timeout => 120);
	return ($status == 0 ? "$out\n" : '') . $error;
}

sub is_there { my ($pid) = @_; return $node->safe_psql('postgres', "SELECT count(*) FROM pg_stat_activity WHERE pid = $pid AND xact_start IS NOT NULL") }
sub serves { return $node->safe_psql('postgres', "SELECT migrate.serves('$m')") }

my ($idle, $pid) = holder('app', 'SELECT count(*) FROM profile');
like(said("cutover('$m')"), qr/could not cut over within.*\n.*\n.*PID $pid /, 'by default nobody is ended');
is(is_there($pid), 1, 'his transaction goes on');

$node->safe_psql('postgres', "SELECT migrate.set('$m', 'cancel_blockers', '500 ms')");
like(said("cutover('$m', dry_run => true)"), qr/could not cut over within/, 'nor by a rehearsal');
is(is_there($pid), 1, 'his transaction goes on');

my $said = said("cutover('$m')");
like($said, qr/^ready -> cut_over/, 'cutover ends who is idle in a transaction');
like($said, qr/NOTICE: .*PID $pid \(role app.*; in 0\.\d s its session is ended.*WARNING: .*PID $pid .*; its session is ended/s, 'having named him first');
is(is_there($pid), 0, 'he is gone');
is(serves(), 'target', 'the target serves');
like($node->safe_psql('postgres', "SELECT why FROM migrate.events WHERE kind = 'blocker ended'"), qr/^option cancel_blockers: PID $pid .*; its session is ended$/, 'the events name him');

# Due at an attempt that is the last one, or nearly, within cutover_timeout: nobody is ended for nothing.
sub ended_for_nothing { return $_[0] =~ /WARNING: .*its session is ended.*ERROR: .*within cutover_timeout/s }
for my $shortly ([ '1000 ms', '600 ms' ], [ '301 ms', '300 ms' ])
{
	my ($cutover_timeout, $cancel_blockers) = @$shortly;
	$node->safe_psql('postgres', "SELECT migrate.set('$m', 'cutover_timeout', '$cutover_timeout'), migrate.set('$m', 'cancel_blockers', '$cancel_blockers')");
	for my $statements ([ 'SELECT count(*) FROM profile' ], [ 'SET TRANSACTION ISOLATION LEVEL REPEATABLE READ', 'SELECT 1' ])
	{
		($idle, $pid) = holder('app', @$statements);
		my $said = said((serves() eq 'target' ? 'rollback' : 'cutover') . "('$m')");
		ok(!ended_for_nothing($said), "$statements->[-1], $cancel_blockers of $cutover_timeout") or diag($said);
		$idle->query_safe('COMMIT') if is_there($pid);
	}
}
$node->safe_psql('postgres', "SELECT migrate.set('$m', 'cutover_timeout', '3 s'), migrate.set('$m', 'cancel_blockers', '500 ms')");
$node->safe_psql('postgres', "SELECT migrate.cutover('$m')") if serves() eq 'source';

# Who is at work keeps his session.
my $query = "BEGIN; UPDATE user_profiles SET display_name = 'uncommitted' WHERE user_id = 1; SELECT pg_sleep(100)";
my $run = IPC::Run::start([ 'psql', '-X', '-U', 'app', '-d', $node->connstr('postgres'), '-c', $query, '-c', 'ROLLBACK', '-c', "SELECT 'still here'" ], '>', \my $out, '2>', \my $error);
wait_for($node, 'the writer', "SELECT count(*) = 1 FROM pg_stat_activity WHERE usename = 'app' AND wait_event = 'PgSleep'");
like(said("rollback('$m')"), qr/^cut_over -> ready.*its statement is cancelled/s, 'rollback cancels a statement');
$run->finish;
like($error, qr/canceling statement due to user request/, 'which is told so');
like($out, qr/still here/, 'and goes on in its session');
is($node->safe_psql('postgres', "SELECT count(*) FROM users WHERE name = 'uncommitted'"), 0, 'what it had not committed is nowhere');

# An old snapshot is in the way without a lock.
$node->safe_psql('postgres', 'CREATE TABLE other (v int); GRANT SELECT ON other TO app');
($idle, $pid) = holder('app', 'SET TRANSACTION ISOLATION LEVEL REPEATABLE READ', 'SELECT count(*) FROM other');
like(said("cutover('$m')"), qr/^ready -> cut_over.*NOTICE: .*PID $pid .*WARNING: .*PID $pid /s, 'who holds an old snapshot is ended, too');
is(is_there($pid), 0, 'he is gone');
like(said("rollback('$m')"), qr/^cut_over -> ready/, 'and back');

# The caller's rights count, not the extension's.
my $owner = 'dba';
$node->safe_psql('postgres', "UPDATE migrate._migration SET owner = 'dba'");
my ($superuser, $his) = holder('postgres', 'SELECT count(*) FROM profile');
like(said("cutover('$m')", $owner), qr/could not cut over.*PID $his /s, 'a superuser is not ended by another role');
is(is_there($his), 1, 'he stays');
$superuser->query_safe('COMMIT');
($idle, $pid) = holder('app', 'SELECT count(*) FROM profile');
like(said("cutover('$m')", $owner), qr/could not cut over.*PID $pid /s, 'nor a role that the caller is no member of');
is(is_there($pid), 1, 'it stays');
$node->safe_psql('postgres', 'GRANT pg_signal_backend TO dba');
like(said("cutover('$m')", $owner), qr/^ready -> cut_over/, 'with pg_signal_backend the caller may');
is(is_there($pid), 0, 'it is gone');
is(differing($node), 0, 'no row differs');

# A second switch in a transaction has a second, for the application waits for the locks of the first: too short to end anybody for it.
$node->safe_psql('postgres', <<'SQL');
CREATE TABLE plain (id int PRIMARY KEY);
CREATE TABLE plain_target (id int PRIMARY KEY);
ALTER TABLE plain OWNER TO dba;
ALTER TABLE plain_target OWNER TO dba;
SET SESSION AUTHORIZATION dba;
SELECT migrate.define('plain', 'plain', 'plain_target', on_target_delete => 'delete');
SELECT migrate.set('users_to_profiles', 'cancel_blockers', '100 ms'), migrate.start('plain');
SQL
wait_phase($node, 'ready', 'plain');
for my $statements ([ 'SELECT count(*) FROM profile' ], [ 'SET TRANSACTION ISOLATION LEVEL REPEATABLE READ', 'SELECT 1' ])
{
	my @holders = map { [ holder($_, @$statements) ] } qw(app postgres);  # (dba may end the first, not the second)
	my ($status, undef, $error) = $node->psql('postgres', "BEGIN; SELECT migrate.cutover('plain', skip => '{snapshots}'); SELECT migrate.rollback('$m'); COMMIT",
		extra_params => [ '-U', 'dba' ], timeout => 120);
	like($error, qr/could not roll back.*holds locks of an earlier step.*nobody is ended/s, "$statements->[-1]: it gives up soon, and says why");
	unlike($error, qr/WARNING/, '… having ended nobody');
	is(is_there($_->[1]), 1, '… and PID ' . ($_->[1]) . ' goes on') for @holders;
	is($node->safe_psql('postgres', "SELECT migrate.serves('plain') || ' ' || migrate.serves('$m')"), 'source target', '… and both are as they were');
	for (@holders) { $_->[0]->query_safe('COMMIT') if is_there($_->[1]) }
}

done_testing();
