# One session of the randomized checker's application, in a process of its own: transactions of every isolation level, with
# savepoints, rollbacks and two-phase commits. What became of each is written to the session's own file, beside the server.
package CheckerSession;

use strict;
use warnings;

use CheckerStatements;
use DBI;
use DBD::Pg ':pg_types';
use POSIX ();
use Time::HiRes qw(sleep time);

# $common: dir, dsn, schema, seed, version.
sub run
{
	my ($class, $common, $number) = @_;
	srand($common->{seed} * 1000 + $number);
	my $self = bless {
		%$common, number => $number, count => {}, errors => {}, tag => 0,
		statements => CheckerStatements->new($common->{schema}, $number, $common->{version}) }, $class;
	open $self->{file}, '>>', "$self->{dir}/session.$number" or die "session.$number: $!";
	$self->{file}->autoflush(1);
	until (-e "$self->{dir}/stop" || -e "$self->{dir}/fault")
	{
		# (Nor is there one turn more when the run has ended meanwhile: the migration may have, too.)
		if (-e "$self->{dir}/pause") { $self->rest; next }
		eval { $self->turn; 1 } or $self->fault("session $number died: $@");
	}
	my %sum = (%{ $self->{count} }, map { ("error $_" => $self->{errors}{$_}) } keys %{ $self->{errors} });
	$self->write("sum\t$_\t$sum{$_}") for sort keys %sum;
	$self->write("sum\tstatement $_\t$self->{statements}{count}{$_}") for sort keys %{ $self->{statements}{count} };
	return;
}

sub write { my ($self, $line) = @_; $self->{file}->print("$line\n"); return; }

# The run has failed: said in a file that the driver looks for.
sub fault
{
	my ($self, $text) = @_;
	open my $file, '>>', "$self->{dir}/fault" or die "fault: $!";
	print $file "$text\n";
	close $file;
	return;
}

sub rest
{
	my ($self) = @_;
	my $flag = "$self->{dir}/rest.$self->{number}";
	open my $file, '>', $flag;
	close $file;
	sleep 0.02 while -e "$self->{dir}/pause" && !-e "$self->{dir}/stop";
	unlink $flag;
	return;
}

sub connect
{
	my ($self) = @_;
	until ($self->{db} && $self->{db}->ping)
	{
		return if -e "$self->{dir}/stop" || -e "$self->{dir}/pause";
		$self->{db} = DBI->connect($self->{dsn}, 'app', '', { RaiseError => 0, PrintError => 0, PrintWarn => 0, AutoCommit => 1, pg_server_prepare => 0 });
		$self->{db} ? $self->{db}->do("SET statement_timeout = '60 s'") : sleep 0.05;
	}
	return 1;
}

sub turn
{
	my ($self) = @_;
	return unless $self->connect;
	$self->look_at_cursor if rand() < 0.3;
	return $self->end_prepared if rand() < 0.08;
	return $self->transaction;
}

sub look_at_cursor
{
	my ($self) = @_;
	my ($position) = $self->{db}->selectrow_array('SELECT backfill_position()');
	$self->{statements}{cursor} = $position ? $self->{schema}->rank_of(@$position) : undef;
	return;
}

# Executes one statement. True where it went well; else the error is judged, and kept in $self->{last}.
sub execute
{
	my ($self, $statement, $kind) = @_;
	my $db = $self->{db};
	my $ok = ref $statement ? $self->copy($statement) : $db->do($statement);
	$self->{count}{statements}++;
	return 1 if $ok;
	my %error = (state => $db->state);
	# (pg_error_field() turns its argument's letters into capitals, in place.)
	for my $field (qw(MESSAGE_PRIMARY MESSAGE_DETAIL CONTEXT)) { $error{ lc $field } = $db->pg_error_field("$field") // '' }
	$self->{last} = $db->ping ? $error{state} : 'lost';
	$self->judge(\%error, $kind, ref $statement ? $statement->{copy} : $statement) unless $self->{last} eq 'lost';
	$self->{errors}{ $self->{last} }++;
	return 0;
}

sub copy
{
	my ($self, $statement) = @_;
	my $db = $self->{db};
	$db->do($statement->{copy}) or return 0;
	$db->pg_putcopydata("$_\n") for @{ $statement->{lines} };
	return $db->pg_putcopyend;
}

# Errors that the application may get: those that the same statement may get without the extension. An error that comes out of
# the extension's own statements is none of them.
sub may_get
{
	my ($self, $state, $kind, $ours) = @_;
	my $snapshot = $self->{level} ne 'READ COMMITTED';
	# (README, Limits: a foreign key's check finds what the transaction's snapshot shows of a key, though another row has it since; a
	# deferrable key's row of the target may be somebody else's at this moment; above READ COMMITTED a write by SQL may meet one.)
	my $passed_on = $self->{schema}{strict} || -e "$self->{dir}/switching";
	my $in_limits = $passed_on || $self->{schema}{deferrable};
	my %fine = (
		'40P01' => !$ours || $in_limits,    # who writes to both sides at once may meet himself
		'40001' => $ours ? $self->{level} eq 'SERIALIZABLE' || $snapshot && ($in_limits || $self->{schema}{partitioned}) : $snapshot || $self->{schema}{partitioned},
		'23505' => !$ours,
		'55P03' => $kind eq 'truncate' && (!$ours || $in_limits),    # its lock_timeout ends it before the deadlock is found
		'55006' => $kind eq 'truncate' && !$ours && $self->{schema}{deferrable},    # checks of the key are still to come
		'42704' => $kind eq 'end prepared', '55000' => $kind eq 'end prepared',
	);
	return $fine{$state};
}

sub judge
{
	my ($self, $error, $kind, $statement) = @_;
	my ($state, $message, $context) = map { $error->{$_} } 'state', 'message_primary', 'context';
	my $ours = "$message $context" =~ /migrate|OVERRIDING SYSTEM VALUE|DELETE FROM (\S+ )?d WHERE|UPDATE \S+ d SET/i;
	$self->{count}{"$state in a dual write"}++ if $ours;
	return if $self->may_get($state, $kind, $ours);
	$self->fault("session $self->{number}, $self->{level}, $kind: $state $message\n  statement: " . substr($statement, 0, 400) . "\n  context: $context\n  detail: " . $error->{message_detail}
		. ($state =~ /57014|23503/ ? $self->who_waits : ''));
	return;
}

# What everybody does at this moment.
sub who_waits
{
	my ($self) = @_;
	my $db = DBI->connect($self->{dsn}, 'postgres', '', { RaiseError => 0, PrintError => 0 }) or return '';
	my $rows = $db->selectall_arrayref(<<'SQL') // [];
SELECT pid, backend_type, state, clock_timestamp() - state_change, wait_event, pg_blocking_pids(pid)::text, left(query, 120) FROM pg_stat_activity WHERE datname IS NOT NULL
UNION ALL SELECT l.pid, 'prepared ' || p.gid, l.mode, clock_timestamp() - p.prepared, l.locktype, NULL, l.relation::regclass::text
FROM pg_prepared_xacts p JOIN pg_locks l ON l.virtualtransaction = '-1/' || p.transaction WHERE l.mode ~ 'Exclusive'
UNION ALL SELECT 0, m.name, m.phase, clock_timestamp() - m.phase_since, m.paused_reason, m.throttled_reason, m.failed_reason FROM migrate._migration m
SQL
	$db->disconnect;
	return "\n  meanwhile:\n" . join "\n", map { '    ' . join(' | ', map { $_ // '' } @$_) } @$rows;
}

# Where this transaction writes: the source, and when the target may be written, that, the view, or both.
sub sides
{
	my ($self) = @_;
	my @sides = (['s', 's']);
	push @sides, [ 't', 't' ], [ 't', 't' ] if $self->{both};
	push @sides, [ 't', 'shown' ] if -e "$self->{dir}/view_writable";
	return rand() < 0.2 ? @sides : ($sides[ rand @sides ]);
}

sub transaction
{
	my ($self) = @_;
	my $tag = "$self->{number}." . ++$self->{tag};
	my $dice = rand;
	$self->{level} = $dice < 0.5 ? 'READ COMMITTED' : $dice < 0.8 ? 'REPEATABLE READ' : 'SERIALIZABLE';
	$self->{both} = -e "$self->{dir}/target_writable";
	my @sides = $self->sides;
	return unless $self->execute("BEGIN ISOLATION LEVEL $self->{level}", 'begin') && $self->execute("SET LOCAL app.tag = '$tag'", 'begin');
	if (rand() < 0.08)
	{
		# An old snapshot: taken here, written with later.
		my $wait = rand(1.3)**2;
		return $self->finish($tag, 0) unless $self->execute('SELECT FROM app_tx LIMIT 1', 'select');
		sleep $wait;
	}
	my $ok = $self->body(\@sides) && $self->execute("INSERT INTO app_tx VALUES ('$tag')", 'note');
	return $self->finish($tag, $ok);
}

sub body
{
	my ($self, $sides) = @_;
	for (1 .. 1 + int(rand 4) * int(rand 2))
	{
		my ($side, $relation) = @{ $sides->[ rand @$sides ] };
		my ($kind, @statements) = $self->{statements}->next($side, $relation, $self->{level} eq 'READ COMMITTED');
		my $dice = rand;
		my $savepoint = $kind eq 'insert' || $dice < 0.2;
		return 0 if $savepoint && !$self->execute('SAVEPOINT one', 'savepoint');
		for my $statement (@statements)
		{
			next if $self->execute($statement, $kind);
			return 0 unless $savepoint && $self->{last} =~ /23505|55P03/;
			$dice = 0;
			last;
		}
		sleep rand 0.03 if rand() < 0.15;
		next unless $savepoint;
		return 0 unless $self->execute($dice < 0.1 ? 'ROLLBACK TO one' : 'RELEASE one', 'savepoint');
	}
	return 1;
}

# Ends the transaction; what is known of its end goes to the file before the next begins.
sub finish
{
	my ($self, $tag, $ok) = @_;
	my $dice = rand;
	if (!$ok || $dice < 0.08)
	{
		$self->execute('ROLLBACK', 'rollback') unless ($self->{last} // '') eq 'lost' && !$ok;
		$self->{count}{'rolled back'}++;
		return $self->write("$tag\taborted");
	}
	my $prepare = $dice > 0.96;
	if ($self->execute($prepare ? "PREPARE TRANSACTION '$tag'" : 'COMMIT', 'commit'))
	{
		$self->{count}{ $prepare ? 'prepared' : 'committed' }++;
		return $self->write("$tag\t" . ($prepare ? 'prepared' : 'committed'));
	}
	$self->write("$tag\t" . ($self->{last} eq 'lost' ? 'unknown' : 'aborted'));
	$self->{count}{ $self->{last} eq 'lost' ? 'outcome unknown' : 'rolled back' }++;
	$self->execute('ROLLBACK', 'rollback') if $self->{last} ne 'lost';
	return;
}

# Somebody's prepared transaction, ended by this session.
sub end_prepared
{
	my ($self) = @_;
	my ($age, $commit) = (rand(0.8), rand() < 0.8);
	$self->{level} = 'READ COMMITTED';
	my ($tag) = $self->{db}->selectrow_array("SELECT gid FROM pg_prepared_xacts WHERE prepared < clock_timestamp() - $age * interval '1 s' ORDER BY random() LIMIT 1");
	return unless defined $tag;
	if ($self->execute(($commit ? 'COMMIT' : 'ROLLBACK') . " PREPARED '$tag'", 'end prepared'))
	{
		$self->{count}{ $commit ? 'prepared, committed' : 'prepared, rolled back' }++;
		$self->write("$tag\t" . ($commit ? 'committed' : 'aborted'));
	}
	elsif ($self->{last} eq 'lost') { $self->write("$tag\tunknown"); }
	return;
}

1;
