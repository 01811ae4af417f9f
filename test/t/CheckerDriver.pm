# The driver of the randomized checker: takes migrations through their phases under the load, at random times, with pauses,
# kills, crashes and switches there and back; and brings everything to rest to compare both sides strictly.
package CheckerDriver;

use strict;
use warnings;

use parent 'CheckerReader';
use CheckerOracle;
use DBD::Pg qw(PG_ASYNC);
use MigrateTest ();
use Time::HiRes qw(sleep time);

# $common as of the sessions, and node, children (numbers of those that rest), until, stay (how long to stay cut over, or 0).
sub new
{
	my ($class, $common) = @_;
	srand($common->{seed} * 1000);
	return bless { %$common, number => 'driver', count => {}, cycle => 0 }, $class;
}

sub failed { my ($self) = @_; return -e "$self->{dir}/fault"; }

sub flag
{
	my ($self, $name, $on) = @_;
	if ($on) { open my $file, '>>', "$self->{dir}/$name"; print $file 'x'; close $file }
	else { unlink "$self->{dir}/$name" }
	return;
}

# (A run that is paused or to be stopped still needs the driver.)
sub connect
{
	my ($self) = @_;
	my $until = time() + 120;
	until ($self->{db} && $self->{db}->ping)
	{
		$self->{db} = DBI->connect($self->{dsn}, 'postgres', '', { RaiseError => 0, PrintError => 0, AutoCommit => 1, pg_server_prepare => 0 });
		die "the server does not come back\n" if time() > $until;
		sleep 0.05 unless $self->{db};
	}
	return $self->{db};
}

# One value; undef where the server was lost.
sub one { my ($self, $sql) = @_; return scalar $self->connect->selectrow_array($sql); }

# Errors that a verb may give: locks not got in time, a phase or a gate that is not there yet.
sub verb
{
	my ($self, $call) = @_;
	my $db = $self->connect;
	my $ok = rand() < 0.1 ? $self->interrupted("SELECT migrate.$call") : $db->do("SELECT migrate.$call");
	(my $name = $call) =~ s/\(.*//s;
	$self->{count}{ $ok ? $name : "$name refused" }++;
	return 1 if $ok;
	return 0 unless $db->ping;
	my ($state, $message) = ($db->state, $db->errstr);
	return 0 if $state =~ /53400|55P03|57014|57P01/ || $state eq '55000' && $message =~ /in phase|paused|failures|requeue|gate (dual_writes|validation)|prepared/;
	$self->fault("verb $call: $state $message");
	return 0;
}

# A verb whose session is cancelled or ended in the midst of it.
sub interrupted
{
	my ($self, $sql) = @_;
	my $db = $self->{db};
	my $pid = $db->{pg_pid};
	$db->do($sql, { pg_async => PG_ASYNC }) or return 0;
	sleep rand() < 0.5 ? rand 0.02 : rand 1;
	my $killer = DBI->connect($self->{dsn}, 'postgres', '', { PrintError => 0 });
	$killer->do('SELECT ' . (rand() < 0.5 ? 'pg_cancel_backend' : 'pg_terminate_backend') . "($pid)") if $killer;
	$killer->disconnect if $killer;
	$self->{count}{'verbs interrupted'}++;
	return defined eval { $db->pg_result };
}

sub crash
{
	my ($self) = @_;
	my ($worker) = @{ $self->connect->selectcol_arrayref("SELECT pid FROM pg_stat_activity WHERE backend_type = 'migrate_ext worker' ORDER BY random() LIMIT 1") // [] };
	if ($worker && rand() < 0.5) { kill 'KILL', $worker }
	else
	{
		$self->{node}->stop('immediate');
		$self->{node}->start;
	}
	$self->{count}{crashes}++;
	return;
}

# What happens at random while a migration is under way.
sub disturb
{
	my ($self) = @_;
	my $m = $self->{migration};
	my $dice = rand;
	if ($dice < 0.07) { $self->verb("pause('$m')") }
	elsif ($dice < 0.30) { $self->verb("resume('$m')") }
	elsif ($dice < 0.45) { $self->verb("set('$m', 'sleep', '" . int(rand 10) . " ms')") }
	elsif ($dice < 0.55) { $self->verb("set('$m', 'workers', '" . (1 + int rand 3) . "')") }
	elsif ($dice < 0.62) { $self->verb("throttle('$m', " . sprintf('%.2f', rand 0.8) . ", for_time => '1 s')") }
	elsif ($dice < 0.66) { $self->verb("unthrottle('$m')") }
	elsif ($dice < 0.80) { $self->connect->do("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'migrate_ext worker'"); $self->{count}{'workers ended'}++ }
	elsif ($dice < 0.84) { $self->verb("retry('$m')") }
	elsif ($dice < 0.86 && time() > ($self->{next_crash} // 0)) { $self->crash; $self->{next_crash} = time() + 15 }
	return;
}

sub phase
{
	my ($self) = @_;
	my ($phase, $paused, $failed) = $self->connect->selectrow_array("SELECT phase, paused_reason, failed_reason FROM migrate._migration WHERE name = '$self->{migration}'");
	$self->fault("the migration has failed in $phase: $failed") if defined $failed;
	return wantarray ? ($phase // '', $paused) : $phase // '';
}

# Goes on until the migration is in the phase, with or without disturbances.
sub reach
{
	my ($self, $wanted, $disturb) = @_;
	my $until = time() + 150;
	until ($self->failed)
	{
		my ($phase, $paused) = $self->phase;
		return 1 if $phase eq $wanted;
		if ($disturb && time() < $self->{until}) { $self->disturb if rand() < 0.3 }
		else
		{
			$self->verb("resume('$self->{migration}')") if defined $paused;
			$self->verb("unthrottle('$self->{migration}')") && $self->verb("set('$self->{migration}', 'sleep', '0')") if $disturb;
			$disturb = 0;
		}
		# Without preload somebody has to ask: a worker that was ended is started by the next call.
		$self->verb("start('$self->{migration}')") if rand() < 0.3;
		$self->fault("phase $wanted is not reached; it is $phase: " . join(' | ', map { $_ // '' } $self->{db}->selectrow_array('SELECT p.*::text FROM migrate.progress p'))) if time() > $until;
		sleep($wanted eq 'ready' && !$disturb ? 0.03 : rand 0.2);
	}
	return 0;
}

# Repeats a verb until the phase is as wanted; its outcome is read from the catalog, as an interrupted call's must be. A polite
# verb may be refused as long as there is such a load as this: after a minute everybody has to rest.
sub switch_to
{
	my ($self, $call, $wanted) = @_;
	my ($until, $busy, $calls) = (time() + 180, time() + 60, 0);
	until ($self->failed)
	{
		if (scalar($self->phase) =~ /^($wanted)$/)
		{
			$self->move_on unless $busy;
			$self->count_switch if $calls && $call =~ /^(cutover|rollback)/;
			return 1;
		}
		$self->verb($call);
		$calls++;
		$self->verb("resume('$self->{migration}')") if defined(($self->phase)[1]);
		if ($busy && time() > $busy && !-e "$self->{dir}/pause")
		{
			$busy = 0;
			$self->{count}{'switches at rest'}++;
			$self->come_to_rest or return 0;
		}
		$self->fault("$call: phase $wanted is not reached: " . ($self->{db}->errstr // '')) if time() > $until;
	}
	return 0;
}

sub count_switch
{
	my ($self) = @_;
	$self->flag('switched', 1);
	$self->{count}{switches}++;
	$self->{count}{swaps}++ if $self->{schema}{swap};
	return;
}

# Reads go to the target, in steps there and back.
sub route
{
	my ($self) = @_;
	for (1 .. 1 + int rand 4)
	{
		return if time() > $self->{until} || $self->failed;
		$self->verb("route('$self->{migration}', " . (rand() < 0.3 ? "predicate => 'n % 3 = 1'" : 'percent => ' . (0, 1, 30, 60, 100)[ int rand 5 ]) . ')');
		sleep rand 0.7;
		$self->disturb if rand() < 0.1;
	}
	return;
}

# One migration from its definition to its cancellation.
sub migrate
{
	my ($self) = @_;
	my $schema = $self->{schema};
	my $m = $self->{migration} = 'm' . ++$self->{cycle};
	my $skip = $schema->{deferrable} ? ", skip => '{reverse}'" : '';
	$self->flag($_, 0) for qw(switching target_writable);
	# (Not under load at the first: it would queue in front of the application.)
	$self->connect->do(CheckerOracle->detach_sql($schema, 't')) if $schema->{late_triggers} && $self->{cycle} > 1;
	$self->connect->do($self->{cycle} > 1 ? 'TRUNCATE t' : 'SELECT') && $self->{db}->do($schema->define_sql($m)) or return $self->fault('define: ' . $self->{db}->errstr);
	$self->verb("set('$m', 'batch_size', '" . (10 + int rand 40) . "')");
	$self->verb("set('$m', 'sleep', '" . int(rand 15) . " ms')");
	$self->flag('view_writable', $schema->{bare} && !$schema->{deferrable} && !$schema->{swap});
	$self->move_on;
	$self->switch_to("start('$m')", 'dual_writing|backfilling|validating|shadowing|ready');
	return unless $self->reach('ready', 1);
	$self->{count}{'copied by place'} += $self->one("SELECT count(*) FROM migrate._flow f JOIN migrate._migration m ON m.id = f.migration WHERE m.name = '$m' AND f.by_place");
	$self->route unless $schema->{swap};
	if ($schema->{late_triggers})
	{
		$self->come_to_rest or return;
		$self->connect->do(CheckerOracle->attach_sql($schema, 't')) or return $self->fault('attach: ' . $self->{db}->errstr);
		$self->move_on;
	}
	$self->flag('switching', 1);
	return unless $self->switch_to("cutover('$m')", 'cut_over');
	return $self->stay_and_go_back($skip) if $self->{stay};
	for (1 .. 1 + int rand 5)
	{
		last if time() > $self->{until} || $self->failed;
		$self->flag('target_writable', 1) unless $schema->{deferrable} || $schema->{swap};
		sleep rand 2;
		$self->disturb if rand() < 0.3;
		return unless $self->switch_to("rollback('$m'$skip)", 'ready');
		sleep rand 1;
		$self->route if !$schema->{swap} && rand() < 0.7;
		$self->disturb if rand() < 0.2;
		return unless $self->switch_to("cutover('$m')", 'cut_over');
	}
	return $self->end_migration($skip);
}

# The target serves for long, and then the source again: nothing that was written meanwhile may be missing there.
sub stay_and_go_back
{
	my ($self, $skip) = @_;
	my $until = time() + delete $self->{stay};
	$self->flag('target_writable', 1) unless $self->{schema}{deferrable} || $self->{schema}{swap};
	while (time() < $until && !$self->failed)
	{
		sleep rand 2;
		$self->disturb if rand() < 0.3;
	}
	$self->switch_to("rollback('$self->{migration}'$skip)", 'ready') or return;
	sleep rand 5;
	$self->{until} = time() + 120;    # (Only so that what follows is not cut short.)
	$self->end_migration($skip);
	$self->{until} = 0;
	$self->{count}{'long stays'}++ if $self->{count}{migrations};
	return;
}

sub end_migration
{
	my ($self, $skip) = @_;
	my $m = $self->{migration};
	sleep rand 1;
	$self->come_to_rest or return;
	$self->compare_strictly('at rest');
	return if time() > $self->{until} || $self->failed;
	$self->switch_to("rollback('$m'$skip)", 'ready') or return;
	$self->switch_to("cancel('$m')", 'cancelled') or return;
	until ($self->failed || !$self->one("SELECT count(*) FROM migrate._migration WHERE name = '$m'")) { $self->verb("drop('$m')") }
	return if $self->failed;
	$self->expect_nothing({ 'what drop has left behind' => "SELECT tgname FROM pg_trigger WHERE tgname LIKE '!migrate%' UNION ALL SELECT relname FROM pg_class WHERE relnamespace = 'migrate'::regnamespace AND relname LIKE 'flow%'" },
		'after the end');
	$self->{count}{migrations}++;
	return;
}

# Everybody stops between two transactions; prepared ones are ended.
sub come_to_rest
{
	my ($self) = @_;
	$self->flag('pause', 1);
	my $until = time() + 90;
	for my $child (@{ $self->{children} })
	{
		until (-e "$self->{dir}/rest.$child")
		{
			sleep 0.05;
			$self->end_all_prepared;
			if (time() > $until) { $self->fault("session $child does not come to rest"); return 0 }
		}
	}
	$self->end_all_prepared;
	return 1;
}

sub move_on
{
	my ($self) = @_;
	$self->flag('pause', 0);
	for my $child (@{ $self->{children} }) { sleep 0.01 while -e "$self->{dir}/rest.$child" }
	return;
}

sub end_all_prepared
{
	my ($self) = @_;
	for my $tag (@{ $self->connect->selectcol_arrayref('SELECT gid FROM pg_prepared_xacts') })
	{
		$self->write("$tag\tcommitted") if $self->{db}->do("COMMIT PREPARED '$tag'");
	}
	return;
}

# At rest: nothing pending, nothing failed, both sides equal row by row and as the application has noted.
sub compare_strictly
{
	my ($self, $when) = @_;
	my $pending = 'SELECT (SELECT count(*) FROM migrate._failure) + (SELECT count(*) FROM migrate._requeue)';
	my $until = time() + 60;
	while (($self->one($pending) // 1) > 0 && time() < $until) { $self->verb("start('$self->{migration}')"); sleep 0.1 }
	$self->connect && $self->find_other;
	my ($s, $t) = map { 'SELECT ' . $self->{schema}->shape($_->[0], 'x') . " FROM $_->[1] x" } [ 's', 's' ], [ 't', $self->{schema}{other} ];
	my $queries = CheckerOracle->queries($self->{schema});
	$queries->{'keys that still wait'} = 'SELECT flow, direction, key, sqlstate, object FROM migrate._failure UNION ALL SELECT flow, NULL, key, NULL, NULL FROM migrate._requeue';
	$queries->{'rows that the target has not'} = "($s) EXCEPT ALL ($t)";
	$queries->{'rows that the source has not'} = "($t) EXCEPT ALL ($s)";
	$self->connect;
	$self->expect_nothing($queries, $when);
	$self->{count}{'strict comparisons'}++;
	return;
}

sub run
{
	my ($self) = @_;
	open $self->{file}, '>>', "$self->{dir}/session.driver" or die "session.driver: $!";
	$self->{file}->autoflush(1);
	$self->migrate while time() < $self->{until} && !$self->failed;
	return;
}

1;
