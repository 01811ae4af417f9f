# The randomized checker's tables: a source, its target, and what is known of both without asking the extension. The kind of
# key and the other properties follow from the seed.
package CheckerSchema;

use strict;
use warnings;

use Digest::MD5 qw(md5_hex);

our $rows = 3000;        # ranks of the key space; about two thirds of them are rows at the start
our $private = 40;       # ranks of its own that each session has beside these, for COPY and reloads

# For each kind of key: the source's columns, their types, and a key's literals by its number.
my %kinds = (
	bigint => { types => ['bigint'], values => sub { ("$_[0]") } },
	text => { types => ['text'], values => sub { ("'k" . substr(md5_hex("t$_[0]"), 0, 6) . "-$_[0]'") } },
	uuid => { types => ['uuid'], values => sub { my $h = md5_hex("u$_[0]"); $h =~ s/^(.{8})(.{4})(.{4})(.{4})(.{12})$/'$1-$2-$3-$4-$5'::uuid/; ($h) } },
	composite => { types => [ 'integer', 'text' ], values => sub { ($_[0] % 7, "'c" . $_[0] . "'") } },
);

sub new
{
	my ($class, $seed, $sessions) = @_;
	srand($seed);
	my $kind = (sort keys %kinds)[ ($seed + int($seed / 4)) % keys %kinds ];
	my $self = bless { kind => $kind, types => $kinds{$kind}{types}, sessions => $sessions }, $class;
	# Four consecutive seeds have each of the things that exclude each other; the others are thrown.
	my $shape = $seed % 4;
	$self->{partitioned} = $shape == 1;
	$self->{deferrable} = $shape == 2;
	$self->{unique} = $shape == 3 || $shape == 0 && rand() < 0.3;
	$self->{swap} = $shape == (int($seed / 4) % 2 ? 0 : 3);    # cutover by swap: both tables have the same columns
	$self->{other} = 't';    # the table beside s; after a swap, under another name
	$self->{foreign_key} = !$self->{deferrable} && !$self->{swap} && rand() < 0.5;
	$self->{bare} = $self->{swap} || rand() < 0.5;    # no expression in the mapping: then the view can be written
	$self->{triggers} = rand() < 0.8;
	$self->{workers} = rand() < 0.3 ? 3 : 1;
	$self->{preload} = rand() < 0.7 ? 1 : 0;
	$self->{strict} = rand() < 0.3;
	$self->{plain_target} = $self->{swap} || rand() < 0.6;    # no triggers of the application's on it while it is filled
	$self->{late_triggers} = $self->{plain_target} && !$self->{swap};    # they come before the cutover; a swap brings them itself
	$self->{by_place} = $self->{plain_target} && !$self->{partitioned} && !$self->{deferrable} && rand() < 0.5;
	my $n = @{ $self->{types} };
	$self->{source_key} = $n == 1 ? ['k'] : [ 'a', 'b' ];
	$self->{target_key} = $self->{swap} ? $self->{source_key} : $n == 1 ? ['tk'] : [ 'ta', 'tb' ];
	$self->order_keys;
	return $self;
}

# Keys by rank: the order in which the backfill passes them.
sub order_keys
{
	my ($self) = @_;
	my @keys = map { [ $kinds{ $self->{kind} }{values}->($_) ] } 1 .. $rows + $private * $self->{sessions};
	my $numeric = $self->{types}[0] =~ /int/;
	$self->{keys} = [ sort { ($numeric ? $a->[0] <=> $b->[0] : $a->[0] cmp $b->[0]) || ($a->[1] // '') cmp ($b->[1] // '') } @keys ];
	# Every session's private ranks are spread, so that the backfill's cursor passes them too.
	my $step = int(@keys / ($private * $self->{sessions}));
	my @private = map { $_ * $step } 0 .. $private * $self->{sessions} - 1;
	push @{ $self->{private}[ $_ % $self->{sessions} ] }, $private[$_] for 0 .. $#private;
	my %private = map { $_ => 1 } @private;
	$self->{shared} = [ grep { !$private{$_} } 0 .. $#keys ];
	return;
}

sub describe
{
	my ($self) = @_;
	return join ', ', "key $self->{kind}", map { $self->{$_} ? $_ : () } qw(swap partitioned deferrable unique foreign_key bare triggers preload strict plain_target by_place);
}

# The literals of a key, in the order of the side's columns, and conditions on them.
sub literals { my ($self, $rank) = @_; return join ', ', @{ $self->{keys}[$rank] }; }
sub columns { my ($self, $side) = @_; return join ', ', @{ $self->{ $side eq 's' ? 'source_key' : 'target_key' } }; }
sub is_key { my ($self, $side, @ranks) = @_; return '(' . $self->columns($side) . ') IN (' . join(', ', map { '(' . $self->literals($_) . ')' } @ranks) . ')'; }

sub in_range
{
	my ($self, $side, $from, $to) = @_;
	my $columns = $self->columns($side);
	return "($columns) >= (" . $self->literals($from) . ") AND ($columns) <= (" . $self->literals($to) . ')';
}

# The rank of the first key at or after this one, given as the checkpoint has it.
sub rank_of
{
	my ($self, @texts) = @_;
	my $numeric = $self->{types}[0] =~ /int/;
	my ($low, $high) = (0, scalar @{ $self->{keys} });
	my @want = map { $self->{types}[$_] =~ /int/ ? $texts[$_] : "'$texts[$_]'" . ($self->{types}[$_] eq 'uuid' ? '::uuid' : '') } 0 .. $#texts;
	while ($low < $high)
	{
		my $middle = int(($low + $high) / 2);
		my $key = $self->{keys}[$middle];
		my $order = ($numeric ? $key->[0] <=> $want[0] : $key->[0] cmp $want[0]) || ($key->[1] // '') cmp ($want[1] // '');
		if ($order < 0) { $low = $middle + 1 } else { $high = $middle }
	}
	return $low;
}

# The value columns of one side, as statements write them: text, number and (sometimes) the unique number.
sub value_columns { my ($self, $side) = @_; return ($side eq 's' || $self->{swap} ? 'v' : 'val', 'n', $self->{unique} ? ('u') : ()); }

# One side's rows as the target shows them: key columns, value, n, u, version. Long values by their digest.
sub shape
{
	my ($self, $side, $row) = @_;
	my $value = "$row." . ($self->value_columns($side))[0];
	$value = "coalesce($value, '')" if $side eq 's' && !$self->{bare};
	my $u = $self->{unique} ? "$row.u" : 'NULL::bigint';
	my $key = join ', ', map { "$row.$_" } @{ $self->{ $side eq 's' ? 'source_key' : 'target_key' } };
	return "$key, CASE WHEN length($value) < 100 THEN $value ELSE md5($value) END, $row.n, $u, $row.ver";
}

sub create_sql
{
	my ($self) = @_;
	my @types = @{ $self->{types} };
	my @s = @{ $self->{source_key} };
	my @t = @{ $self->{target_key} };
	my $s_columns = join ', ', map { "$s[$_] $types[$_] NOT NULL" } 0 .. $#s;
	my $t_columns = join ', ', map { "$t[$_] $types[$_] NOT NULL" } 0 .. $#t;
	my ($s_key, $t_key) = (join(', ', @s), join(', ', @t));
	my $u = $self->{unique} ? ', u bigint UNIQUE' : '';
	my $deferrable = $self->{deferrable} ? 'DEFERRABLE' : '';
	my $partition = $self->{partitioned} ? "PARTITION BY HASH ($s_key)" : '';
	my ($column) = $self->value_columns('t');
	my $value = $self->{bare} ? "$column text" : "$column text NOT NULL DEFAULT ''";
	my $junk = $self->{swap} ? ', junk text' : '';
	my $reference = $self->{foreign_key} ? ', FOREIGN KEY (' . join(', ', @t) . ") REFERENCES s ($s_key)" : '';
	my $sql = <<"SQL";
CREATE ROLE data;
CREATE ROLE app LOGIN;
GRANT CREATE, USAGE ON SCHEMA public TO data;
SET ROLE data;
CREATE TABLE s ($s_columns, v text, n integer, junk text $u, ver bigint NOT NULL DEFAULT 0, PRIMARY KEY ($s_key) $deferrable) $partition;
CREATE TABLE t ($t_columns, $value, n integer$junk $u, ver bigint NOT NULL DEFAULT 0, PRIMARY KEY ($t_key)$reference);
SQL
	$sql .= join '', map { "CREATE TABLE s_$_ PARTITION OF s FOR VALUES WITH (MODULUS 3, REMAINDER $_);\n" } 0 .. 2 if $self->{partitioned};
	my @initial = grep { $_ % 3 } @{ $self->{shared} };
	$sql .= "INSERT INTO s ($s_key, v, n) VALUES " . join(', ', map { '(' . $self->literals($_) . ", 'initial $_', " . $_ % 100 . ')' } @initial) . ";\n";
	return $sql . "RESET ROLE;\n";
}

# What the application maps, both ways.
sub define_sql
{
	my ($self, $name) = @_;
	my @s = @{ $self->{source_key} };
	my @t = @{ $self->{target_key} };
	my $u = $self->{unique} ? ', u' : '';
	my $mapping = join(', ', map { "$s[$_] AS $t[$_]" } 0 .. $#s) . ', ' . ($self->{bare} ? 'v' : "coalesce(v, '')") . " AS val, n, ver$u";
	my $reverse = join(', ', map { "$t[$_] AS $s[$_]" } 0 .. $#s) . ", val AS v, n, ver$u";
	$reverse = $self->{deferrable} ? '' : "reverse => '$reverse',";
	my $accept = $self->{deferrable} ? "SELECT migrate.set('$name', 'accept_reverse_gaps', 'on');" : '';
	$mapping =~ s/'/''/g;
	my $order = $self->{by_place} ? 'place' : 'key';
	my $mode = $self->{strict} ? 'strict' : 'best_effort';
	my $define = $self->{swap} ? <<"SQL" : <<"SQL";
SELECT migrate.define('$name', source => 's', target => 't', on_target_delete => 'delete');
SELECT migrate.set('$name', 'cutover', 'swap');
SQL
SELECT migrate.define('$name', source => 's', target => 't', mapping => '$mapping', $reverse on_target_delete => 'delete');
SELECT migrate.add_view('$name', view => 'shown');
SELECT migrate.add_view('$name', view => 'shown_read', use => 'read');
GRANT SELECT, INSERT, UPDATE, DELETE ON shown TO app;
SQL
	return $define . <<"SQL";
SELECT migrate.set('$name', 'lock_timeout', '500 ms'), migrate.set('$name', 'cutover_timeout', '20 s'), migrate.set('$name', 'batch_time', '1 ms'),
    migrate.set('$name', 'workers', '$self->{workers}'), migrate.set('$name', 'dual_write', '$mode'), migrate.set('$name', 'copy_order', '$order');
$accept
SQL
}

1;
