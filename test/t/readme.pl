# Every SQL command of the README, run as printed, in order, by one psql session.
use strict;
use warnings;
use FindBin;
use lib $FindBin::RealBin;

use MigrateTest;
use Test::More;

open my $readme, '<', "$FindBin::RealBin/../../README.md" or die "README.md: $!";
my ($sql, $blocks, $inside) = ('', 0, 0);
while (my $line = <$readme>)
{
	if ($line =~ /^```sql/) { $inside = 1; $blocks++; next }
	$inside = 0 if $line =~ /^```/;
	$sql .= $line if $inside;
}
cmp_ok($blocks, '>', 10, "README has $blocks blocks of SQL");

my $node = new_server('readme');
$node->safe_psql('postgres', 'DROP EXTENSION migrate_ext');    # the README creates it
my ($status, $out, $err) = $node->psql('postgres', $sql, on_error_stop => 1, timeout => 180);
is($status, 0, 'all of them run') or diag($err);
like($out, qr/new side/, 'what was written after the cutover is there after the rollback');
unlike($err, qr/WARNING|ERROR/, 'without a warning');

$node->stop;
done_testing();
