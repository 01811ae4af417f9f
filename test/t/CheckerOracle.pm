# What the randomized checker knows of the truth, by SQL that shares nothing with the extension.
#
# Triggers of the application's own stamp every row that it writes with a version (unique, never reused) and note, in the same
# transaction, which version the write took away and which it made: (old, new). They act for the role app only, so writes that
# the extension carries over are not noted. At any moment and in any snapshot the rows that must exist are then those versions
# that were made and not taken away, whatever order the writes came in:
#   - a version taken away twice is a lost update: somebody wrote over a row without having seen its last version;
#   - a version that is to exist and does not, or the other way round, is a lost row or a ghost.
package CheckerOracle;

use strict;
use warnings;

sub triggers_sql
{
	my ($class, $schema) = @_;
	my $sql = <<'SQL';
CREATE SEQUENCE app_version;
CREATE TABLE app_log (side text NOT NULL, tag text, old_ver bigint, new_ver bigint, row text);
CREATE TABLE app_tx (tag text PRIMARY KEY);
GRANT USAGE ON SEQUENCE app_version TO app;
GRANT INSERT, SELECT ON app_log, app_tx TO app;
GRANT SELECT, INSERT, UPDATE, DELETE, TRUNCATE ON s, t TO app;
CREATE FUNCTION stamp() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN NEW.ver := nextval('public.app_version'); RETURN NEW; END $$;
SQL
	for my $side ('s', 't')
	{
		my ($new, $old) = map { $schema->shape($side, $_) } 'NEW', 'x';
		$sql .= <<"SQL";
CREATE FUNCTION note_$side() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
    INSERT INTO public.app_log VALUES ('$side', current_setting('app.tag', true), CASE WHEN TG_OP <> 'INSERT' THEN OLD.ver END,
        CASE WHEN TG_OP <> 'DELETE' THEN NEW.ver END, CASE WHEN TG_OP <> 'DELETE' THEN ROW($new)::text END);
    RETURN NULL;
END \$\$;
CREATE FUNCTION note_truncate_$side() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
    INSERT INTO public.app_log SELECT '$side', current_setting('app.tag', true), x.ver FROM public.$side x;
    RETURN NULL;
END \$\$;
SQL
		$sql .= $class->nested_functions_sql($schema, $side) if $schema->{triggers};
		$sql .= $class->attach_sql($schema, $side) unless $side eq 't' && $schema->{plain_target};
	}
	my $row = $schema->shape('s', 'x');
	my $key = 'ARRAY[' . join(', ', map { "$_\::text" } split /, /, $schema->columns('s')) . ']';
	return $sql . <<"SQL";
UPDATE s SET ver = nextval('app_version');
INSERT INTO app_log SELECT 's', 'initial', NULL, x.ver, ROW($row)::text FROM s x;
CREATE FUNCTION backfill_position() RETURNS text[] LANGUAGE sql SECURITY DEFINER AS
    'SELECT CASE WHEN by_place THEN (SELECT $key FROM s WHERE s.ctid > reached[1]::tid ORDER BY s.ctid LIMIT 1) ELSE reached END
     FROM (SELECT f.by_place, coalesce(r.checkpoint, r.low) AS reached FROM migrate._range r JOIN migrate._flow f ON f.id = r.flow
           WHERE NOT r.done AND coalesce(r.checkpoint, r.low) IS NOT NULL ORDER BY random() LIMIT 1) x';
SQL
}

# The triggers of one side. (A plain target has none until it is about to serve: then dual writes need no SQL, nor does the copy.)
sub attach_sql
{
	my ($class, $schema, $side) = @_;
	my $columns = join ', ', $schema->columns($side), $schema->value_columns($side);
	my $guard = "WHEN (current_user = 'app')";
	my $nested = "WHEN (current_user = 'app' AND pg_trigger_depth() = 0";
	my $sql = <<"SQL";
CREATE TRIGGER stamp BEFORE INSERT OR UPDATE OF $columns ON $side FOR EACH ROW $guard EXECUTE FUNCTION stamp();
CREATE TRIGGER note_1 AFTER UPDATE OF $columns ON $side FOR EACH ROW $guard EXECUTE FUNCTION note_$side();
CREATE TRIGGER note_2 AFTER INSERT OR DELETE ON $side FOR EACH ROW $guard EXECUTE FUNCTION note_$side();
CREATE TRIGGER note_truncate BEFORE TRUNCATE ON $side FOR EACH STATEMENT $guard EXECUTE FUNCTION note_truncate_$side();
SQL
	return $sql unless $schema->{triggers};
	return $sql . <<"SQL";
CREATE TRIGGER "AA_again" AFTER INSERT OR UPDATE ON $side FOR EACH ROW $nested AND NEW.n % 6 = 0) EXECUTE FUNCTION again_$side();
CREATE TRIGGER "AA_back" AFTER DELETE ON $side FOR EACH ROW $nested AND OLD.n % 13 = 5) EXECUTE FUNCTION back_$side();
CREATE TRIGGER zz_sibling AFTER UPDATE ON $side FOR EACH ROW $nested AND NEW.n % 11 = 3) EXECUTE FUNCTION sibling_$side();
SQL
}

sub detach_sql
{
	my ($class, $schema, $side) = @_;
	return join ' ', map { "DROP TRIGGER $_ ON $side;" } qw(stamp note_1 note_2 note_truncate), $schema->{triggers} ? ('"AA_again"', '"AA_back"', 'zz_sibling') : ();
}

# Functions of the application's triggers that write while its statement is under way: one, before the extension's by name, to the same row
# again; one, before them too, that brings a deleted row back; one, after them, to the next row.
sub nested_functions_sql
{
	my ($class, $schema, $side) = @_;
	my ($value) = $schema->value_columns($side);
	my $columns = $schema->columns($side);
	my $new = join ', ', map { "NEW.$_" } split /, /, $columns;
	my $old = $new =~ s/NEW/OLD/gr;
	return <<"SQL";
CREATE FUNCTION again_$side() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
    UPDATE public.$side SET $value = $value || ' again', n = n + 1 WHERE ($columns) = ($new);
    RETURN NULL;
END \$\$;
CREATE FUNCTION back_$side() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
    INSERT INTO public.$side ($columns, $value, n) VALUES ($old, 'back', 1);
    RETURN NULL;
END \$\$;
CREATE FUNCTION sibling_$side() RETURNS trigger LANGUAGE plpgsql AS \$\$
BEGIN
    UPDATE public.$side SET $value = 'sibling of ' || NEW.ver WHERE ($columns) = (SELECT $columns FROM public.$side WHERE ($columns) > ($new) ORDER BY $columns LIMIT 1);
    RETURN NULL;
END \$\$;
SQL
}

# Queries, by name, each of which gives what is wrong; nothing must come of them, in any snapshot. flow: of the migration that is
# under way, undef where there is none.
sub queries
{
	my ($class, $schema, $flow, $phase) = @_;
	my $s = $class->rows($schema);
	my %query = (
		'a lost update: versions taken away twice' => 'SELECT old_ver, count(*), string_agg(concat_ws(\' \', side, tag, new_ver), \', \') FROM app_log WHERE old_ver IS NOT NULL GROUP BY old_ver HAVING count(*) > 1',
		'rows of the source that no acknowledged write explains' => $class->difference($s, $class->living),
		'acknowledged writes that the source has not' => $class->difference($class->living, $s));
	if (defined $flow)
	{
		$query{'rows that differ'} = $class->differing($schema, $flow, $phase);
		$query{'rows that only the target has'} = $class->ghosts($schema, $flow);
		$query{'what the view for reading shows'} = $class->misread($schema, $flow) unless $schema->{swap};
	}
	return \%query;
}

# The application's rows, under the name that it knows.
sub rows { my ($class, $schema) = @_; return 'SELECT ROW(' . $schema->shape('s', 'x') . ')::text AS row FROM s x'; }

sub difference { my ($class, $one, $other) = @_; return "($one) EXCEPT ALL ($other)"; }
sub living { return 'SELECT p.row FROM app_log p WHERE p.new_ver IS NOT NULL AND NOT EXISTS (SELECT FROM app_log c WHERE c.old_ver = p.new_ver)'; }

# The key of a row as the extension's own tables hold it.
sub key_text { my ($class, $schema, $side, $alias) = @_; return 'ARRAY[' . join(', ', map { "$alias.$_\::text" } split /, /, $schema->columns($side)) . ']'; }

sub has_failed
{
	my ($class, $schema, $flow, $side, $alias) = @_;
	return '(' . $class->key_text($schema, $side, $alias) . ") IN (SELECT key FROM migrate._failure WHERE flow = $flow)";
}

# A source row whose target row is missing must be one that the backfill has yet to come to; one that is there must be equal.
sub differing
{
	my ($class, $schema, $flow, $phase) = @_;
	my ($s, $t) = map { 'ROW(' . $schema->shape($_->[0], $_->[1]) . ')' } [ 's', 's' ], [ 't', 't' ];
	my $join = $class->same_key($schema, 't');
	my $key = $class->key_text($schema, 's', 's');
	my @types = map { $_ eq 'integer' ? 'int' : $_ } @{ $schema->{types} };
	my $bound = sub { my ($array) = @_; '(' . join(', ', map { "($array)[" . ($_ + 1) . "]::$types[$_]" } 0 .. $#types) . ')' };
	my $columns = '(' . join(', ', map { "s.$_" } @{ $schema->{source_key} }) . ')';
	my ($reached, $high) = map { $bound->($_) } 'coalesce(r.checkpoint, r.low)', 'r.high';
	my $ahead = $phase eq 'dual_writing' ? 'true' : <<"SQL";
EXISTS (SELECT FROM migrate._range r JOIN migrate._flow f ON f.id = r.flow WHERE r.flow = $flow AND NOT r.done AND CASE WHEN f.by_place
            THEN (coalesce(r.checkpoint, r.low) IS NULL OR s.ctid > (coalesce(r.checkpoint, r.low))[1]::tid) AND s.ctid <= r.high[1]::tid
                 OR f.copied_file IS DISTINCT FROM pg_relation_filenode('s')
            ELSE (coalesce(r.checkpoint, r.low) IS NULL OR $columns > $reached) AND (r.high IS NULL OR $columns <= $high) END)
    OR $key IN (SELECT key FROM migrate._requeue WHERE flow = $flow)
SQL
	my $failed = $class->has_failed($schema, $flow, 's', 's');
	my $target_key = $schema->{target_key}[0];
	return <<"SQL";
SELECT $s AS source, CASE WHEN t.$target_key IS NOT NULL THEN $t END AS target FROM s LEFT JOIN $schema->{other} t ON $join
WHERE $s IS DISTINCT FROM $t AND NOT (t.$target_key IS NULL AND ($ahead)) AND NOT $failed
SQL
}

# Wherever its reads are routed to, the view for reading shows the rows of the source.
sub misread
{
	my ($class, $schema, $flow) = @_;
	my ($s, $x) = map { 'ROW(' . $schema->shape($_->[0], $_->[1]) . ')' } [ 's', 's' ], [ 't', 'x' ];
	my ($of_s, $of_x) = map { 'coalesce(' . $class->has_failed($schema, $flow, @$_) . ', false)' } [ 's', 's' ], [ 't', 'x' ];
	my ($source_key, $target_key) = ($schema->{source_key}[0], $schema->{target_key}[0]);
	my $join = $class->same_key($schema, 'x');
	return <<"SQL";
SELECT CASE WHEN s.$source_key IS NOT NULL THEN $s END AS source, CASE WHEN x.$target_key IS NOT NULL THEN $x END AS shown FROM s FULL JOIN shown_read x ON $join
WHERE (s.$source_key IS NULL OR x.$target_key IS NULL OR $s IS DISTINCT FROM $x) AND NOT $of_s AND NOT $of_x
SQL
}

sub ghosts
{
	my ($class, $schema, $flow) = @_;
	my $row = $schema->shape('t', 't');
	my $join = $class->same_key($schema, 't');
	my $failed = $class->has_failed($schema, $flow, 't', 't');
	return "SELECT ROW($row) FROM $schema->{other} t WHERE NOT EXISTS (SELECT FROM s WHERE $join) AND NOT $failed";
}

sub same_key
{
	my ($class, $schema, $alias) = @_;
	return join ' AND ', map { "s.$schema->{source_key}[$_] = $alias.$schema->{target_key}[$_]" } 0 .. $#{ $schema->{source_key} };
}

# What the table that a swap gives the source's name shows, against what the application has noted, in an old snapshot.
sub table_queries
{
	my ($class, $schema) = @_;
	my $rows = $class->rows($schema);
	return { 'rows that the table does not show' => $class->difference($class->living, $rows), 'rows that only the table shows' => $class->difference($rows, $class->living) };
}

# What the view that cutover switches shows, against the source in the same snapshot.
sub view_queries
{
	my ($class, $schema) = @_;
	my $shown = 'SELECT ROW(' . $schema->shape('t', 'x') . ')::text AS row FROM shown x';
	my $s = $class->rows($schema);
	return { 'rows that the view does not show' => $class->difference($s, $shown), 'rows that only the view shows' => $class->difference($shown, $s) };
}

1;
