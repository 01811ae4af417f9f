# Whoever holds a lock on the tables or the views: each verb backs off, holds nothing of the application's between its attempts,
# names who is in the way when its time is up, leaves everything as it was (also when it is cancelled meanwhile), and works when
# the way is free.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use IPC::Run ();
use MigrateTest;
use Test::More;

# (No autovacuum: what holds a lock here is to be known.)
my $node = new_server('lock_holders', conf => "autovacuum = off\nmax_parallel_workers = 0\n");
make_users($node, 3000);
define_users($node, batch_size => 3000);
$node->safe_psql('postgres', <<'SQL');
SELECT migrate.add_view('users_to_profiles', view => 'profile');
CREATE TABLE orders (id int PRIMARY KEY, item text);
CREATE TABLE purchases (id int PRIMARY KEY, item text);
INSERT INTO orders SELECT i, 'item ' || i FROM generate_series(1, 1000) i;
SQL

sub define_orders
{
	$node->safe_psql('postgres', <<'SQL');
SELECT migrate.define('orders', source => 'orders', target => 'purchases', on_target_delete => 'delete');
SELECT migrate.add_view('orders', view => 'orders', shape => 'source');
SQL
	return;
}

# Everything that a verb might change: triggers, views and tables, sequences, our own rows.
sub state
{
	return $node->safe_psql('postgres', <<'SQL');
SELECT md5(concat_ws(' ',
    (SELECT string_agg(concat_ws(',', tgrelid, tgname, tgenabled, xmin), ';' ORDER BY tgrelid, tgname) FROM pg_trigger),
    (SELECT string_agg(concat_ws(',', oid, relname, relkind, relacl, CASE WHEN relkind = 'v' THEN pg_get_viewdef(oid) END), ';' ORDER BY oid)
     FROM pg_class WHERE relnamespace IN ('public'::regnamespace, 'migrate'::regnamespace) AND relkind <> 'S'),
    (SELECT string_agg(m::text, ';' ORDER BY id) FROM migrate._migration m), (SELECT string_agg(f::text, ';' ORDER BY id) FROM migrate._flow f),
    (SELECT string_agg(v::text, ';' ORDER BY view) FROM migrate._view v), (SELECT count(*) FROM migrate._event)))
SQL
}

# A session that stays open in a transaction; ended by release().
my @held;

sub hold
{
	my (@statements) = @_;
	my $session = background($node);
	$session->query_safe($_) for 'BEGIN', @statements;
	push @held, $session;
	return 'PID ' . $session->query_safe('SELECT pg_backend_pid()');
}

sub prepared
{
	my ($gid, @statements) = @_;
	$node->safe_psql('postgres', join '; ', 'BEGIN', @statements, "PREPARE TRANSACTION '$gid'");
	return "prepared transaction '$gid'";
}

# A statement that waits for somebody, with the locks it has; known by the comment it begins with.
sub stuck
{
	my ($name, $statement) = @_;
	my $run = IPC::Run::start([ 'psql', '-X', '-d', $node->connstr('postgres'), '-c', "/* $name */ $statement" ], '>', \my $out, '2>', \my $error);
	push @held, { run => $run, name => $name };
	return 'PID ' . poll("$name is stuck", sub {
			value($node, "SELECT pid FROM pg_stat_activity WHERE query LIKE '/* $name */%' AND wait_event IS NOT NULL AND state = 'active'
				AND EXISTS (SELECT FROM pg_locks l WHERE l.pid = pg_stat_activity.pid AND l.relation = 'users'::regclass AND l.granted)") });
}

sub release
{
	for my $held (reverse splice @held)
	{
		if (ref $held eq 'HASH')
		{
			value($node, "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE query LIKE '/* $held->{name} */%'");
			$held->{run}->finish;
			next;
		}
		eval { $held->query_safe('ROLLBACK') };
		$held->quit;
	}
	$node->safe_psql('postgres', "ROLLBACK PREPARED '$_'")
	  for split /\n/, $node->safe_psql('postgres', 'SELECT gid FROM pg_prepared_xacts');
	return;
}

sub set
{
	my ($migration, $timeout) = @_;
	$node->safe_psql('postgres', "SELECT migrate.set('$migration', 'cutover_timeout', '$timeout')");
	return;
}

# The verb while it waits: seen to hold no lock on anything of the application's. Then the DBA loses patience (Ctrl-C).
sub waits_politely
{
	my ($what, $migration, $call) = @_;
	set($migration, '60 s');
	my $before = state();
	my $run = IPC::Run::start(
		[ 'psql', '-X', '-v', 'VERBOSITY=verbose', '-d', $node->connstr('postgres') . ' application_name=dba', '-c', "SELECT $call" ],
		'>', \my $out, '2>', \my $error);
	my $seen = poll("$what waits without locks", sub {
			value($node, <<'SQL') || 0 });
SELECT count(*) FROM pg_stat_activity a
WHERE a.application_name = 'dba' AND a.wait_event IN ('PgSleep', 'Extension') AND NOT EXISTS (
    SELECT FROM pg_locks l JOIN pg_class c ON c.oid = l.relation
    WHERE l.pid = a.pid AND (c.relnamespace = 'public'::regnamespace OR c.relname LIKE 'flow\_%'))
SQL
	ok($seen, "$what holds no lock between its attempts") if $seen;
	like($node->safe_psql('postgres', "SELECT count(*), max(phase) FROM migrate.progress WHERE migration = '$migration'"), qr/^1\|/,
		"$what: progress can be read meanwhile");
	value($node, "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE application_name = 'dba'");
	eval { $run->finish };
	like($error, qr/ERROR:  57014/, "$what ends when it is cancelled");
	is(state(), $before, "$what, cancelled: nothing has changed");
	return;
}

# The verb is refused within its time and names each of @who.
sub refused
{
	my ($what, $migration, $call, @who) = @_;
	set($migration, '1 s');
	my $before = state();
	my $error = error_of($node, "SELECT $call");
	like($error, qr/ERROR:  55P03.*within cutover_timeout \(1000 ms\)/s, "$what is refused when its time is up");
	like($error, qr/\Q$_\E(?!\d)/, "$what names $_") for @who;
	is(state(), $before, "$what, refused: nothing has changed");
	return $error;
}

sub succeeds
{
	my ($what, $migration, $call) = @_;
	release();
	set($migration, '60 s');
	is(error_of($node, "SELECT $call"), '', "$what when the way is free");
	return;
}

my $m = 'users_to_profiles';

subtest 'start' => sub {
	my $start = "migrate.start('$m')";
	my $error = refused('start', $m, $start, prepared('branch', "UPDATE users SET name = 'prepared' WHERE id = 1"));
	like($error, qr/HINT:.*(COMMIT|ROLLBACK) PREPARED 'branch'/, 'the hint says how a prepared transaction is ended');
	waits_politely('start', $m, $start);
	release();
	refused('start beside LOCK TABLE', $m, $start, hold('LOCK TABLE users IN SHARE MODE'));
	release();
	# A vacuum that waits for somebody's pin of a page.
	hold('DECLARE pin CURSOR FOR SELECT * FROM users', 'FETCH pin');
	refused('start beside VACUUM', $m, $start, stuck('vacuum', 'VACUUM (FREEZE, DISABLE_PAGE_SKIPPING) users'));
	release();
	# It waits for the older snapshot of a report.
	hold('SET TRANSACTION ISOLATION LEVEL REPEATABLE READ', 'SELECT count(*) FROM orders');
	refused('start beside CREATE INDEX CONCURRENTLY', $m, $start, stuck('index', 'CREATE INDEX CONCURRENTLY users_name ON users (name)'));
	release();
	$node->safe_psql('postgres', 'DROP INDEX users_name');
	hold('SET TRANSACTION ISOLATION LEVEL REPEATABLE READ', 'SELECT count(*) FROM orders');
	refused('start beside REINDEX CONCURRENTLY', $m, $start, stuck('reindex', 'REINDEX INDEX CONCURRENTLY users_pkey'));
	release();
	$node->safe_psql('postgres', "DROP INDEX IF EXISTS users_pkey_ccnew");
	succeeds('start', $m, $start);
	wait_phase($node, 'ready');
};

subtest 'retry arms again' => sub {
	$node->safe_psql('postgres', 'ALTER TABLE users DISABLE TRIGGER USER');
	my $first = hold("UPDATE users SET bio = 'first' WHERE id = 7");
	refused('retry', $m, "migrate.retry('$m')", $first, stuck('second', "UPDATE users SET bio = 'second' WHERE id = 7"));
	waits_politely('retry', $m, "migrate.retry('$m')");
	succeeds('retry', $m, "migrate.retry('$m')");
	wait_phase($node, 'ready');
};

subtest 'cutover' => sub {
	my $cutover = "migrate.cutover('$m')";
	refused('cutover', $m, $cutover, hold('SELECT count(*) FROM profile'), prepared('views', 'SELECT count(*) FROM profile', "UPDATE users SET bio = 'x' WHERE id = 9"));
	waits_politely('cutover', $m, $cutover);
	release();
	refused('cutover beside a report', $m, $cutover,
		hold('SET TRANSACTION ISOLATION LEVEL REPEATABLE READ', 'SELECT count(*) FROM orders'));
	waits_politely('cutover beside a report', $m, $cutover);
	succeeds('cutover', $m, $cutover);
};

subtest 'rollback' => sub {
	my $rollback = "migrate.rollback('$m')";
	refused('rollback', $m, $rollback, hold('LOCK TABLE user_profiles IN ROW EXCLUSIVE MODE'), prepared('target', "UPDATE user_profiles SET bio = 'x' WHERE user_id = 9"));
	waits_politely('rollback', $m, $rollback);
	succeeds('rollback', $m, $rollback);
};

subtest 'finalize' => sub {
	$node->safe_psql('postgres', "SELECT migrate.cutover('$m')");
	my $finalize = "migrate.finalize('$m', force => '$m')";
	refused('finalize', $m, $finalize, hold('SELECT count(*) FROM users'), prepared('source', "UPDATE users SET bio = 'x' WHERE id = 9"));
	waits_politely('finalize', $m, $finalize);
	succeeds('finalize', $m, $finalize);
	is(differing($node), 0, 'no row differs');
};

subtest 'cancel, where the source has stepped aside' => sub {
	define_orders();
	is(error_of($node, "SELECT migrate.start('orders')"), '', 'started');
	wait_phase($node, 'ready', 'orders');
	# The view itself is free: it must not be held while the table is waited for.
	refused('cancel', 'orders', "migrate.cancel('orders')", hold("UPDATE orders_migrate SET item = 'held' WHERE id = 1"));
	waits_politely('cancel', 'orders', "migrate.cancel('orders')");
	release();
	refused('cancel beside a reader', 'orders', "migrate.cancel('orders')", hold('SELECT count(*) FROM orders'));
	succeeds('cancel', 'orders', "migrate.cancel('orders')");
	is($node->safe_psql('postgres', "SELECT relkind FROM pg_class WHERE oid = 'orders'::regclass"), 'r', 'the source has its name again');
	$node->safe_psql('postgres', "SELECT migrate.drop('orders')");
};

subtest 'drop' => sub {
	define_orders();
	refused('drop', 'orders', "migrate.drop('orders')", hold('SELECT count(*) FROM orders'));
	waits_politely('drop', 'orders', "migrate.drop('orders')");
	release();
	# A validation of a migration that has been cancelled: drop does not wait for its end either.
	my $validating = hold("SELECT verdict FROM migrate.validate('orders', 'counts')");
	refused('drop beside validate', 'orders', "migrate.drop('orders')", $validating);
	succeeds('drop', 'orders', "migrate.drop('orders')");
	is($node->safe_psql('postgres', "SELECT relkind FROM pg_class WHERE oid = 'orders'::regclass"), 'r', 'the source has its name again');
};

# A foreign key that goes is dropped on both tables: so whoever reads the one it references is in the way, and is named.
subtest 'a swap, and the table that its source references' => sub {
	$node->safe_psql('postgres', <<'SQL');
CREATE TABLE clients (id int PRIMARY KEY);
CREATE TABLE bills (id int PRIMARY KEY, client int CONSTRAINT of_client REFERENCES clients);
CREATE TABLE bills_new (id bigint PRIMARY KEY, client int);
INSERT INTO clients VALUES (1);
INSERT INTO bills SELECT i, 1 FROM generate_series(1, 100) i;
SELECT migrate.define('bills', 'bills', 'bills_new', on_target_delete => 'delete'), migrate.set('bills', 'cutover', 'swap'), migrate.start('bills');
SQL
	wait_phase($node, 'ready', 'bills');
	my $read = 'SELECT count(*) FROM clients';
	refused('the rehearsal of a rollback', 'bills', "migrate.rollback('bills', dry_run => true)", hold($read));
	is(error_of($node, "SELECT migrate.cutover('bills')"), '', 'cutover drops no key: a reader is not in its way');
	release();
	wait_for($node, 'the foreign key is validated', "SELECT bool_and(convalidated) FROM pg_constraint WHERE conname = 'of_client'");
	refused('rollback', 'bills', "migrate.rollback('bills')", hold($read));
	waits_politely('rollback', 'bills', "migrate.rollback('bills')");
	succeeds('rollback', 'bills', "migrate.rollback('bills')");
	wait_for($node, 'the foreign key is validated', "SELECT bool_and(convalidated) FROM pg_constraint WHERE conname = 'of_client'");
	$node->safe_psql('postgres', "SELECT migrate.cutover('bills')");
	wait_for($node, 'the foreign key is validated', "SELECT bool_and(convalidated) FROM pg_constraint WHERE conname = 'of_client'");
	hold($read);
	is(error_of($node, "SELECT migrate.finalize('bills', force => 'bills', dry_run => true)"), '', 'finalize that drops no table: neither');
	release();
	my $finalize = "migrate.finalize('bills', drop_source => true, force => 'bills')";
	refused('finalize that drops the source', 'bills', $finalize, hold($read));
	waits_politely('finalize that drops the source', 'bills', $finalize);
	succeeds('finalize that drops the source', 'bills', $finalize);
	is($node->safe_psql('postgres', "SELECT to_regclass('bills_old') IS NULL"), 't', 'and it is gone');
};

$node->stop;
done_testing();
