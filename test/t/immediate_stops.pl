# The server is stopped at once, at random times, while clients write through the view and a DBA takes the migration through its
# phases, there and back. Each client's transactions are numbered, so that after each restart it is known to the row what must
# be there: every transaction that was acknowledged, at most one more, and nothing of one by half.
# Where nobody's commits wait for the disk (synchronous_commit = off) the last ones may be lost, by the user's own choice: but of each
# client the last ones only, and on both sides. A switch is not lost even there.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use CrashTest;
use IPC::Run ();
use MigrateTest;
use PostgreSQL::Test::Utils;
use Test::More;
use Time::HiRes qw(time usleep);

my %rounds = $ENV{MIGRATE_LONG} ? (on => 150, off => 60) : (on => 6, off => 4);
my $clients = 4;
my $seed = $ENV{MIGRATE_SEED} || time() % 1_000_000;
srand($seed);
note("MIGRATE_SEED=$seed");

my ($node, $life, @connection);
my ($acknowledged, $lost, $crashes, %phases) = (0, 0, 0);

# (Nothing else brings commits to the disk either, for as long as that can be had.)
my $unhurried = "synchronous_commit = off\nwal_writer_delay = 10s\nwal_writer_flush_after = 1GB\nwal_buffers = 16MB\n";

# Transaction n of a client writes n into the client's own row, inserts row n, changes row n - 1 and, each third time, deletes row
# n - 2. The number goes on after a crash from what the client's own row says.
my $script = <<'SQL';
\set n :n + 1
\set own 1000000 * (1 + :client_id)
BEGIN;
UPDATE profile SET display_name = :n WHERE user_id = :own;
INSERT INTO profile (user_id, display_name) VALUES (:own + :n, 'new');
UPDATE profile SET display_name = 'changed' WHERE user_id = :own + :n - 1 AND :n > 1;
DELETE FROM profile WHERE user_id = :own + :n - 2 AND :n % 3 = 0;
COMMIT;
SQL

# What the client's own row says must be at least $at_least[client] (unless that may be lost: ASYNC), and the other rows must be what
# that many transactions make.
my $check = <<'SQL';
WITH own AS (SELECT c, 1000000 * c AS base, (SELECT display_name::int FROM profile WHERE user_id = 1000000 * c) AS n, k FROM unnest(ARRAY[LEAST]) WITH ORDINALITY a (k, c)),
expected AS (
    SELECT o.base + i AS id, CASE WHEN i = o.n THEN 'new' ELSE 'changed' END AS name FROM own o, generate_series(1, o.n) i
    WHERE NOT ((i + 2) % 3 = 0 AND i + 2 <= o.n)),
found AS (SELECT p.user_id AS id, p.display_name AS name FROM profile p WHERE p.user_id > 1000000 AND p.user_id % 1000000 <> 0)
SELECT (SELECT string_agg(CASE WHEN n <= k + 1 AND (n >= k OR ASYNC) THEN 'ok' ELSE format('client %s: %s, acknowledged %s', c, n, k) END, ' ') FROM own) || ', ' ||
       (SELECT count(*) FROM expected e FULL JOIN found f USING (id) WHERE e.name IS DISTINCT FROM f.name) || ' wrong';
SQL

# Rows of which the sides differ, but for those that the copy has yet to come to, and keys whose write has failed.
my $differing = <<'SQL';
SELECT (SELECT count(*) FROM users u FULL JOIN user_profiles p ON p.user_id = u.id
        WHERE (u.id, u.name, coalesce(u.bio, '')) IS DISTINCT FROM (p.user_id, p.display_name, p.bio)
          AND NOT (p.user_id IS NULL AND m.phase IN ('planned', 'dual_writing', 'backfilling'))
          AND ARRAY[coalesce(u.id, p.user_id)::text] NOT IN (SELECT key FROM migrate._failure)) || ' differ'
FROM migrate._migration m WHERE m.name = 'm';
SQL

# What the DBA calls, over and over; an error (of a gate, say) stops nothing.
my $verbs = "SELECT migrate.start('m'); CALL migrate.wait('m');\n"
  . "SELECT migrate.cutover('m');\nSELECT pg_sleep(random() / 2);\nSELECT migrate.rollback('m');\nSELECT migrate.pause('m');\nSELECT migrate.resume('m');\nSELECT * FROM migrate.validate('m');\n" x 50;

sub begin
{
	my ($mode) = @_;
	$node = crash_server("stops_$mode", conf => $mode eq 'off' ? $unhurried : '');
	$life = new_life($node);
	$life->{rows} = 4000;
	append_to_file($node->basedir . '/verbs.sql', $verbs);
	append_to_file($node->basedir . '/writes.sql', $script);
	@connection = ('-h', $node->host, '-p', $node->port, 'postgres');
	return;
}

sub crash
{
	$node->stop('immediate');
	$crashes++;
	return;
}

# A client of pgbench for each number to go on from; gives them, and what each has done so far.
sub start_writers
{
	my ($round, @from) = @_;
	return map {
		my $log = $node->basedir . "/log_${round}_$_";
		my $writer = { log => $log, from => $from[$_], out => '' };
		$writer->{run} = IPC::Run::start([ 'pgbench', '-n', '-T', '3600', '-c', 1, '-U', 'boss', '-D', "client_id=$_", '-D', "n=$from[$_]",
				'--log', "--log-prefix=$log", '-f', $node->basedir . '/writes.sql', @connection ], '<', \undef, '>&', \$writer->{out});
		$writer;
	} 0 .. $clients - 1;
}

# The number of the last transaction that was acknowledged to the writer.
sub last_acknowledged
{
	my ($writer) = @_;
	$writer->{run}->finish;
	my $lines = 0;
	for my $file (glob "$writer->{log}.*")
	{
		open my $handle, '<', $file or die;
		$lines++ while <$handle>;
	}
	$acknowledged += $lines;
	return $writer->{from} + $lines;
}

# (The last commit waits for the disk, whatever the others do: the next crash does not go back behind it.)
sub anew
{
	my ($failed, $error) = run_sql($node, end_life($life) . bring($life, 'planned', int rand 2)
		. "SELECT migrate.set('m', 'max_rows_per_second', '8000');\nSET synchronous_commit = on;\n"
		. join '', map { "INSERT INTO users (id, name) VALUES (1000000 * $_, '0');\n" } 1 .. $clients);
	is($failed, 0, 'a migration is there, nothing is left of the last one') or diag($error);
	return (0) x $clients;
}

# One stop; gives where the clients go on from.
sub stop_at_once
{
	my ($mode, $round, $last, @from) = @_;
	my @writers = start_writers($round, @from);
	my $out = '';
	my $dba = IPC::Run::start([ 'psql', '-XAtq', '-U', 'boss', '-f', $node->basedir . '/verbs.sql', @connection ], '<', \undef, '>&', \$out);
	poll("round $round: the clients write", sub { (value($node, 'SELECT max(display_name::int) FROM profile WHERE user_id = 1000000') // 0) > $from[0] });
	# Every other time among the switches, else wherever it comes.
	poll("round $round: the switches begin", sub { (value($node, "SELECT phase FROM migrate._migration WHERE name = 'm'") // '') =~ /^(ready|cut_over)$/ }) if rand() < 0.5;
	usleep(rand() * 2_000_000);
	crash();
	$dba->finish;
	my @least = map { last_acknowledged($_) } @writers;
	unlike($_->{out}, qr/ERROR/, "round $round: no error before the crash") for @writers;
	$node->start;
	my $sql = $check =~ s/LEAST/join ', ', @least/er =~ s/ASYNC/$mode eq 'off' ? 'true' : 'false'/er;
	my ($failed, $error, $found) = run_sql($node, "SELECT state_of_m();\n$differing$sql");
	my ($state, $differ, $rows) = split /\n/, $found;
	ok(whole($state // ''), "round $round: the state is whole") or diag("$found$error");
	is($differ, '0 differ', "round $round ($state): both sides are equal");
	is($rows, join(' ', ('ok') x $clients) . ', 0 wrong', "round $round ($state): what must be there is, nothing by half") or diag($error);
	($life->{phase}) = $state =~ /^(\w+)/;
	$phases{ $life->{phase} }++;
	@from = split / /, value($node, "SELECT string_agg(display_name, ' ' ORDER BY user_id) FROM profile WHERE user_id % 1000000 = 0") // '';
	for my $i (0 .. $#from) { $lost += $least[$i] - $from[$i] if $from[$i] < $least[$i] }

	# Every other time the migration goes on through the next crash; else it is brought to its end.
	return @from if rand() < 0.5 && !$last;
	my $goal = $life->{phase} eq 'cut_over' ? 'cut_over' : 'ready';
	($failed, $error, $found) = run_sql($node, "SELECT migrate.start('m'); SELECT migrate.resume('m'); CALL settle('$goal', 15000);\n" . comparison($life));
	like($found, qr/^settled: settled\nequal: 0 differ/m, "round $round: it goes on to $goal, both sides are equal") or diag("$found$error");
	$life->{phase} = $goal;
	return anew();
}

# The server stops right after the SQL was done (or, where a worker does what follows, after it is seen to be): what is there then?
sub found_after
{
	my ($sql, $query, $seen) = @_;
	my ($failed, $error) = run_sql($node, $sql);
	is($failed, 0, $sql =~ s/\n.*//sr) or diag($error);
	wait_for($node, 'it is seen', $seen) if $seen;
	crash();
	$node->start;
	return value($node, $query);
}

# A switch is on the disk once it is told. So that it could be lost, an ordinary write must be.
sub keep_switches
{
	my $ordinary = 0;
	for my $i (1 .. 10)
	{
		$ordinary = found_after("INSERT INTO users (id, name) VALUES (900001, 'to be lost') ON CONFLICT DO NOTHING", "SELECT count(*) FROM users WHERE id = 900001") eq '0';
		last if $ordinary;
		run_sql($node, 'SET synchronous_commit = on; DELETE FROM users WHERE id = 900001');
	}
	ok($ordinary, 'an ordinary write can be lost');
	my ($failed, $error) = run_sql($node, bring($life, 'ready'));
	is($failed, 0, 'ready') or diag($error);
	my %after = (cutover => 'cut_over 3 3 target all', rollback => 'ready 3 3 source all');
	is(found_after("SET synchronous_commit = off; SELECT migrate.$_('m')", 'SELECT state_of_m()'), $after{$_}, "$_ is not lost") for qw(cutover rollback cutover);
	my $by_itself = "SELECT migrate.set('m', 'on_limit', 'rollback'); BEGIN; SELECT migrate.set('m', 'watch_time', '1 hour'); UPDATE migrate._watch SET why = 'the test'; COMMIT;";
	is(found_after($by_itself, 'SELECT state_of_m()', "SELECT phase = 'ready' FROM migrate._migration WHERE name = 'm'"), $after{rollback}, 'nor is a rollback by the worker');
	$life->{phase} = 'ready';
	return;
}

my $began = time();
for my $mode (qw(on off))
{
	subtest "synchronous_commit = $mode" => sub {
		begin($mode);
		my @from = anew();
		@from = stop_at_once($mode, $_, $_ == $rounds{$mode}, @from) for 1 .. $rounds{$mode};
		keep_switches() if $mode eq 'off';
		my ($failed, $error) = run_sql($node, end_life($life));
		is($failed, 0, 'nothing is left') or diag($error);
		$node->stop;
	};
}
note(sprintf 'in all: %d immediate stops (%s), %d acknowledged by %d clients (of which %d were lost where nothing waits for the disk), MIGRATE_SEED=%d, %.1f s',
	$crashes, join(', ', map { "$phases{$_} in $_" } sort keys %phases), $acknowledged, $clients, $lost, $seed, time() - $began);
done_testing();
