// Builds for tests in which one safeguard of the protocol is removed: `make MIGRATE_MUTANT=no_row_lock`. The suite must
// fail on each of them, which shows that it would notice if the safeguard were lost (`test/run --long` builds them
// all). Nowhere else does the code know of mutants; in a normal build every condition below is a constant false.
#pragma once

namespace migrate {
namespace mutant {

enum Name {
    none,
    no_row_lock,         // the backfill's batch copies without locking the source rows it read
    no_refetch,          // a batch that locks no row does not read the source again after it has written
    no_key_lock,         // keys that are applied one by one are read without a lock
    no_requeue,          // keys that a batch skipped, because they were locked, are forgotten
    no_latest_snapshot,  // dual writes see the target as the application's transaction does, old snapshots included
    no_barrier,          // a switch does not wait for transactions with a snapshot from before
    event_not_state,     // a key that an event took away is deleted without a look whether it is back
    direct_mvcc_lookup,  // the direct path looks for dest's row by a snapshot, which shows nothing uncommitted
    no_speculation,      // it inserts a row that was not there when it looked as if nobody else could be faster
    no_target_lock,      // it does not hold a row of dest that is right already
    skip_by_place,   // while the source is copied in the order of place, updates of unmapped columns are not carried
    twice_not_held,  // a key that stands twice is written from a row that somebody else may just be deleting
    new_key_only,    // a key that a row has lost is not looked at again, though another row may have it
};

}  // namespace mutant

#ifndef MIGRATE_MUTANT
#define MIGRATE_MUTANT none
#endif

constexpr bool is_mutant(mutant::Name name) {
    return name == mutant::MIGRATE_MUTANT;
}

// A build for tests, `make MIGRATE_PATH=spi`, in which every dual write goes through SQL: both paths must pass the
// tests of the protocol.
enum class Path { any, spi };

#ifndef MIGRATE_PATH
#define MIGRATE_PATH any
#endif

constexpr bool kOnlySql = Path::MIGRATE_PATH == Path::spi;

}  // namespace migrate
