# The server is stopped at once, at random times, while clients write through the view and a DBA takes the migration through its
# phases, there and back. Each client's transactions are numbered, so that after each restart it is known to the row what must
# be there: every transaction that was acknowledged, at most one more, and nothing of one by half.
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

my $rounds = $ENV{MIGRATE_LONG} ? 150 : 6;
my $clients = 4;
my $seed = $ENV{MIGRATE_SEED} || time() % 1_000_000;
srand($seed);
note("MIGRATE_SEED=$seed");

my $node = crash_server('stops');
my $life = new_life($node);
$life->{rows} = 4000;
my ($acknowledged, $crashes, %phases) = (0, 0);

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

# What the client's own row says must be at least $at_least[client], and the other rows must be what that many transactions make.
my $check = <<'SQL';
WITH own AS (SELECT c, 1000000 * c AS base, (SELECT display_name::int FROM profile WHERE user_id = 1000000 * c) AS n, k FROM unnest(ARRAY[LEAST]) WITH ORDINALITY a (k, c)),
expected AS (
    SELECT o.base + i AS id, CASE WHEN i = o.n THEN 'new' ELSE 'changed' END AS name FROM own o, generate_series(1, o.n) i
    WHERE NOT ((i + 2) % 3 = 0 AND i + 2 <= o.n)),
found AS (SELECT p.user_id AS id, p.display_name AS name FROM profile p WHERE p.user_id > 1000000 AND p.user_id % 1000000 <> 0)
SELECT (SELECT string_agg(CASE WHEN n BETWEEN k AND k + 1 THEN 'ok' ELSE format('client %s: %s, acknowledged %s', c, n, k) END, ' ') FROM own) || ', ' ||
       (SELECT count(*) FROM expected e FULL JOIN found f USING (id) WHERE e.name IS DISTINCT FROM f.name) || ' wrong';
SQL

# What the DBA calls, over and over; an error (of a gate, say) stops nothing.
my $verbs = "SELECT migrate.start('m'); CALL migrate.wait('m');\n"
  . "SELECT migrate.cutover('m');\nSELECT pg_sleep(random() / 2);\nSELECT migrate.rollback('m');\nSELECT migrate.pause('m');\nSELECT migrate.resume('m');\nSELECT * FROM migrate.validate('m');\n" x 50;
append_to_file($node->basedir . '/verbs.sql', $verbs);
append_to_file($node->basedir . '/writes.sql', $script);

my @connection = ('-h', $node->host, '-p', $node->port, 'postgres');

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

sub anew
{
	my ($failed, $error) = run_sql($node, end_life($life) . bring($life, 'planned', int rand 2)
		. "SELECT migrate.set('m', 'max_rows_per_second', '8000');\n"
		. join '', map { "INSERT INTO users (id, name) VALUES (1000000 * $_, '0');\n" } 1 .. $clients);
	is($failed, 0, 'a migration is there, nothing is left of the last one') or diag($error);
	return (0) x $clients;
}

my @from = anew();
my $began = time();
for my $round (1 .. $rounds)
{
	my @writers = start_writers($round, @from);
	my $out = '';
	my $dba = IPC::Run::start([ 'psql', '-XAtq', '-U', 'boss', '-f', $node->basedir . '/verbs.sql', @connection ], '<', \undef, '>&', \$out);
	my $from = $from[0];
	poll("round $round: the clients write", sub { (value($node, 'SELECT max(display_name::int) FROM profile WHERE user_id = 1000000') // 0) > $from });
	usleep(rand() * 2_000_000);
	$node->stop('immediate');
	$crashes++;
	$dba->finish;
	@from = map { last_acknowledged($_) } @writers;
	unlike($_->{out}, qr/ERROR/, "round $round: no error before the crash") for @writers;
	$node->start;
	(my $sql = $check) =~ s/LEAST/join ', ', @from/e;
	my ($failed, $error, $found) = run_sql($node, "SELECT state_of_m();\n$sql");
	my ($state, $rows) = split /\n/, $found;
	ok(whole($state // ''), "round $round: the state is whole") or diag("$found$error");
	is($rows, join(' ', ('ok') x $clients) . ', 0 wrong', "round $round ($state): what was acknowledged is there, nothing by half") or diag($error);
	($life->{phase}) = $state =~ /^(\w+)/;
	$phases{ $life->{phase} }++;
	@from = split / /, value($node, "SELECT string_agg(display_name, ' ' ORDER BY user_id) FROM profile WHERE user_id % 1000000 = 0") // '';

	# Every other time the migration goes on through the next crash; else it is brought to its end.
	next if rand() < 0.5 && $round < $rounds;
	my $goal = $life->{phase} eq 'cut_over' ? 'cut_over' : 'ready';
	($failed, $error, $found) = run_sql($node, "SELECT migrate.start('m'); SELECT migrate.resume('m'); CALL settle('$goal', 15000);\n" . comparison($life));
	like($found, qr/^settled: settled\nequal: 0 differ/m, "round $round: it goes on to $goal, both sides are equal") or diag("$found$error");
	$life->{phase} = $goal;
	@from = anew();
}
run_sql($node, end_life($life));
note(sprintf '%d immediate stops (%s), %d acknowledged transactions, %.1f s', $crashes, join(', ', map { "$phases{$_} in $_" } sort keys %phases), $acknowledged, time() - $began);
$node->stop;
done_testing();
