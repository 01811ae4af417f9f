# Corruption under load: rows of random types are damaged at random while an application writes and while a validation runs. The
# worker's own validation phase and every whole method must find the damage, at the first run and at each retry, in its row and
# column and nowhere else. Repair stays off. MIGRATE_SEED replays a run.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use Test::More;

my $seed = $ENV{MIGRATE_SEED} || int(rand(1_000_000)) + 1;
my $rounds = $ENV{MIGRATE_LONG} ? 200 : 5;
srand($seed);
note("MIGRATE_SEED=$seed");

my $node = new_server('corruption');

# A value of each type from one integer: all different, so that every change is one.
my %make = (
	'bigint' => '($1)', 'numeric' => '($1) / 7.0', 'numeric(20,4)' => '($1) + 0.0001', 'double precision' => '($1) / 3.0', 'text' => "'é' || (\$1) || repeat('x', (\$1) % 50)",
	'varchar(40)' => "'v' || (\$1)", 'char(12)' => '($1)::text', 'bytea' => "decode(md5((\$1)::text), 'hex')", 'date' => "date '2000-01-01' + (\$1) % 9000 * 10 + (\$1) / 9000",
	'timestamptz' => "timestamptz '2000-01-01 00:00+00' + (\$1) * interval '1 microsecond'", 'interval' => "(\$1) * interval '1 second'", 'uuid' => 'md5(($1)::text)::uuid', 'jsonb' => "jsonb_build_object('a', (\$1), 'b', NULL)",
	'inet' => "inet '10.0.0.0' + (\$1)", 'int4range' => 'int4range(($1), ($1) + 5)', 'int[]' => 'ARRAY[($1), NULL, ($1) % 5]', 'text[]' => "ARRAY['a', (\$1)::text]", 'bit varying' => '($1)::int::bit(32)::bit varying',
	'point' => 'point(($1), 1)', 'json' => "json_build_object('n', (\$1))");
my @types = sort keys %make;
my @columns = map { { name => "c$_", type => $types[ rand @types ] } } 1 .. 12;

sub value_of
{
	my ($column, $n) = @_;
	return '(' . ($make{ $column->{type} } =~ s/\(\$1\)/($n)/gr) . ")::$column->{type}";
}

my $list = join ', ', map { "$_->{name} $_->{type}" } @columns;
$node->safe_psql('postgres', "CREATE TABLE s (id int PRIMARY KEY, $list, hot int); CREATE TABLE t (id bigint PRIMARY KEY, $list, hot int);");
my $values = join ', ', map { 'CASE WHEN i % ' . (5 + int rand 20) . ' > 0 THEN ' . value_of($_, 'i + ' . int(rand 1000)) . ' END' } @columns;
$node->safe_psql('postgres', "INSERT INTO s SELECT i, $values, 0 FROM generate_series(1, 3000) i; ANALYZE s;");
$node->safe_psql('postgres', "SELECT migrate.define('corruption', 's', 't', on_target_delete => 'delete'); SELECT migrate.start('corruption')");
wait_phase($node, 'ready', 'corruption');

my $app = start_app($node, 'app', <<'SQL', clients => 2, rate => 200);
\set id random(1, 3000)
UPDATE s SET hot = hot + 1 WHERE id = :id;
SQL

# A statement that damages the target, and what is to be found of it: "key kind column".
sub damage
{
	my ($id, $column) = ($_[0], $columns[ rand @columns ]);
	my $kind = int rand 6;
	my $at = "WHERE id = $id";
	if ($kind == 0) { return ("DELETE FROM t $at", "$id missing ") }
	if ($kind == 1) { my $new = -$id; return ("INSERT INTO t (id, hot) VALUES ($new, 0)", "$new extra ") }
	if ($kind == 2) { my $new = 1_000_000 + $id; return ("INSERT INTO t (id, hot) VALUES ($new, 0)", "$new extra ") }
	my $set = $kind == 3 ? "CASE WHEN $column->{name} IS NULL THEN " . value_of($column, $id) . ' END' : value_of($column, 50_000 + $id);
	return ("UPDATE t SET $column->{name} = $set $at", "$id different $column->{name}");
}

sub found
{
	return $node->safe_psql('postgres', "SELECT f FROM (SELECT key || ' ' || kind || ' ' || coalesce(array_to_string(columns, ','), '') AS f FROM migrate.mismatches('corruption')) x ORDER BY f COLLATE \"C\"");
}

my $checked = 0;
for my $round (1 .. $rounds)
{
	my (%taken, @sql, @expected);
	while (keys %taken < 1 + int rand 3) { $taken{ 1 + int rand 3000 } = 1 }
	for my $id (sort { $a <=> $b } keys %taken)
	{
		my ($sql, $expected) = damage($id);
		push @sql, $sql;
		push @expected, $expected;
	}
	# The lock keeps the application from mending what is damaged; it waits for those rows at most as long as the round lasts.
	my $holder = background($node);
	$holder->query_safe('BEGIN; SELECT count(*) FROM (SELECT FROM s WHERE id IN (' . join(',', keys %taken) . ') FOR SHARE) x');
	$node->safe_psql('postgres', join ';', @sql);
	my $expected = join "\n", sort @expected;
	my @wrong;
	for my $run (1 .. 3)
	{
		for my $method ($run == 1 ? qw(ranges rows sample) : qw(ranges))
		{
			my $verdict = $node->safe_psql('postgres', "SELECT verdict FROM migrate.validate('corruption', '$method')");
			push @wrong, "$method $run: $verdict" if $verdict ne 'mismatch';
			push @wrong, "$method $run found: " . found() if found() ne $expected;
			$checked++;
		}
		my $steps = $node->safe_psql('postgres', 'SET search_path = pg_catalog, pg_temp; '
			  . "UPDATE migrate._migration SET phase_since = clock_timestamp() WHERE name = 'corruption'; "
			  . "SELECT migrate._validate_step(m.id, 500) FROM migrate._migration m, generate_series(1, 20) WHERE name = 'corruption'") =~ /mismatch/;
		push @wrong, "worker's steps $run" unless $steps;
	}
	my $checksum = $node->safe_psql('postgres', "SELECT verdict FROM migrate.validate('corruption', 'checksum')");
	push @wrong, "checksum: $checksum" if $checksum ne 'mismatch';
	is(join("\n", @wrong), '', "round $round: " . join('; ', @expected)) or diag("MIGRATE_SEED=$seed, " . join('; ', @sql));
	# mended by hand, from the source; not by repair
	$node->safe_psql('postgres', 'BEGIN; DELETE FROM t WHERE id NOT BETWEEN 1 AND 3000; DELETE FROM t WHERE id IN (' . join(',', keys %taken) . '); INSERT INTO t SELECT * FROM s WHERE id IN (' . join(',', keys %taken) . '); COMMIT');
	$holder->query_safe('COMMIT');
	$holder->quit;
}
my $verdict = $node->safe_psql('postgres', "SELECT verdict FROM migrate.validate('corruption')");
is($verdict, 'equal', 'and nothing is found when all is mended');

# Planted while a validation of the worker's runs: in a range it has passed, it is found by the next run; in one that it has not, by this.
$node->safe_psql('postgres', "UPDATE migrate._migration SET phase = 'validating', phase_since = clock_timestamp() WHERE name = 'corruption'");
my $step = "SET search_path = pg_catalog, pg_temp; SELECT split_part(migrate._validate_step(id, 1000), ':', 1) FROM migrate._migration WHERE name = 'corruption'";
is($node->safe_psql('postgres', $step), 'more', 'the first range is validated');
my $hold = background($node);
$hold->query_safe('BEGIN; SELECT count(*) FROM (SELECT FROM s WHERE id IN (5, 2990) FOR SHARE) x');
$node->safe_psql('postgres', 'DELETE FROM t WHERE id IN (5, 2990)');
my $last;
poll('the end of the run', sub { ($last = $node->safe_psql('postgres', $step)) ne 'more' });
is($last, 'mismatch', 'damage in a range still to come is found');
like(found(), qr/^2990 missing/m, '… by its key');
unlike(found(), qr/^5 /m, '… while what has been passed is left to the next run');
# The worker itself, from the phase's beginning: it fails, and says why; and again at each retry.
for my $try (1 .. 2)
{
	$node->safe_psql('postgres', "UPDATE migrate._migration SET phase = 'validating', failed_since = NULL, failed_reason = NULL WHERE name = 'corruption'") if $try == 1;
	$node->safe_psql('postgres', $try == 1 ? "SELECT migrate.resume('corruption')" : "SELECT migrate.retry('corruption')");
	wait_for($node, 'the worker fails', "SELECT failed_reason LIKE 'mismatch: %2 missing%' FROM migrate._migration WHERE name = 'corruption'");
	is(found(), "2990 missing \n5 missing ", "try $try of the worker finds both");
}
$node->safe_psql('postgres', 'INSERT INTO t SELECT * FROM s WHERE id IN (5, 2990)');
$hold->query_safe('COMMIT');
$hold->quit;
$node->safe_psql('postgres', "SELECT migrate.retry('corruption')");
wait_phase($node, 'ready', 'corruption');
my ($done, $failed) = stop_app($app);
is($failed, 0, 'no statement of the application failed');
note("$checked validations of damage, $done transactions, MIGRATE_SEED=$seed, types " . join(', ', map { $_->{type} } @columns));
$node->stop;
done_testing();
