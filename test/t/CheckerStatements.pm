# The statements of the randomized checker: every kind that an application may send, over a few hot keys, keys about the
# backfill's cursor, and any keys. A generator is one session's; all its decisions come from the session's random numbers.
package CheckerStatements;

use strict;
use warnings;

sub new
{
	my ($class, $schema, $number, $version) = @_;
	my $shared = $schema->{shared};
	my $hot = 50;    # keys that everybody is after, spread over the key space
	my $step = int(@$shared / $hot);
	return bless {
		schema => $schema, number => $number, version => $version, cursor => undef,
		hot => [ map { $shared->[ $_ * $step ] } 0 .. $hot - 1 ], count => {},
	}, $class;
}

sub one_of { return $_[ int rand @_ ]; }

# $n different ranks.
sub ranks
{
	my ($self, $n) = @_;
	my %seen;
	my $shared = $self->{schema}{shared};
	while (keys %seen < $n)
	{
		my $dice = rand;
		my $rank = one_of(@{ $self->{hot} });
		$rank = $shared->[ rand @$shared ] if $dice < 0.15;
		if ($dice > 0.6 && defined $self->{cursor})
		{
			my $near = $self->{cursor} + int(rand 90) - 15;
			$rank = $near if $near >= 0 && $near < @{ $self->{schema}{keys} };
		}
		$seen{$rank} = 1;
	}
	return sort { $a <=> $b } keys %seen;
}

# A value as SQL: short as a rule, at times NULL, at times toasted.
sub value
{
	my ($self, $side) = @_;
	my $dice = rand;
	my $word = "'$self->{number}-" . int(rand 1e9) . "'";
	return 'NULL::text' if $dice < 0.05 && ($side eq 's' || $self->{schema}{bare});
	return "(SELECT string_agg(md5($word || g), '') FROM generate_series(1, 200) g)" if $dice > 0.985;
	return $word;
}

# Values for the columns of value_columns, in their order.
sub values
{
	my ($self, $side) = @_;
	my @values = ($self->value($side), int rand 100);
	push @values, rand() < 0.7 ? 'NULL::bigint' : int rand 2000 if $self->{schema}{unique};
	return @values;
}

sub row { my ($self, $side, $rank) = @_; return '(' . join(', ', $self->{schema}->literals($rank), $self->values($side)) . ')'; }

sub all_columns { my ($self, $side) = @_; return join ', ', $self->{schema}->columns($side), $self->{schema}->value_columns($side); }

sub assignments
{
	my ($self, $side) = @_;
	my @values = $self->values($side);
	# A unique number moves by single rows only (a statement may not give it from row to row).
	return join ', ', map { "$_ = " . shift @values } ($self->{schema}->value_columns($side))[ 0, 1 ];
}

# ---- kinds: each gives a list of statements. side: s or t (whose columns); relation: s, t or the view.

sub insert
{
	my ($self, $side, $relation) = @_;
	my ($rank) = $self->ranks(1);
	return "INSERT INTO $relation (" . $self->all_columns($side) . ') VALUES ' . $self->row($side, $rank);
}

# Rows that may be there already: passed over.
sub insert_new
{
	my ($self, $side, $relation, $n) = @_;
	my @rows = map { $self->row($side, $_) } $self->ranks($n // 1 + int rand 5);
	my $columns = $self->all_columns($side);
	return "INSERT INTO $relation ($columns) VALUES " . join(', ', @rows) . ' ON CONFLICT DO NOTHING' unless $self->{schema}{deferrable};
	my $keys = $self->{schema}->columns($side);
	return "INSERT INTO $relation ($columns) SELECT * FROM (VALUES " . join(', ', @rows) . ") AS x ($columns) WHERE ($keys) NOT IN (SELECT $keys FROM $relation)";
}

sub reload
{
	my ($self, $side, $relation) = @_;
	return $self->insert_new($side, $relation, 15 + int rand 30);
}

sub upsert
{
	my ($self, $side, $relation) = @_;
	return $self->insert($side, $relation) if $self->{schema}{deferrable};
	my @rows = map { $self->row($side, $_) } $self->ranks(1 + int rand 3);
	my ($value) = $self->{schema}->value_columns($side);
	return "INSERT INTO $relation (" . $self->all_columns($side) . ') VALUES ' . join(', ', @rows) . ' ON CONFLICT (' . $self->{schema}->columns($side)
	  . ") DO UPDATE SET $value = excluded.$value, n = excluded.n";
}

sub update
{
	my ($self, $side, $relation) = @_;
	return "UPDATE $relation SET " . $self->assignments($side) . ' WHERE ' . $self->{schema}->is_key($side, $self->ranks(1 + int rand 3));
}

# Nothing that is mapped changes.
sub unmapped
{
	my ($self, $side, $relation) = @_;
	return $self->update($side, $relation) if $relation ne 's';
	return "UPDATE s SET junk = 'junk " . int(rand 1000) . "' WHERE " . $self->{schema}->is_key($side, $self->ranks(2));
}

sub delete
{
	my ($self, $side, $relation) = @_;
	return "DELETE FROM $relation WHERE " . $self->{schema}->is_key($side, $self->ranks(1 + int rand 3));
}

sub set_key { my ($self, $side, $rank) = @_; return '(' . $self->{schema}->columns($side) . ') = ROW(' . $self->{schema}->literals($rank) . ')'; }

sub move
{
	my ($self, $side, $relation) = @_;
	my ($from, $to) = $self->ranks(2);
	($from, $to) = ($to, $from) if rand() < 0.5;
	my $value = rand() < 0.5 ? '' : ', ' . $self->assignments($side);
	return ("DELETE FROM $relation WHERE " . $self->{schema}->is_key($side, $to),
		"UPDATE $relation SET " . $self->set_key($side, $to) . $value . ' WHERE ' . $self->{schema}->is_key($side, $from));
}

sub delete_insert
{
	my ($self, $side, $relation) = @_;
	my ($rank) = $self->ranks(1);
	my $delete = "DELETE FROM $relation WHERE " . $self->{schema}->is_key($side, $rank);
	my $insert = "INSERT INTO $relation (" . $self->all_columns($side) . ')';
	my $row = $self->row($side, $rank);
	return "WITH gone AS ($delete RETURNING 1) $insert SELECT x.* FROM (SELECT " . substr($row, 1, -1) . ') x, (SELECT count(*) FROM gone) g'
	  if rand() < 0.3;
	return ($delete, "$insert VALUES $row");
}

sub swap
{
	my ($self, $side, $relation) = @_;
	my $schema = $self->{schema};
	my ($one, $two) = $self->ranks(2);
	if ($schema->{deferrable} && @{ $schema->{types} } == 1)
	{
		my ($key, $a, $b) = ($schema->columns($side), $schema->literals($one), $schema->literals($two));
		return "UPDATE $relation SET $key = CASE $key WHEN $a THEN $b ELSE $a END WHERE $key IN ($a, $b)";
	}
	my $spare = one_of(@{ $schema->{private}[ $self->{number} ] });
	my @moves = map { "UPDATE $relation SET " . $self->set_key($side, $_->[1]) . ' WHERE ' . $schema->is_key($side, $_->[0]) } [ $one, $spare ], [ $two, $one ], [ $spare, $two ];
	return ("DELETE FROM $relation WHERE " . $schema->is_key($side, $spare), @moves);
}

# Keys that move on by one, under a key that is checked at the statement's end; with the neighbours' temporary duplicates.
sub shift_keys
{
	my ($self, $side, $relation) = @_;
	my $schema = $self->{schema};
	return $self->swap($side, $relation) unless $schema->{deferrable} && $schema->{kind} eq 'bigint';
	my ($from) = $self->ranks(1);
	my $to = $from + 5 > $#{ $schema->{keys} } ? $#{ $schema->{keys} } : $from + 5;
	return ('SET CONSTRAINTS ALL ' . one_of('IMMEDIATE', 'DEFERRED'),
		"DELETE FROM $relation WHERE " . $schema->is_key($side, $to), "UPDATE $relation SET k = k + 1 WHERE " . $schema->in_range($side, $from, $to - 1));
}

# A row that stands for a moment on another row's key.
sub duplicate
{
	my ($self, $side, $relation) = @_;
	my $schema = $self->{schema};
	return $self->move($side, $relation) unless $schema->{deferrable};
	my ($home, $away) = $self->ranks(2);
	my ($value) = $schema->value_columns($side);
	my $guest = "'guest " . int(rand 1e9) . "'";
	return ('SET CONSTRAINTS ALL DEFERRED', "UPDATE $relation SET " . $self->set_key($side, $away) . ", $value = $guest, n = 1 WHERE " . $schema->is_key($side, $home),
		"UPDATE $relation SET " . $self->set_key($side, $home) . ' WHERE ' . $schema->is_key($side, $away) . " AND $value = $guest");
}

sub some_range
{
	my ($self, $side) = @_;
	my ($from) = $self->ranks(1);
	my $to = $from + 5 + int rand 40;
	$to = $#{ $self->{schema}{keys} } if $to > $#{ $self->{schema}{keys} };
	return $self->{schema}->in_range($side, $from, $to);
}

sub bulk_update { my ($self, $side, $relation) = @_; return "UPDATE $relation SET n = n + 1 WHERE " . $self->some_range($side); }

sub bulk_delete
{
	my ($self, $side, $relation) = @_;
	return ("DELETE FROM $relation WHERE n % 3 = 0 AND " . $self->some_range($side), $self->reload($side, $relation));
}

sub merge
{
	my ($self, $side, $relation) = @_;
	my $schema = $self->{schema};
	return $self->upsert($side, $relation) if $self->{version} < 15 || $relation eq 'shown';
	my @rows = map { $self->row($side, $_) } $self->ranks(2 + int rand 3);
	my $columns = $self->all_columns($side);
	my @keys = split /, /, $schema->columns($side);
	my $on = join ' AND ', map { "d.$_ = x.$_" } @keys;
	my $all = join ', ', map { "x.$_" } split /, /, $columns;
	my ($value) = $schema->value_columns($side);
	return "MERGE INTO $relation d USING (VALUES " . join(', ', @rows) . ") AS x ($columns) ON $on WHEN MATCHED AND d.n % 4 = 1 THEN DELETE "
	  . "WHEN MATCHED THEN UPDATE SET $value = x.$value, n = x.n WHEN NOT MATCHED THEN INSERT ($columns) VALUES ($all)";
}

sub lock_rows
{
	my ($self, $side, $relation) = @_;
	return "SELECT FROM $relation WHERE " . $self->{schema}->is_key($side, $self->ranks(3)) . ' FOR ' . one_of('UPDATE', 'NO KEY UPDATE', 'SHARE', 'KEY SHARE');
}

# Rows of the session's own, away and back by COPY.
sub copy
{
	my ($self, $side, $relation) = @_;
	return $self->reload($side, $relation) if $relation eq 'shown';
	my @ranks = @{ $self->{schema}{private}[ $self->{number} ] };
	my $from = int rand @ranks - 10;
	@ranks = @ranks[ $from .. $from + 9 ];
	my @lines = map { join "\t", (map { s/^'|'(::uuid)?$//gr } split /, /, $self->{schema}->literals($_)), "copied " . int(rand 1e9), int rand 100 } @ranks;
	my $columns = join ', ', $self->{schema}->columns($side), ($self->{schema}->value_columns($side))[ 0, 1 ];
	return ("DELETE FROM $relation WHERE " . $self->{schema}->is_key($side, @ranks), { copy => "COPY $relation ($columns) FROM STDIN", lines => \@lines });
}

sub truncate
{
	my ($self, $side, $relation) = @_;
	return $self->bulk_delete($side, $relation) if $relation eq 'shown' || $self->{schema}{foreign_key} || $self->{schema}{swap};
	return ("SET LOCAL lock_timeout = '100 ms'", "TRUNCATE $relation", 'SET LOCAL lock_timeout = 0', $self->insert_new($side, $relation, 400));
}

my @weights = (
	update => 20, insert => 4, insert_new => 12, upsert => 10, delete => 8, move => 10, delete_insert => 8, swap => 5, shift_keys => 3, duplicate => 4,
	bulk_update => 4, bulk_delete => 2, merge => 7, lock_rows => 5, copy => 3, unmapped => 4, reload => 4);
my @kinds;
while (my ($kind, $weight) = splice @weights, 0, 2) { push @kinds, ($kind) x $weight; }

# A random kind, its statements.
sub next
{
	my ($self, $side, $relation, $may_truncate) = @_;
	my $kind = one_of(@kinds);
	$kind = 'truncate' if $may_truncate && rand() < 0.002;
	$self->{count}{$kind}++;
	return ($kind, $self->$kind($side, $relation));
}

1;
