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
	# (PostgreSQL takes a cancel that comes at the same moment as a lock_timeout for that alone.)
	poll("$what is cancelled", sub { (value($node, "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE application_name = 'dba'") // '') eq '0' });
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

# Background work beside LOCK TABLE: the worker gives up soon and tries again, and nobody waits behind it, but for who is in its way.
# Gates hold it at each of its steps until the lock is there: while one is closed, its step fails as for a lock.
$node->safe_psql('postgres', <<'SQL');
CREATE TABLE closed (gate text PRIMARY KEY);
CREATE FUNCTION held_up(v text, id int) RETURNS text IMMUTABLE LANGUAGE plpgsql AS $$
BEGIN
    IF id % 1000 = 0 AND EXISTS (SELECT FROM public.closed WHERE gate = 'mapping') THEN RAISE SQLSTATE '55P03' USING MESSAGE = 'mapping is closed'; END IF;
    RETURN v;
END $$;
CREATE FUNCTION hold_up() RETURNS event_trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT FROM public.closed WHERE gate = TG_TAG) AND (TG_TAG = 'CREATE INDEX' OR EXISTS (SELECT FROM pg_constraint WHERE conname = 'of_note' AND NOT convalidated)) THEN
        RAISE SQLSTATE '55P03' USING MESSAGE = TG_TAG || ' is closed';
    END IF;
END $$;
CREATE EVENT TRIGGER hold_up ON ddl_command_start EXECUTE FUNCTION hold_up();

-- Two attempts of the worker's: how many there were, whether one took longer than a second, and whether the writer was waiting for it.
CREATE FUNCTION two_attempts(worker int, writer int, OUT attempts int, OUT long boolean, OUT behind boolean) LANGUAGE plpgsql AS $$
DECLARE
    began timestamptz := clock_timestamp();
    since timestamptz;
BEGIN
    attempts := 0;
    long := false;
    behind := false;
    WHILE attempts < 2 AND clock_timestamp() < began + interval '30 s' LOOP
        IF EXISTS (SELECT FROM pg_locks WHERE pid = worker AND NOT granted) THEN
            since := coalesce(since, clock_timestamp());
        ELSIF since IS NOT NULL THEN
            attempts := attempts + 1;
            long := long OR clock_timestamp() > since + interval '1 s';
            since := NULL;
        END IF;
        behind := behind OR worker = ANY (pg_blocking_pids(writer));
        PERFORM pg_sleep(0.01);
    END LOOP;
END $$;
SQL

sub gate
{
	my ($gate, $is_closed) = @_;
	$node->safe_psql('postgres', $is_closed ? "INSERT INTO closed VALUES ('$gate')" : "DELETE FROM closed WHERE gate = '$gate'");
	return;
}

sub stands_before
{
	my ($gate) = @_;
	wait_for($node, "the worker stands before $gate", "SELECT count(*) > 0 FROM pg_stat_activity WHERE backend_type = 'migrate_ext worker' AND query LIKE 'waits % after: $gate is closed'");
	return;
}

# The worker's step behind that gate, beside the lock; afterwards the gate is closed, and the lock gone. A writer of the source waits for its
# holder, as it would without us. $beside: instead of the writer, what is to be had meanwhile.
sub gives_up
{
	my ($step, $gate, $table, $mode, $beside) = @_;
	my $what = "$step beside $mode on $table";
	stands_before($gate);
	my ($holder) = hold("LOCK TABLE $table IN $mode MODE") =~ /(\d+)/;
	my ($writer, $pid, $out, $error) = (undef, 0, '', '');
	if (!$beside)
	{
		$writer = IPC::Run::start([ 'psql', '-X', '-q', '-d', $node->connstr('postgres') . ' application_name=writer', '-c', "UPDATE note SET v = '$what' WHERE id = 7" ],
			'>', \$out, '2>', \$error);
		$pid = poll('the writer waits', sub { value($node, "SELECT pid FROM pg_stat_activity WHERE application_name = 'writer' AND wait_event_type = 'Lock'") });
	}
	gate($gate, 0);
	my ($worker) = worker_pids($node);
	is($node->safe_psql('postgres', "SELECT * FROM two_attempts($worker, $pid)"), '2|f|f', "$what: it gives up and tries again, and the writer is never behind it");
	is(error_of($node, "SET statement_timeout = '10 s'; SELECT state FROM migrate.progress"), '', "$what: progress can be read");
	if ($beside)
	{
		is(error_of($node, "SET lock_timeout = '5 s'; $beside"), '', "$what: $beside");
		wait_for($node, "$what: the holder is named", "SELECT last_error LIKE '55P03: % in the way: PID $holder %' FROM migrate.progress WHERE migration = 'notes'");
	}
	else
	{
		is($node->safe_psql('postgres', "SELECT pg_blocking_pids($pid)"), "{$holder}", "$what: but behind who holds the lock");
	}
	gate($gate, 1);
	# An attempt that has begun before still sees the gate open.
	wait_for($node, "$what: that attempt is over", "SELECT count(*) = 0 FROM pg_locks WHERE pid = $worker AND NOT granted");
	release();
	$writer->finish if $writer;
	is($error, '', "$what: the writer has no error");
	return;
}

subtest 'a worker beside LOCK TABLE' => sub {
	$node->safe_psql('postgres', <<'SQL');
CREATE TABLE note (id int PRIMARY KEY, v text);
CREATE TABLE memo (id int PRIMARY KEY CONSTRAINT of_note REFERENCES note, v text);
CREATE INDEX memo_v ON memo (v);
INSERT INTO note SELECT i, 'note ' || i FROM generate_series(1, 3000) i;
SELECT migrate.define('notes', 'note', 'memo', 'id, held_up(v, id) AS v', reverse => 'id, v', on_target_delete => 'delete');
INSERT INTO closed VALUES ('mapping'), ('CREATE INDEX'), ('ALTER TABLE');
SELECT migrate.start('notes');
SQL
	my $share = 'BEGIN; LOCK TABLE memo IN SHARE MODE; COMMIT';    # as its holder has it, who is not in the way
	gives_up('backfill', 'mapping', 'note', 'ACCESS EXCLUSIVE');
	gives_up('backfill', 'mapping', 'memo', 'SHARE');
	gate('mapping', 0);
	gives_up('building an index', 'CREATE INDEX', 'memo', 'ACCESS EXCLUSIVE');
	gives_up('building an index', 'CREATE INDEX', 'memo', 'SHARE', $share);
	gate('CREATE INDEX', 0);
	gives_up('validating a key', 'ALTER TABLE', 'memo', 'SHARE', $share);
	gives_up('validating a key', 'ALTER TABLE', 'note', 'ACCESS EXCLUSIVE');
	stands_before('ALTER TABLE');
	# It needs both tables. Whoever locks them in the other order has no deadlock.
	my $crossing = background($node);
	$crossing->query_safe($_) for 'BEGIN', 'LOCK TABLE note IN EXCLUSIVE MODE';
	gate('mapping', 1);
	gate('ALTER TABLE', 0);
	my ($worker) = worker_pids($node);
	wait_for($node, 'the worker waits for it', "SELECT count(*) > 0 FROM pg_locks WHERE pid = $worker AND NOT granted");
	ok(eval { $crossing->query_safe('LOCK TABLE memo IN EXCLUSIVE MODE'); 1 }, 'who locks one table after the other has no deadlock') or diag($@);
	eval { $crossing->query_safe('ROLLBACK') };
	eval { $crossing->quit };
	gives_up('validation', 'mapping', 'note', 'ACCESS EXCLUSIVE');
	gives_up('validation', 'mapping', 'memo', 'ACCESS EXCLUSIVE');
	gate('mapping', 0);
	wait_phase($node, 'ready', 'notes');
	is($node->safe_psql('postgres', 'SELECT count(*) FROM note FULL JOIN memo USING (id) WHERE note.v IS DISTINCT FROM memo.v'), 0, 'no row differs');
	is($node->safe_psql('postgres', "SELECT indisvalid FROM pg_index WHERE indexrelid = 'memo_v'::regclass"), 't', 'the index is there');
	is($node->safe_psql('postgres', "SELECT convalidated FROM pg_constraint WHERE conname = 'of_note'"), 't', 'and the foreign key');
	$node->safe_psql('postgres', 'DROP EVENT TRIGGER hold_up');
};

$node->stop;
done_testing();
