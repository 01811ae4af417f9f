# The readers of the randomized checker, each in a process of its own: they look at both sides, at what the application has
# noted and at the view, in one snapshot, at any moment of the run.
package CheckerReader;

use strict;
use warnings;

use parent 'CheckerSession';
use CheckerOracle;
use Time::HiRes qw(sleep time);

# $old: holds snapshots from within the backfill until after the switch.
sub run
{
	my ($class, $common, $number, $old) = @_;
	srand($common->{seed} * 1000 + $number);
	my $self = bless { %$common, number => $number, count => {}, errors => {}, old => $old }, $class;
	open $self->{file}, '>>', "$self->{dir}/session.$number" or die "session.$number: $!";
	$self->{file}->autoflush(1);
	until (-e "$self->{dir}/stop" || -e "$self->{dir}/fault")
	{
		$self->{db}->do('ROLLBACK') if $self->{db};
		$self->rest if -e "$self->{dir}/pause";
		eval { $self->end_prepared if !$old; 1 } or $self->fault("reader $number died: $@");
		eval { $old ? $self->old_snapshot : $self->look; 1 } or $self->fault("reader $number died: $@");
		sleep($old ? rand 0.3 : 0.1 + rand 0.2);
	}
	$self->write("sum\t$_\t$self->{count}{$_}") for sort keys %{ $self->{count} };
	return;
}

sub connect
{
	my ($self) = @_;
	until ($self->{db} && $self->{db}->ping)
	{
		return if -e "$self->{dir}/stop" || -e "$self->{dir}/pause";
		$self->{db} = DBI->connect($self->{dsn}, 'postgres', '', { RaiseError => 0, PrintError => 0, AutoCommit => 1, pg_server_prepare => 0 });
		sleep 0.05 unless $self->{db};
	}
	return 1;
}

# The application's sessions may all be waiting for a prepared transaction: somebody else has to end it.
sub end_prepared
{
	my ($self) = @_;
	return unless $self->connect;
	return $self->SUPER::end_prepared;
}

# A snapshot that is younger than its locks: TRUNCATE shows to snapshots that are older than it. False where the locks are not to be
# had: a prepared transaction may have truncated a table, everybody else wait for it, and it is this session that has to end it.
sub begin
{
	my ($self) = @_;
	return $self->connect && $self->find_other && $self->{db}->do(<<"SQL");
BEGIN ISOLATION LEVEL REPEATABLE READ;
SET LOCAL lock_timeout = '1 s';
LOCK TABLE s, $self->{schema}{other} IN ACCESS SHARE MODE;
SET LOCAL lock_timeout = 0;
SQL
}

# The name that the table beside s has now. (Once both are locked it keeps it.)
sub find_other
{
	my ($self) = @_;
	return 1 unless $self->{schema}{swap};
	my ($name) = $self->{db}->selectrow_array("SELECT CASE WHEN to_regclass('t') IS NULL THEN 's_old' ELSE 't' END");
	$self->{schema}{other} = $name if defined $name;
	return defined $name;
}

# Runs the queries, by name; whatever one of them gives is a fault.
sub expect_nothing
{
	my ($self, $queries, $when) = @_;
	for my $name (sort keys %$queries)
	{
		my $rows = $self->{db}->selectall_arrayref("$queries->{$name} LIMIT 20");
		if (!defined $rows)
		{
			return 0 unless $self->{db}->ping;
			# It holds the table and wants the view, which a switch locks for some 10 ms in the other order: on a busy machine that can be
			# as long as the deadlock_timeout here.
			if ($self->{db}->state eq '40P01')
			{
				$self->{count}{'looks given up in a deadlock'}++;
				$self->{db}->do('ROLLBACK');
				return 0;
			}
			$self->fault("$name ($when): " . $self->{db}->state . ' ' . $self->{db}->errstr . "\n$queries->{$name}");
			return 0;
		}
		$self->fault("$name ($when):\n" . join("\n", map { '  ' . join(' | ', map { $_ // 'NULL' } @$_) } @$rows)) if @$rows;
		return 0 if @$rows;
	}
	return 1;
}

# The migration under way as this snapshot has it: its phase and its flow.
sub migration
{
	my ($self) = @_;
	return $self->{db}->selectrow_array(<<'SQL');
SELECT m.phase, f.id FROM migrate._migration m JOIN migrate._flow f ON f.migration = m.id
WHERE m.phase IN ('dual_writing', 'backfilling', 'validating', 'shadowing', 'ready', 'cut_over')
SQL
}

sub look
{
	my ($self) = @_;
	$self->begin or return;
	my ($phase, $flow) = $self->migration;
	return unless $self->expect_nothing(CheckerOracle->queries($self->{schema}, $flow, $phase), $phase // 'no migration');
	$self->{db}->do('COMMIT') or return;
	$self->{count}{'snapshots compared'}++;
	return;
}

# A transaction that began in the backfill reads the view after the switch: what it sees is its own snapshot's. (Under swap it reads the
# table, which it has not locked before.)
sub old_snapshot
{
	my ($self) = @_;
	my $swap = $self->{schema}{swap};
	($swap ? $self->connect && $self->{db}->do('BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT FROM app_tx LIMIT 1') : $self->begin) or return;
	my ($phase) = $self->migration;
	my $until = time() + ($phase && $phase =~ /backfilling|validating/ ? 6 : rand 1.5);
	# (The driver says when it has switched: asking the server would show this snapshot's answer.)
	my $switches = sub { return -s "$self->{dir}/switched" // 0 };
	my $before = $switches->();
	my $changed = sub { return $switches->() > $before };
	sleep 0.02 while time() < $until && !$changed->() && !-e "$self->{dir}/stop" && !-e "$self->{dir}/pause";
	my ($view) = $self->{db}->selectrow_array("SELECT to_regclass('shown')");
	return unless ($view || $swap) && !-e "$self->{dir}/pause";
	my $queries = $swap ? CheckerOracle->table_queries($self->{schema}) : CheckerOracle->view_queries($self->{schema});
	return unless $self->expect_nothing($queries, 'what switches, in a snapshot of phase ' . ($phase // 'none') . ($changed->() ? ', after a switch' : ''));
	$self->{db}->do('COMMIT') or return;
	$self->{count}{ 'views read' . ($changed->() ? ' across a switch' : '') }++;
	return;
}

1;
