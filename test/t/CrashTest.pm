# What the tests with debug points share (src/debug_point.hpp): a server that comes back after a crash, ways to arm a point and
# to see that it was reached, and one migration at a time, whose state is read from the catalog and whose acknowledged
# writes are remembered.
package CrashTest;

use strict;
use warnings;

use Exporter 'import';
use MigrateTest;
use Test::More;
use Time::HiRes qw(time usleep);

our @EXPORT = qw(crash_server run_sql log_position wait_for_log points_in_source arm_workers arm_session disarm_workers
  new_life bring whole writes comparison recover end_life start_over);

my $forget_kill = "COPY (SELECT) TO PROGRAM 'cat >/dev/null; rm -f migrate_debug_point';";
my $boss = [ '-U', 'boss' ];    # superuser of the tests: the bootstrap superuser's settings are for background workers

sub crash_server
{
	my ($name, %option) = @_;
	my $sync = server_major() >= 14 ? "recovery_init_sync_method = syncfs\n" : '';
	my $node = new_server($name, preload => $option{preload} // 1, conf => "fsync = on\n${sync}shared_buffers = 16MB\n" . ($option{conf} // ''));
	$node->safe_psql('postgres', <<'SQL');
CREATE ROLE boss SUPERUSER LOGIN;
CREATE ROLE app LOGIN;
-- The migration's state as the catalog has it: phase, dual-write triggers there and back, the side that the view reads, and whether
-- the target's index and its foreign key to itself, which are set aside for the copy, are there as they were.
CREATE FUNCTION state_of_m() RETURNS text LANGUAGE sql AS $$
    SELECT concat_ws(' ', coalesce((SELECT phase FROM migrate._migration WHERE name = 'm'), 'none'),
        (SELECT count(*) FROM pg_trigger WHERE tgname ~ '^!migrate_\d+_forward' AND tgenabled = 'A' AND tgrelid = to_regclass('users')),
        (SELECT count(*) FROM pg_trigger WHERE tgname ~ '^!migrate_\d+_reverse' AND tgenabled = 'A' AND tgrelid = to_regclass('user_profiles')),
        (SELECT CASE WHEN bool_or(d.refobjid = to_regclass('user_profiles')) THEN 'target' ELSE 'source' END
         FROM pg_rewrite r JOIN pg_depend d ON d.classid = 'pg_rewrite'::regclass AND d.objid = r.oid WHERE r.ev_class = to_regclass('profile')),
        (SELECT CASE count(*) WHEN 2 THEN 'all' ELSE 'aside' END FROM
            (SELECT FROM pg_index i WHERE i.indexrelid = to_regclass('profile_name') AND i.indisvalid AND obj_description(i.indexrelid, 'pg_class') = 'as it was'
             UNION ALL SELECT FROM pg_constraint k WHERE k.conrelid = to_regclass('user_profiles') AND k.conname = 'user_profiles_parent_fkey' AND k.convalidated) x))
$$;
-- Waits until m is in the phase and has no failures; says what stands in the way instead. Each look is a transaction of its own,
-- for a worker that builds an index waits for older ones.
CREATE PROCEDURE settle(goal text, idle_ms integer, INOUT answer text DEFAULT NULL) LANGUAGE plpgsql AS $$
DECLARE
    m migrate._migration;
    seen timestamptz := clock_timestamp();
BEGIN
    FOR i IN 1 .. 6000 LOOP
        SELECT * INTO m FROM migrate._migration WHERE name = 'm';
        IF m.failed_since IS NOT NULL THEN
            answer := 'settled: failed: ' || m.failed_reason;
            RETURN;
        ELSIF m.phase = goal AND NOT EXISTS (SELECT FROM migrate._failure) THEN
            answer := 'settled: settled';
            RETURN;
        ELSIF EXISTS (SELECT FROM migrate._worker) THEN
            seen := clock_timestamp();
        ELSIF clock_timestamp() > seen + idle_ms * interval '1 ms' THEN
            answer := 'settled: no worker';
            RETURN;
        END IF;
        COMMIT;
        PERFORM pg_sleep(0.01);
        COMMIT;
    END LOOP;
    answer := format('settled: %s after a minute', m.phase);
END $$;
CREATE PROCEDURE must_settle(goal text) LANGUAGE plpgsql AS $$
DECLARE
    status text;
BEGIN
    CALL settle(goal, 5000, status);
    ASSERT status = 'settled: settled', status;
END $$;
CREATE FUNCTION nothing_is_left() RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    found text;
BEGIN
    -- (A worker that a verb has started may be seen only now, for the moment that it takes to find nothing to do.)
    FOR i IN 1 .. 3000 LOOP
        found := concat_ws(', ', (SELECT 'trigger ' || min(tgname) FROM pg_trigger WHERE tgname LIKE '!migrate%'),
            (SELECT 'view ' || min(relname) FROM pg_class WHERE relnamespace = 'migrate'::regnamespace AND relname LIKE 'flow%'),
            (SELECT 'prepared transaction ' || min(gid) FROM pg_prepared_xacts), (SELECT 'worker ' || min(pid) FROM migrate._worker),
            (SELECT string_agg('rows in ' || relname, ', ') FROM pg_class c
             WHERE relnamespace = 'migrate'::regnamespace AND relkind = 'r' AND relname !~ '^_(event|phase_move|.*_definition)$'
             AND (xpath('/row/n/text()', query_to_xml('SELECT count(*) AS n FROM migrate.' || relname, false, true, '')))[1]::text <> '0'));
        EXIT WHEN found = '';
        PERFORM pg_sleep(0.01);
    END LOOP;
    ASSERT found = '', 'left behind: ' || found;
END $$;
SQL
	return $node;
}

# As boss, statement by statement; gives whether it failed, the error, and what it printed.
sub run_sql
{
	my ($node, $sql) = @_;
	my ($status, $out, $error) = $node->psql('postgres', $sql, extra_params => $boss, timeout => 120);
	return ($status, $error, $out);
}

# --- points -----------------------------------------------------------------------------------------------------------

sub log_position
{
	my ($node) = @_;
	return -s $node->logfile;
}

# Whether the server's log has, or within a while gets, what the pattern tells, behind the position.
sub wait_for_log
{
	my ($node, $from, $pattern, $seconds) = @_;
	my $until = time() + ($seconds // 30);
	do
	{
		open my $handle, '<', $node->logfile or die;
		seek $handle, $from, 0;
		local $/;
		return 1 if (<$handle> // '') =~ $pattern;
		usleep(5_000);
	} while (time() < $until);
	return 0;
}

sub points_in_source
{
	my ($top) = @_;
	my %found;
	for my $file (glob("$top/src/*.cpp $top/sql/extension/*.sql"))
	{
		open my $handle, '<', $file or die;
		while (my $line = <$handle>)
		{
			$found{$1} = 1 while $line =~ /DEBUG_POINT\("([^"]+)"\)/g;
			$found{$1} = 1 if $line =~ /^ *-- \@point (.+)$/;
		}
	}
	my @names = sort keys %found;
	return @names;
}

# SQL that sets the point for background workers that start from then on, when the present ones have ended (only then the
# mark of the last kill may go: one that the last point was set for would die by it again).
sub arm_workers
{
	my ($node, $setting) = @_;
	return <<"SQL";
DO \$\$ BEGIN FOR i IN 1 .. 3000 LOOP EXIT WHEN NOT EXISTS (SELECT FROM migrate._worker); PERFORM pg_sleep(0.01); END LOOP; END \$\$;
$forget_kill
ALTER ROLE @{[ bootstrap_role($node) ]} SET migrate.debug_point = '$setting';
SQL
}

my %bootstrap;

sub bootstrap_role
{
	my ($node) = @_;
	return $bootstrap{ $node->name } //= $node->safe_psql('postgres', 'SELECT quote_ident(rolname) FROM pg_roles WHERE oid = 10');
}

sub disarm_workers
{
	my ($node) = @_;
	return "ALTER ROLE @{[ bootstrap_role($node) ]} RESET migrate.debug_point;\n";
}

# SQL that sets the point for the session.
sub arm_session
{
	my ($setting) = @_;
	return "$forget_kill SET migrate.debug_point = '$setting';\n";
}

# --- one migration ----------------------------------------------------------------------------------------------------
# What becomes of it is kept in a hash; steps are given as SQL, so that many of them make one call of psql.

# How the catalog looks in each phase (state_of_m): nothing may be half done.
my $working = qr/^((dual_writing|backfilling) 3 0 source \w+|(validating|shadowing|ready) 3 0 source all)$/;
my %whole = (
	none => qr/^none 0 0 /,
	planned => qr/^planned 0 0 source all$/,
	dual_writing => $working,
	validating => qr/^(validating|shadowing|ready) 3 [03] source all$/,
	ready => qr/^ready 3 [03] source all$/,
	cut_over => qr/^cut_over 3 3 target all$/,
	watched => qr/^(cut_over 3 3 target|ready 3 3 source) all$/,
	finalized => qr/^finalized 0 0 target all$/,
	cancelled => qr/^cancelled 0 0 source all$/);

# Whether the state, as state_of_m() gives it, is whole, whatever the phase.
sub whole
{
	my ($state) = @_;
	return scalar grep { $state =~ $_ } values %whole;
}

sub new_life
{
	my ($node) = @_;
	return { node => $node, phase => 'none', number => 0, writes => 0, rows => 300 };
}

# Both tables and the migration anew. references: the target's key is a foreign key to the source.
sub fresh
{
	my ($life, $references) = @_;
	$life->{number}++;
	@$life{qw(phase cutovers references emptied source_gone expected)} = ('planned', 0, $references, 0, 0, {});
	my $key = $references ? 'REFERENCES users (id)' : '';
	return <<"SQL";
SET client_min_messages = warning;
DROP VIEW IF EXISTS profile, profile_read;
DROP TABLE IF EXISTS user_profiles, users;
CREATE TABLE users (id bigint GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY, name text NOT NULL, bio text);
CREATE TABLE user_profiles (user_id bigint PRIMARY KEY $key, display_name text NOT NULL CHECK (display_name <> 'refused'), bio text NOT NULL DEFAULT '',
    parent bigint REFERENCES user_profiles);
CREATE INDEX profile_name ON user_profiles (lower(display_name));
COMMENT ON INDEX profile_name IS 'as it was';
INSERT INTO users (name, bio) SELECT 'user ' || i, CASE WHEN i % 3 > 0 THEN 'bio' END FROM generate_series(1, $life->{rows}) i;
SELECT migrate.define('m', 'users', 'user_profiles', \$\$ id AS user_id, name AS display_name, coalesce(bio, '') AS bio \$\$,
    reverse => \$\$ user_id AS id, display_name AS name, bio \$\$, on_target_delete => 'delete');
SELECT migrate.add_view('m', 'profile');
SELECT migrate.add_view('m', 'profile_read', use => 'read');
SELECT migrate.set('m', 'batch_size', '40');
GRANT ALL ON users, user_profiles, profile TO app;
SQL
}

# Brings the migration to a phase by what leads there.
sub bring
{
	my ($life, $phase, $references) = @_;
	my %step = (
		'planned ready' => "SELECT migrate.start('m'); CALL must_settle('ready');\n", 'ready cut_over' => "SELECT migrate.cutover('m');\n",
		'cut_over ready' => "SELECT migrate.rollback('m');\n", 'ready cancelled' => "SELECT migrate.cancel('m');\n",
		'cut_over finalized' => "SELECT migrate.finalize('m', force => 'm');\n");
	my $sql = '';
	$sql .= end_life($life) . fresh($life, $references) if $phase eq 'planned' && $life->{phase} ne 'planned';
	return $sql if $life->{phase} eq $phase;
	my %via = (ready => $life->{phase} eq 'cut_over' ? 'cut_over' : 'planned', cut_over => 'ready', cancelled => 'ready', finalized => 'cut_over');
	$sql .= bring($life, $via{$phase}, $references);
	$sql .= $step{"$via{$phase} $phase"};
	$life->{cutovers}++ if $phase eq 'cut_over';
	$life->{phase} = $phase;
	return $sql;
}

# Ends the migration by what leads there, and looks for what may be left behind.
sub end_life
{
	my ($life) = @_;
	my %last = (none => '', ready => "SELECT migrate.cancel('m'); SELECT migrate.drop('m');",
		cut_over => "SELECT migrate.finalize('m', force => 'm'); SELECT migrate.drop('m');");
	my $sql = $last{ $life->{phase} } // "SELECT migrate.drop('m');";
	$life->{phase} = 'none';
	return "$sql SELECT nothing_is_left();\n";
}

# A write of each kind as the application, on the side that serves. They are remembered.
sub writes
{
	my ($life) = @_;
	my $n = $life->{writes}++;
	my ($table, $id, $name) = $life->{source_gone} || $life->{phase} =~ /^(cut_over|finalized)$/ ? qw(profile user_id display_name) : qw(users id name);
	my ($new, $changed, $gone) = (10_000 + $n, 20 + $n % 80, 120 + $n % 80);
	@{ $life->{expected} }{ $new, $changed, $gone } = ("new $n", "write $n", undef);
	# Without dual writes a foreign key between the two is the DBA's to drop.
	my $alone = $life->{phase} =~ /^(cancelled|finalized|none)$/ ? 'ALTER TABLE user_profiles DROP CONSTRAINT IF EXISTS user_profiles_user_id_fkey;' : '';
	return <<"SQL";
$alone
SET ROLE app;
SET statement_timeout = '10 s';
UPDATE $table SET $name = 'mended' WHERE $name = 'refused';
INSERT INTO $table ($id, $name) VALUES ($new, 'new $n');
UPDATE $table SET $name = 'write $n' WHERE $id = $changed;
DELETE FROM $table WHERE $id = $gone;
RESET ROLE;
RESET statement_timeout;
SQL
}

# Rows that differ, acknowledged writes that are not there, and cutovers by the events: '0 differ, 0 lost, 2 cutovers'.
sub comparison
{
	my ($life) = @_;
	my $writes = join ', ', map { my $name = $life->{expected}{$_}; "($_, " . (defined $name ? "'$name')" : 'NULL)') } sort keys %{ $life->{expected} };
	my $lost = $writes ? "(SELECT count(*) FROM (VALUES $writes) e (id, name) LEFT JOIN users u ON u.id = e.id WHERE u.name IS DISTINCT FROM e.name::text)" : '0';
	return <<"SQL";
SELECT 'equal: ' || (SELECT count(*) FROM users u FULL JOIN user_profiles p ON p.user_id = u.id
        WHERE (u.id, u.name, coalesce(u.bio, '')) IS DISTINCT FROM (p.user_id, p.display_name, p.bio)) || ' differ, ' || $lost || ' lost, ' ||
       (SELECT count(*) FROM migrate._event e JOIN migrate._migration m ON m.id = e.migration WHERE m.name = 'm' AND e.to_phase = 'cut_over') || ' cutovers';
SQL
}

# After the server is back: the application writes at once; what was done, is done wholly; what was not, is done now; then the
# migration goes on, by itself after a crash, by the one call that its status names after an error.
sub recover
{
	my ($life, $t, $done) = @_;
	my ($node, $by_worker, $what, $after) = ($life->{node}, ($t->{by} // '') eq 'worker', $t->{name}, $t->{to} // $t->{from});
	my $idle = $t->{action} eq 'kill' ? 15000 : 300;
	my $ended = $after =~ /^(finalized|cancelled|none)$/;
	my $sql = $by_worker ? disarm_workers($node) : '';
	$sql .= "SELECT 'state: ' || state_of_m();\n";
	$life->{phase} = $done ? $after : $t->{from};
	$sql .= ($t->{empties} ? '' : writes($life)) . "\\echo written\n";
	$sql .= "$t->{run};\nSELECT 'then: ' || state_of_m();\n" if !$done;
	$sql .= "$t->{undo};\n" if $t->{undo};
	# (A row that the target refuses would stay a failure.)
	$sql .= "UPDATE users SET name = 'mended' WHERE name = 'refused';\n" if $t->{run} =~ /refused/;
	$life->{phase} = $after;
	$life->{source_gone} ||= $t->{run} =~ /drop_source/;
	$life->{cutovers}++ if $after eq 'cut_over' && $t->{from} eq 'ready';
	@$life{qw(emptied expected)} = (1, {}) if $t->{empties};
	my $goal = $after eq 'cut_over' ? 'cut_over' : 'ready';
	my $settle = "CALL settle('$goal', $idle);\n" . comparison($life);
	my ($failed, $error, $out) = run_sql($node, $sql . ($ended ? '' : $settle));
	if (!$failed && $out =~ /^settled: (failed|no worker)(.*)/m && !($1 eq 'no worker' && $t->{action} eq 'kill'))
	{
		note("$what: $1$2");
		my $verb = $1 eq 'failed' ? 'retry' : 'resume';
		$out =~ s/^settled: .*//ms;
		($failed, $error, my $more) = run_sql($node, "SELECT migrate.$verb('m');\n$settle");
		$out .= $more;
	}
	my $ok = !$failed && $out =~ /^written$/m;
	$ok &&= $out =~ /^state: (.*)/m && $1 =~ $whole{ $done ? $after : $t->{from} };
	$ok &&= $out =~ /^then: (.*)/m && $1 =~ $whole{$after} if !$done;
	$ok &&= $out =~ /^settled: settled\nequal: 0 differ, 0 lost, $life->{cutovers} cutovers$/m if !$ended;
	ok($ok, "$what: whole, writable, " . ($ended ? 'ended' : 'goes on, equal, nothing lost')) or diag("$out\n$error");
	$life->{phase} = $goal if !$ended;
	return;
}

# After a failed test: nothing of it may disturb the next ones.
sub start_over
{
	my ($life) = @_;
	run_sql($life->{node}, disarm_workers($life->{node}) . "DO \$\$ BEGIN IF EXISTS (SELECT FROM pg_prepared_xacts) THEN RAISE WARNING 'locker'; END IF; END \$\$");
	run_sql($life->{node}, "ROLLBACK PREPARED 'locker'");
	run_sql($life->{node}, 'SELECT pg_terminate_backend(pid) FROM migrate._worker; DROP EXTENSION migrate_ext CASCADE; CREATE EXTENSION migrate_ext');
	$life->{phase} = 'none';
	return;
}

1;
