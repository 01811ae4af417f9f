# Windows between two steps, held open at a debug point (src/debug_point.hpp) while the application writes into them: what it
# writes is done at once or as soon as the window is closed, never refused, and both sides are equal afterwards.
# MIGRATE_POINTS, a pattern, takes only the points that match it.
# needs: test build
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use CrashTest;
use IPC::Run ();
use MigrateTest;
use PostgreSQL::Test::Utils;
use Test::More;

$ENV{MIGRATE_POINTS} //= '';
my $node = crash_server('windows', preload => 0);
my $life = new_life($node);

my $scripts = 0;

# A psql of its own, not waited for.
sub begin
{
	my ($sql, $role) = @_;
	my $run = { out => '' };
	my $file = sprintf '%s/script_%d.sql', $node->basedir, ++$scripts;
	append_to_file($file, $sql);
	$run->{psql} = IPC::Run::start([ 'psql', '-XAtq', '-v', 'ON_ERROR_STOP=1', '-h', $node->host, '-p', $node->port, '-U', $role, '-d', 'postgres', '-f', $file ], '<', \undef, '>&', \$run->{out});
	return $run;
}

sub end
{
	my ($run, $what) = @_;
	ok($run->{psql}->finish, $what) or diag($run->{out});
	return;
}

# Every kind of write: to rows just copied, being copied and still to be copied, keys that move over the end of the batch and
# back, keys swapped and used again; at all isolation levels, with a savepoint, and with one that is taken back.
my @source_writes = (
	"DELETE FROM users WHERE id IN (3, 39, 41, 100)",
	"UPDATE users SET name = name || '!' WHERE id IN (4, 38, 42, 101)",
	"UPDATE users SET id = id + 200 WHERE id = 120; UPDATE users SET id = 7000 WHERE id = 5; UPDATE users SET id = -290 WHERE id = 290",
	"BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM users; UPDATE users SET bio = NULL WHERE id IN (8, 37, 102); COMMIT",
	"BEGIN ISOLATION LEVEL SERIALIZABLE; DELETE FROM users WHERE id = 9; INSERT INTO users (id, name) VALUES (9, 'again'); COMMIT",
	"BEGIN; SAVEPOINT a; DELETE FROM users WHERE id BETWEEN 10 AND 15; ROLLBACK TO a; UPDATE users SET name = 'kept' WHERE id = 10; COMMIT",
	"INSERT INTO users (id, name) VALUES (0, 'low'), (400, 'high') ON CONFLICT (id) DO UPDATE SET name = 'again'",
	"BEGIN; UPDATE users SET name = 'never' WHERE id BETWEEN 16 AND 20; ROLLBACK");
# (A writer of an older snapshot has to fail beside another one, without us too.)
my @committed_writes = grep { !/ISOLATION/ } @source_writes;
my @view_writes = (
	"UPDATE profile SET display_name = display_name || '?' WHERE user_id IN (21, 22, 150)",
	"DELETE FROM profile WHERE user_id IN (23, 151)",
	"INSERT INTO profile (user_id, display_name) VALUES (600, 'through the view')");

# point, the phase it begins in, what runs into it ('worker': a background worker does), the phase after, the writes.
my $start = "SELECT migrate.start('m')";
my @windows = (
	[ 'start: locks taken', 'planned', $start, 'ready', @source_writes ],
	[ 'start: phase moved', 'planned', $start, 'ready', @source_writes ],
	[ 'ranges: ledger written', 'planned', 'worker', 'ready', @source_writes ],
	[ 'batch: bound known', 'planned', 'worker', 'ready', @source_writes ],
	[ 'batch: snapshot taken', 'planned', 'worker', 'ready', @source_writes ],
	[ 'batch: slice written', 'planned', 'worker', 'ready', @source_writes ],
	[ 'batch: rows written', 'planned', 'worker', 'ready', @source_writes ],
	[ 'batch: checkpoint written', 'planned', 'worker', 'ready', @source_writes ],
	[ 'backfill: figures written', 'planned', 'worker', 'ready', @source_writes ],
	[ 'validate: range begun', 'planned', 'worker', 'ready', @source_writes ],
	[ 'validate: before the verdict', 'planned', 'worker', 'ready', @source_writes ],
	[ 'switch: old snapshots gone', 'ready', "SELECT migrate.cutover('m')", 'cut_over', @source_writes, @view_writes ],
	[ 'switch: locks taken', 'ready', "SELECT migrate.cutover('m')", 'cut_over', @source_writes, @view_writes ],
	[ 'switch: event written', 'ready', "SELECT migrate.cutover('m')", 'cut_over', @source_writes, @view_writes ],
	[ 'switch: old snapshots gone', 'cut_over', "SELECT migrate.rollback('m')", 'ready', @source_writes, @view_writes ],
	[ 'switch: one view replaced', 'cut_over', "SELECT migrate.rollback('m')", 'ready', @source_writes, @view_writes ],
	[ 'dual write: keys noted', 'ready', 'UPDATE users SET id = id + 10000 WHERE id BETWEEN 30 AND 45', 'ready', @committed_writes ],
	[ 'dual write: deletes done', 'ready', 'DELETE FROM users WHERE id IN (21, 100)', 'ready', @committed_writes ],
	[ 'dual write: keys replaced', 'ready', 'UPDATE users SET id = id + 10000 WHERE id IN (21, 22, 100)', 'ready', @view_writes ],
	[ 'dual write: upserts done', 'ready', "UPDATE users SET name = 'mine' WHERE id BETWEEN 1 AND 60", 'ready', @committed_writes ]);

sub try_window
{
	my ($point, $from, $run, $to, @writes) = @_;
	my $what = $from eq 'cut_over' ? "$point (rollback)" : $point;
	my $by_worker = $run eq 'worker';
	# A foreign key that is not set aside keeps the batches to SQL.
	my $by_sql = $point eq 'batch: bound known' ? "SELECT migrate.set('m', 'defer_indexes', 'off');\n" : '';
	my ($failed, $error) = run_sql($node, end_life($life) . bring($life, $from, $point eq 'batch: bound known') . $by_sql
		. ($by_worker ? arm_workers($node, "$point wait") : ''));
	is($failed, 0, "$what: prepared") or diag($error);
	my $holder = background($node);
	$holder->query_safe('SELECT pg_advisory_lock(7104)');
	my $log = log_position($node);
	my $runner = begin($by_worker ? $start : arm_session("$point wait") . $run, 'boss');
	ok(wait_for_log($node, $log, qr/debug point "\Q$point\E": wait/), "$what: the window is open");
	# A reader whose snapshot is taken within it, and who looks again when it is closed.
	my $reader = background($node);
	my $seen = $reader->query_safe("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM users");
	# And one who has locked rows of the batch, and keeps them until the batch has passed them by, or has copied them.
	my $locker = background($node);
	my $before_rows = $point =~ /^batch: (bound known|snapshot taken)/;
	$locker->query_safe('BEGIN; SELECT id FROM users WHERE id IN (6, 36) FOR UPDATE') if $before_rows;
	my @begun = map { begin("SET application_name = 'writer'; $_;", 'app') } @writes;
	wait_for($node, "$what: the writers are done or wait", <<'SQL');
SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE usename = 'app' AND (application_name <> 'writer' OR wait_event_type IS DISTINCT FROM 'Lock'))
   AND (SELECT count(*) FROM pg_stat_activity WHERE usename = 'app') = (SELECT count(*) FROM pg_stat_activity WHERE application_name = 'writer')
SQL
	$holder->query_safe('SELECT pg_advisory_unlock(7104)');
	$holder->quit;
	wait_for($node, "$what: the batch is done", "SELECT bool_and(checkpoint IS NOT NULL OR done) FROM migrate._range") if $before_rows;
	$locker->query_safe('ROLLBACK') if $before_rows;
	$locker->quit;
	end($begun[$_], "$what: write $_ is done") for 0 .. $#begun;
	end($runner, "$what: what was held is done");
	is($reader->query_safe('SELECT count(*) FROM profile'), $seen, "$what: an old snapshot sees every row through the view") if $to eq 'cut_over';
	$reader->quit;
	$life->{phase} = $to;
	$life->{cutovers}++ if $to eq 'cut_over';
	($failed, $error, my $out) = run_sql($node, ($by_worker ? disarm_workers($node) : '') . "CALL must_settle('$to');\n" . comparison($life));
	is($out, "equal: 0 differ, 0 lost, $life->{cutovers} cutovers", "$what: equal") or diag($error);
	return;
}

for my $window (grep { $_->[0] =~ /$ENV{MIGRATE_POINTS}/ } @windows)
{
	try_window(@$window);
}
my ($failed, $error) = run_sql($node, end_life($life));
is($failed, 0, 'nothing is left') or diag($error);
$node->stop;
done_testing();
