# State, not events, where it takes several sessions, workers or servers: two-phase commit across batches and switches, gaps
# in the dual writes (triggers, partitions), a real subscription that writes the source, plans gone stale, rows of many MB.
use strict;
use warnings;
use Digest::MD5 qw(md5_hex);
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use PostgreSQL::Test::Cluster;
use PostgreSQL::Test::Utils;
use Test::More;

my $node = new_server('state');

# Both differences of two queries, by SQL that owes nothing to the extension.
sub differences
{
	my ($left, $right, $db) = @_;
	return $node->safe_psql($db, "WITH a AS ($left), b AS ($right) SELECT count(*) FROM ((TABLE a EXCEPT ALL TABLE b) UNION ALL (TABLE b EXCEPT ALL TABLE a)) x");
}

sub new_database
{
	my ($db) = @_;
	$node->safe_psql('postgres', "CREATE DATABASE $db");
	$node->safe_psql($db, 'CREATE EXTENSION migrate_ext');
	return $db;
}

# The writes of a transaction that is prepared as $gid: each kind, on rows from $id on.
sub prepare
{
	my ($db, $gid, $table, $key, $name, $id) = @_;
	$node->safe_psql($db, <<"SQL");
BEGIN;
UPDATE $table SET $name = '$gid' WHERE $key = $id;
DELETE FROM $table WHERE $key = $id + 1;
UPDATE $table SET $key = $key + 500000 WHERE $key = $id + 2;
INSERT INTO $table ($key, $name, created_at) VALUES ($id + 600000, '$gid', now());
PREPARE TRANSACTION '$gid';
SQL
	return;
}

# How many rows bear the name of a prepared transaction on each side.
sub named
{
	my ($db, $gid) = @_;
	return $node->safe_psql($db, "SELECT (SELECT count(*) FROM users WHERE name = '$gid'), (SELECT count(*) FROM user_profiles WHERE display_name = '$gid')");
}

subtest 'two-phase commit' => sub {
	my $db = new_database('two_phase');
	make_users($node, 2000, db => $db);
	define_users($node, db => $db, cutover_timeout => '1 s', batch_size => 100, max_rows_per_second => 200);
	prepare($db, 'before start', 'users', 'id', 'name', 10);
	like(error_of($node, "SELECT migrate.start('users_to_profiles')", db => $db), qr/prepared transaction 'before start'/, 'start names what it waits for');
	is(phase($node, undef, $db), 'planned', 'and nothing has changed');
	$node->safe_psql($db, "COMMIT PREPARED 'before start'");
	$node->safe_psql($db, "SELECT migrate.start('users_to_profiles')");
	wait_for($node, 'the first batch', 'SELECT sum(rows_done) > 0 FROM migrate._range', 't', $db);
	prepare($db, 'kept', 'users', 'id', 'name', 1500);
	prepare($db, 'lost', 'users', 'id', 'name', 1600);
	wait_for($node, 'the worker names the prepared transactions',
		q{SELECT count(*) = 1 FROM migrate._pace WHERE note LIKE '%prepared transaction ''kept'', prepared transaction ''lost''%'}, 't', $db);
	is(phase($node, undef, $db), 'backfilling', 'the backfill waits for what is locked');
	$node->safe_psql($db, "ROLLBACK PREPARED 'lost'");
	$node->safe_psql($db, "COMMIT PREPARED 'kept'");
	wait_phase($node, 'ready', 'users_to_profiles', $db);
	is(differing($node, $db), 0, 'no row differs after PREPARE before a batch, COMMIT and ROLLBACK PREPARED after it');
	is(named($db, 'kept') . ' ' . named($db, 'lost') . ' ' . named($db, 'before start'), '2|2 0|0 2|2', 'what was committed is on both sides, what was not on neither');

	prepare($db, 'at cutover', 'users', 'id', 'name', 100);
	like(error_of($node, "SELECT migrate.cutover('users_to_profiles')", db => $db), qr/prepared transaction 'at cutover' holds ROW EXCLUSIVE on public.user_profiles, ROW EXCLUSIVE on public.users/, 'cutover names it');
	is(phase($node, undef, $db), 'ready', 'the source still serves');
	$node->safe_psql($db, "COMMIT PREPARED 'at cutover'");
	$node->safe_psql($db, "SELECT migrate.cutover('users_to_profiles')");
	is(differing($node, $db) . ' ' . named($db, 'at cutover'), '0 2|2', 'its writes are on both sides after the cutover');

	prepare($db, 'gone', 'user_profiles', 'user_id', 'display_name', 200);
	prepare($db, 'at rollback', 'user_profiles', 'user_id', 'display_name', 300);
	like(error_of($node, "SELECT migrate.rollback('users_to_profiles')", db => $db), qr/prepared transaction 'at rollback'.*prepared transaction 'gone'|prepared transaction 'gone'.*prepared transaction 'at rollback'/s,
		'rollback names both');
	$node->safe_psql($db, "ROLLBACK PREPARED 'gone'");
	$node->safe_psql($db, "COMMIT PREPARED 'at rollback'");
	$node->safe_psql($db, "SELECT migrate.rollback('users_to_profiles')");
	is(differing($node, $db) . ' ' . named($db, 'at rollback') . ' ' . named($db, 'gone'), '0 2|2 0|0', 'nothing written to the target is lost by the rollback');
};

# What a DBA does after a gap: cutover is refused and says retry; retry validates anew; what it finds is repaired; retry again.
sub repair_gap
{
	my ($db, $what, $kind) = @_;
	like(error_of($node, "SELECT migrate.cutover('parts')", db => $db), qr/refused by gate.*dual_writes.*SELECT migrate\.retry\('parts'\)/s, "$what: cutover is refused, and names retry");
	$node->safe_psql($db, "SELECT migrate.retry('parts')");
	my $error = error_of($node, "CALL migrate.wait('parts', timeout => '60 s')", db => $db);
	if (!defined $kind)
	{
		is($error, '', "$what: ready again");
		return;
	}
	like($error, qr/mismatch.*migrate\.mismatches/s, "$what: a full validation finds what passed the dual writes");
	is($node->safe_psql($db, "SELECT DISTINCT kind FROM migrate.mismatches('parts')"), $kind, "$what: rows are $kind");
	$node->safe_psql($db, "SELECT migrate.repair('parts', execute => true)");
	$node->safe_psql($db, "SELECT migrate.retry('parts')");
	is(error_of($node, "CALL migrate.wait('parts', timeout => '60 s')", db => $db), '', "$what: ready after repair and retry");
	is(differences('SELECT id, v FROM p', 'SELECT id, v FROM q', $db), 0, "$what: no row differs");
	return;
}

subtest 'gaps' => sub {
	my $db = new_database('gaps');
	$node->safe_psql($db, <<'SQL');
CREATE TABLE p (id int PRIMARY KEY, v text) PARTITION BY RANGE (id);
CREATE TABLE p_1 PARTITION OF p FOR VALUES FROM (0) TO (1000);
CREATE TABLE p_2 PARTITION OF p FOR VALUES FROM (1000) TO (2000);
CREATE TABLE p_3 (v text, id int NOT NULL);
CREATE TABLE p_5 (id int NOT NULL, v text);
CREATE TABLE q (id int PRIMARY KEY, v text) PARTITION BY HASH (id);
CREATE TABLE q_0 PARTITION OF q FOR VALUES WITH (MODULUS 2, REMAINDER 0);
CREATE TABLE q_1 PARTITION OF q FOR VALUES WITH (MODULUS 2, REMAINDER 1);
INSERT INTO p SELECT g, 'v' || g FROM generate_series(0, 1999) g;
INSERT INTO p_3 SELECT 'v' || g, g FROM generate_series(2000, 2999) g;
INSERT INTO p_5 SELECT g, 'v' || g FROM generate_series(4000, 4009) g;
SELECT migrate.define('parts', 'p', 'q', on_target_delete => 'delete');
SELECT migrate.set('parts', 'batch_size', '100');
SELECT migrate.set('parts', 'max_rows_per_second', '500');
SELECT migrate.start('parts');
SQL
	wait_for($node, 'the first batch', 'SELECT sum(rows_done) > 0 FROM migrate._range', 't', $db);
	$node->safe_psql($db, 'ALTER TABLE p ATTACH PARTITION p_5 FOR VALUES FROM (4000) TO (5000)');
	wait_for($node, 'the worker notices a partition attached', "SELECT failed_reason LIKE '%partition attached or detached. SELECT migrate.retry(%' FROM migrate._migration", 't', $db);
	$node->safe_psql($db, "SELECT migrate.set('parts', 'max_rows_per_second', 'default')");
	$node->safe_psql($db, "SELECT migrate.retry('parts')");
	wait_for($node, 'its rows are found missing', "SELECT failed_reason LIKE 'mismatch%10 missing%' FROM migrate._migration", 't', $db);
	$node->safe_psql($db, "SELECT migrate.repair('parts', execute => true)");
	$node->safe_psql($db, "SELECT migrate.retry('parts')");
	is(error_of($node, "CALL migrate.wait('parts', timeout => '60 s')", db => $db), '', 'ready after repair and retry');

	$node->safe_psql($db, 'ALTER TABLE p ATTACH PARTITION p_3 FOR VALUES FROM (2000) TO (3000)');
	repair_gap($db, 'ATTACH', 'missing');
	$node->safe_psql($db, 'INSERT INTO p_3 VALUES (\'new\', 2500) ON CONFLICT (id) DO UPDATE SET v = excluded.v; DELETE FROM p WHERE id = 1203; UPDATE p SET id = id + 1200 WHERE id = 3; DELETE FROM p WHERE id = 4; TRUNCATE p_5');
	is(differences('SELECT id, v FROM p', 'SELECT id, v FROM q', $db), 0, 'writes to the attached partition are carried, and a TRUNCATE of one');
	$node->safe_psql($db, 'ALTER TABLE p DETACH PARTITION p_2');
	repair_gap($db, 'DETACH', 'extra');
	$node->safe_psql($db, 'ALTER TABLE p DETACH PARTITION p_3' . (server_major() >= 14 ? ' CONCURRENTLY' : ''));
	repair_gap($db, 'DETACH CONCURRENTLY', 'extra');
	$node->safe_psql($db, 'INSERT INTO p VALUES (4444, \'x\'); DROP TABLE p_5');
	repair_gap($db, 'DROP of a partition', 'extra');
	$node->safe_psql($db, "CREATE TABLE p_6 PARTITION OF p FOR VALUES FROM (5000) TO (6000); INSERT INTO p_6 SELECT g, 'v' FROM generate_series(5000, 5100) g; UPDATE p SET id = id + 5500 WHERE id BETWEEN 5 AND 10");
	is(differences('SELECT id, v FROM p', 'SELECT id, v FROM q', $db), 0, 'a partition made since is carried');
	repair_gap($db, 'CREATE of a partition', undef);
	$node->safe_psql($db, "BEGIN; CREATE TABLE p_7 PARTITION OF p FOR VALUES FROM (7000) TO (8000); INSERT INTO p SELECT g, 'v' FROM generate_series(7000, 7010) g; DROP TABLE p_7; COMMIT");
	repair_gap($db, 'a partition that was there between two looks only', 'extra');
	for my $all ('ALL', 'USER')
	{
		$node->safe_psql($db, "ALTER TABLE p_1 DISABLE TRIGGER $all; UPDATE p SET v = 'passed by, $all' WHERE id BETWEEN 100 AND 110; ALTER TABLE p_1 ENABLE TRIGGER $all");
		repair_gap($db, "DISABLE TRIGGER $all", 'different');
	}
	my ($trigger) = split /\n/, $node->safe_psql($db, "SELECT quote_ident(tgname) FROM pg_trigger WHERE tgrelid = 'p_1'::regclass AND NOT tgisinternal AND tgname LIKE '!migrate%' ORDER BY tgname");
	$node->safe_psql($db, "BEGIN; ALTER TABLE p_1 DISABLE TRIGGER $trigger; ALTER TABLE p_1 ENABLE ALWAYS TRIGGER $trigger; COMMIT");
	repair_gap($db, 'DISABLE and ENABLE ALWAYS in one transaction', undef);
	$node->safe_psql($db, 'TRUNCATE ONLY p_1; TRUNCATE p');
	is(differences('SELECT id, v FROM p', 'SELECT id, v FROM q', $db) . $node->safe_psql($db, 'SELECT count(*) FROM q'), '00', 'TRUNCATE of the parent');
	$node->safe_psql($db, "INSERT INTO p SELECT g, 'v' || g FROM generate_series(0, 99) g");
	$node->safe_psql($db, "SELECT migrate.cutover('parts')");

	# A gap in the rollback window: what passed the dual writes then would be lost by a rollback.
	$node->safe_psql($db, "ALTER TABLE q_0 DISABLE TRIGGER ALL; UPDATE q SET v = 'passed by' WHERE id < 50; ALTER TABLE q_0 ENABLE TRIGGER ALL; UPDATE q SET id = id + 100, v = 'carried' WHERE id = 60");
	like(error_of($node, "SELECT migrate.rollback('parts')", db => $db), qr/refused by gate dual_writes/, 'a gap in the rollback window: rollback is refused');
	$node->safe_psql($db, "SELECT migrate.retry('parts')");
	like(error_of($node, "SELECT migrate.rollback('parts')", db => $db), qr/refused by gate validation.*migrate\.validate/s, 'and after retry, until it is validated');
	like($node->safe_psql($db, "SELECT mismatches > 0, verdict FROM migrate.validate('parts')"), qr/t\|mismatch/, 'validation finds it');
	$node->safe_psql($db, "SELECT migrate.repair('parts', execute => true)");
	like(error_of($node, "SELECT migrate.rollback('parts')", db => $db), qr/refused by gate validation/, 'repaired rows are validated again');
	$node->safe_psql($db, "SELECT * FROM migrate.validate('parts')");
	$node->safe_psql($db, "SELECT migrate.rollback('parts')");
	is(differences('SELECT id, v FROM p', 'SELECT id, v FROM q', $db), 0, 'no row differs');
	is($node->safe_psql($db, "SELECT count(*) FROM p WHERE v = 'passed by'") > 10, 1, 'and what passed by is in the source');
};

subtest 'subscription' => sub {
	my $publisher = PostgreSQL::Test::Cluster->new('publisher');
	$publisher->init(allows_streaming => 'logical');
	$publisher->start;
	my $db = new_database('subscriber');
	make_users($node, 0, db => $db);
	# A row could be refused: so every dual write is in a subtransaction, of which a transaction has only so many.
	$node->safe_psql($db, q{ALTER TABLE user_profiles ADD CHECK (display_name <> 'refused')});
	define_users($node, db => $db, on_target_delete => 'keep');
	$publisher->safe_psql('postgres', <<'SQL');
CREATE TABLE users (id bigint PRIMARY KEY, name text NOT NULL, bio text, created_at timestamptz NOT NULL DEFAULT now());
INSERT INTO users SELECT g, 'user ' || g, CASE WHEN g % 3 = 0 THEN repeat('long ', 2000) END FROM generate_series(1, 3000) g;
CREATE PUBLICATION pub FOR TABLE users;
SQL
	$node->safe_psql($db, "SELECT migrate.start('users_to_profiles')");
	wait_phase($node, 'ready', 'users_to_profiles', $db);
	my $connection = $publisher->connstr('postgres');
	$node->safe_psql($db, "CREATE SUBSCRIPTION sub CONNECTION \$c\$$connection\$c\$ PUBLICATION pub");
	wait_for($node, 'the initial copy', "SELECT count(*) = 1 FROM pg_subscription_rel WHERE srsubstate = 'r'", 't', $db);
	is(differing($node, $db) . ' ' . $node->safe_psql($db, 'SELECT count(*) FROM user_profiles'), '0 3000', 'the rows that the table synchronization copied are carried');
	my $writes = sub {
		my ($tag) = @_;
		$publisher->safe_psql('postgres', <<"SQL");
INSERT INTO users (id, name) SELECT g, '$tag' FROM generate_series(4000, 4100) g;
UPDATE users SET name = '$tag' WHERE id % 10 = 0; UPDATE users SET bio = NULL WHERE id % 7 = 0; UPDATE users SET bio = '$tag' WHERE bio IS NULL AND id % 11 = 0;
UPDATE users SET id = id + 10000 WHERE id BETWEEN 500 AND 520; DELETE FROM users WHERE id BETWEEN 600 AND 650; DELETE FROM users WHERE id >= 4050 AND id < 4100;
BEGIN; UPDATE users SET name = 'never'; SAVEPOINT a; DELETE FROM users WHERE id < 100; ROLLBACK TO a; ROLLBACK;
BEGIN; DELETE FROM users WHERE id = 700; SAVEPOINT a; DELETE FROM users WHERE id = 701; ROLLBACK TO a; INSERT INTO users (id, name) VALUES (700, '$tag'); COMMIT;
SQL
		$publisher->wait_for_catchup('sub');
		return;
	};
	$writes->('first');
	is(differing($node, $db) . ' ' . $node->safe_psql($db, "SELECT count(*) > 300 FROM user_profiles WHERE display_name = 'first'"), '0 t', 'what the apply worker writes is carried');
	$publisher->safe_psql('postgres', "TRUNCATE users; INSERT INTO users (id, name) VALUES (1, 'alone')");
	$publisher->wait_for_catchup('sub');
	is(differing($node, $db) . ' ' . $node->safe_psql($db, 'SELECT count(*) FROM user_profiles'), '0 1', 'a TRUNCATE that is replicated is carried');
	$publisher->safe_psql('postgres', "INSERT INTO users SELECT g, 'user ' || g FROM generate_series(2, 3000) g");
	$publisher->wait_for_catchup('sub');
	is(error_of($node, "SELECT migrate.cutover('users_to_profiles')", db => $db), '', 'cutover beside the apply worker');
	$writes->('after cutover');
	$node->safe_psql($db, "UPDATE user_profiles SET bio = 'by the target' WHERE user_id = 42");
	is(differing($node, $db) . ' ' . $node->safe_psql($db, "SELECT count(*) > 300 FROM user_profiles WHERE display_name = 'after cutover'"), '0 t', 'and after the cutover, too');
	is($node->safe_psql($db, 'SELECT count(*) FROM migrate._failure'), 0, 'nothing had to be recorded as a failure');
	$node->safe_psql($db, 'DROP SUBSCRIPTION sub');
	$publisher->stop;
};

# What a process has of memory of its own at its peak, in MB. (Shared buffers are 1 MB here.)
sub peak_mb
{
	my ($pid) = @_;
	my $status = PostgreSQL::Test::Utils::slurp_file("/proc/$pid/status");
	my ($peak) = $status =~ /^VmHWM:\s+(\d+) kB/m;
	my ($shared) = $status =~ /^RssShmem:\s+(\d+) kB/m;
	my ($file) = $status =~ /^RssFile:\s+(\d+) kB/m;
	return int(($peak - $shared - $file) / 1024);
}

# Rows of many MB: their number times their size never is in memory, here or in the application's session.
subtest 'large rows' => sub {
	my ($mb, $rows) = $ENV{MIGRATE_LONG} ? (100, 5) : (10, 8);
	my $db = new_database('large');
	$node->safe_psql($db, <<"SQL");
CREATE FUNCTION long(seed int) RETURNS text LANGUAGE sql AS \$\$ SELECT repeat(string_agg(md5((seed * 100000 + g)::text), ''), $mb) FROM generate_series(1, 32768) g \$\$;
CREATE TABLE s (id int PRIMARY KEY, small text, body text, raw bytea);
CREATE TABLE t (id int PRIMARY KEY, small text, body text, raw bytea);
ALTER TABLE s ALTER body SET STORAGE EXTERNAL, ALTER raw SET STORAGE EXTERNAL;
ALTER TABLE t ALTER body SET STORAGE EXTERNAL, ALTER raw SET STORAGE EXTERNAL;
INSERT INTO s SELECT g, 'small', long(g), CASE WHEN g = 1 THEN convert_to(long(9), 'UTF8') END FROM generate_series(1, $rows) g;
SELECT migrate.define('large', 's', 't');
SELECT migrate.start('large');
SQL
	my %peak;
	poll('the end of the validation', sub {
			for my $pid (worker_pids($node, $db))
			{
				my $now = eval { peak_mb($pid) } // 0;
				$peak{worker} = $now if $now > ($peak{worker} // 0);
			}
			return phase($node, 'large', $db) =~ /^ready|failed/;
		});
	is(phase($node, 'large', $db), 'ready', "rows of $mb MB are copied and validated");
	my $batches = $node->safe_psql($db, 'SELECT count(DISTINCT xmin::text) FROM t');
	cmp_ok($batches, '>=', $mb >= 100 ? $rows : $rows / 2, "in batches of few rows ($batches for $rows rows)");
	my $session = background($node, db => $db);
	my $pid = $session->query_safe('SELECT pg_backend_pid()');
	# The session's own share: what the same statements take on a table without dual writes.
	$session->query_safe($_) for 'CREATE TEMP TABLE own AS SELECT * FROM s WHERE id < 3', q{UPDATE own SET body = body || 'x' WHERE id = 1}, 'INSERT INTO own SELECT id + 10, small, body FROM own WHERE id = 2';
	my $own = peak_mb($pid);
	$session->query_safe($_) for q{UPDATE s SET small = 'unchanged long ones'}, q{UPDATE s SET body = body || 'x' WHERE id = 1}, 'UPDATE s SET body = NULL WHERE id = 2',
	  'INSERT INTO s SELECT id + 10, small, body FROM s WHERE id = 3', 'UPDATE s SET id = 20 WHERE id = 4', 'DELETE FROM s WHERE id = 5';
	$peak{backend} = peak_mb($pid);
	$session->quit;
	is(differences('SELECT id, small, md5(body), md5(raw) FROM s', 'SELECT id, small, md5(body), md5(raw) FROM t', $db), 0, 'and so is what the application does to them');
	like($node->safe_psql($db, "SELECT verdict FROM migrate.validate('large')"), qr/^equal$/, 'validate agrees');
	note("peaks in MB: worker $peak{worker}, application $peak{backend}, of which $own without dual writes");
	cmp_ok($peak{worker}, '<', 30 + 5 * $mb, 'the worker needs a few rows at most');
	cmp_ok($peak{backend}, '<', 30 + $own + 5 * $mb, 'and so does the application');
};

# Past 1 GB, where string_agg cannot go, and with no more memory; the digest is that of the same text by another program.
subtest 'an MD5 of more than 1 GB' => sub {
	my $rows = 1100;
	my $expected = Digest::MD5->new;
	$expected->add($_ > 1 ? ',' : '', md5_hex($_) x 32768) for 1 .. $rows;
	my $texts = "(SELECT repeat(md5(g::text), 32768) AS v FROM generate_series(1, $rows) g) x";
	my $session = background($node);
	my $pid = $session->query_safe('SELECT pg_backend_pid()');
	is($session->query_safe("SELECT migrate.md5_agg(v, ',') FROM $texts"), $expected->hexdigest, 'is right');
	cmp_ok(peak_mb($pid), '<', 64, 'in constant memory');
	$session->quit;
};

done_testing();
