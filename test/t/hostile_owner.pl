# The hostile owner (HostileOwner.pm) through every phase: nobody but he runs his code, least of all a superuser, except
# where PostgreSQL has whoever writes or reads a table run it (which the first phase, without a migration, shows).
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use HostileOwner;
use MigrateTest;
use Test::More;

my $rows = 30;
my $node = new_server('hostile', conf => "log_error_verbosity = terse\nlog_min_messages = log\n");
plant($node, $rows);

# Who writes the source runs what is planted on it; who reads or writes the view, what the view and the serving side have.
my %allowed = ('without a migration' => qr/^s |^key domain$/, 'dual writes' => qr/^s |^key domain$/, 'view before' => qr/^s |^key domain$|^mapping$|^cast$|^operator$|^constant$|^filter$/,
	'view after' => qr/^t |^key domain$|^s default$/, 'late writes' => qr/^s |^key domain$/, 'restore' => qr/^[st] (?:check|domain|generated|index|index constant|predicate|statistics)$|^key domain$/,
	# (The phase is unknown until the table that holds it is restored.)
	'<NULL>' => qr{^s domain$});
my $writes = q{INSERT INTO lair.s (id, v, "select") VALUES (%1$d, 'new', 'new'), (%1$d + 1, 'new', 'new'); UPDATE lair.s SET v = v || '!' WHERE id IN (1, %1$d); DELETE FROM lair.s WHERE id = %1$d + 1;};

my $key = 1000;

sub write_source
{
	as_role($node, $_, sprintf($writes, $key += 10)) for qw(clerk postgres);
	return;
}

sub validate_all
{
	my ($role, $name, %option) = @_;
	for my $method (qw(counts sample ranges checksum rows))
	{
		my $verdict = verb($node, $role, "validate $method", "SELECT verdict FROM migrate.validate('$name', '$method');", escape => 1, %option);
		like($verdict, qr/equal$/, "$role: validate by $method");
	}
	return;
}

# A row that the target refuses, mended; damage, repaired.
sub retry_and_repair
{
	my ($role, $name) = @_;
	enter($node, 'dual writes');
	as_role($node, 'clerk', q{UPDATE lair.s SET "select" = 'bad' WHERE id = 7});
	is(value($node, 'SELECT min(sqlstate) FROM migrate._failure'), '23514', "$role: the target's refusal is recorded");
	as_role($node, 'clerk', q{UPDATE lair.s SET "select" = 'good' WHERE id = 7});
	verb($node, $role, 'retry', "SELECT migrate.retry('$name');", escape => 1);
	wait_for($node, 'failures are retried', 'SELECT count(*) = 0 FROM migrate._failure');
	enter($node, "$role: damage");
	as_role($node, 'mallory', q{UPDATE lair.t SET k = 'damage' WHERE id < 4; DELETE FROM lair.t WHERE id = 4});
	verb($node, $role, 'find damage', "SELECT count(*) FROM migrate.validate('$name');", escape => 1);
	verb($node, $role, 'repair', "SELECT * FROM migrate.mismatches('$name'); SELECT * FROM migrate.repair('$name'); SELECT * FROM migrate.repair('$name', true); SELECT * FROM migrate.validate('$name');", escape => 1);
	return;
}

sub shadow_reads
{
	my ($role, $name) = @_;
	verb($node, $role, 'shadow', "SELECT migrate.shadow('$name', 1);", escape => 1);
	wait_for($node, 'shadow reads', "SELECT coalesce(sum(reads), 0) > 0 FROM migrate.shadow_reads");
	verb($node, $role, 'shadow off', "SELECT migrate.shadow('$name', 0);");
	return;
}

sub define
{
	my ($role, $name) = @_;
	# (The path is the caller's own for the names in the mapping.)
	enter($node, "$role: define");
	my $sql = "SELECT migrate.define('$name', 'lair.s', 'lair.t', \$\$ $map \$\$, filter => \$\$ lair.spy('a', 'filter') IS NOT NULL \$\$,"
	  . " reverse => \$\$ id, lair.spy(v, 'reverse') AS v, \"user\" AS \"select\", d::text AS d, p \$\$, on_target_delete => 'delete');";
	as_role($node, $role, "SET search_path = lair, public;\n$sql");
	verb($node, $role, 'preflight', "SELECT * FROM migrate.preflight('$name'); SELECT migrate.plan('$name'); SELECT migrate.set('$name', 'accept_reverse_gaps', 'on'), migrate.set('$name', 'shadow_time', '1 s');"
		. " SELECT * FROM migrate.get('$name'); SELECT * FROM migrate.migration; SELECT * FROM migrate.progress; SELECT * FROM migrate.failures; SELECT * FROM migrate.events;");
	verb($node, $role, 'add view', "SELECT migrate.add_view('$name', 'lair.through');");
	return;
}

sub use_view
{
	my ($phase) = @_;
	enter($node, $phase);
	for my $role (qw(clerk postgres))
	{
		as_role($node, $role, 'SELECT count(*), max(v) FROM lair.through');
	}
	return if $phase ne 'view after';
	as_role($node, $_, sprintf(q{INSERT INTO lair.through (id, v, "user") VALUES (%1$d, 'new', 'new'); UPDATE lair.through SET v = 'after' WHERE id IN (2, %1$d); DELETE FROM lair.through WHERE id = %1$d}, $key += 10))
	  for qw(clerk postgres);
	enter($node, 'late writes');
	write_source();
	return;
}

sub whole_life
{
	my ($role, $name) = @_;
	define($role, $name);
	as_role($node, 'mallory', 'GRANT SELECT, INSERT, UPDATE, DELETE ON lair.through TO clerk');
	start_and_wait($node, $role, $name);
	enter($node, 'dual writes');
	write_source();
	use_view('view before');
	validate_all($role, $name);
	retry_and_repair($role, $name);
	shadow_reads($role, $name);
	verb($node, $role, 'cutover', "SELECT migrate.cutover('$name', dry_run => true); SELECT migrate.cutover('$name');");
	use_view('view after');
	verb($node, $role, 'validate after', "SELECT * FROM migrate.validate('$name');");
	verb($node, $role, 'rollback', "SELECT migrate.rollback('$name', dry_run => true); SELECT migrate.rollback('$name'); SELECT migrate.pause('$name'); SELECT migrate.resume('$name');");
	verb($node, $role, 'cutover again', "SELECT migrate.cutover('$name');");
	verb($node, $role, 'finalize', "SELECT migrate.finalize('$name', force => '$name'); SELECT migrate.drop('$name');");
	as_role($node, 'mallory', 'DROP VIEW lair.through; TRUNCATE lair.t');
	return;
}

enter($node, 'without a migration');
write_source();
my $control = places($node, qr/^without/, 'postgres');
ok($control->{"s $_"}, "without a migration, a superuser's own write runs: s $_")
  for ('check', 'domain', 'generated', 'default', 'index', 'index constant', 'predicate', 'before row trigger', 'after statement trigger');

whole_life('postgres', 'by a superuser');
whole_life('mallory', 'by its owner');

# Given up halfway; and restored by a superuser.
define('mallory', 'restored');
start_and_wait($node, 'mallory', 'restored');
my $dump = $node->basedir . '/dump';
enter($node, 'restore');
$node->command_ok([ 'pg_dump', '-Fc', '-f', $dump, '-h', $node->host, '-p', $node->port, 'postgres' ], 'pg_dump');
$node->safe_psql('postgres', 'CREATE DATABASE copy');
$node->command_ok([ 'pg_restore', '-h', $node->host, '-p', $node->port, '-d', 'copy', $dump ], 'pg_restore');
for my $db ('postgres', 'copy')
{
	my $role = $db eq 'copy' ? 'postgres' : 'mallory';
	$node->safe_psql($db, "UPDATE lair.now SET phase = '$role: cancel', escape = true");
	if ($db eq 'copy')
	{
		as_role($node, $role, planted_path($role) . "SELECT migrate.resume('restored'); SELECT migrate.retry('restored');", $db);
		wait_phase($node, 'ready', 'restored', $db);
		as_role($node, $role, planted_path($role) . "SELECT verdict FROM migrate.validate('restored', 'rows');", $db);
	}
	as_role($node, $role, planted_path($role) . "SELECT migrate.cancel('restored'); SELECT migrate.drop('restored');", $db);
}

is(join("\n", strangers($node, \%allowed)), '', 'nobody but the owner ran the owner\'s code');
my $own = places($node, qr/^(?:mallory|postgres): /, 'mallory');
ok($own->{$_}, "… and the owner did: $_")
  for ('mapping', 'operator', 'cast', 'filter', 'reverse', 'key domain', 't check', 't domain', 't generated', 't default', 't index', 't index constant', 't domain constant', 't predicate', 's index constant',
	's predicate', 't before row trigger', 't after row trigger', 't before statement trigger', 't after statement trigger');
my $dual = places($node, qr/^dual writes$/, 'mallory');
ok($dual->{$_}, "… for others' writes: $_") for ('mapping', 't check', 't before row trigger');

$node->stop;
done_testing();
