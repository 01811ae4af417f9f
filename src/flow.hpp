// The one primitive: make the rows of dest for these keys (or this key range) equal to the mapping view's rows for
// them. It reads the state, never an event, so it is idempotent and order does not matter.
#pragma once
#include "catalog.hpp"

namespace migrate {

// Keys, column by column: one array Datum of origin's key type for each non-constant key column (mapping->nparams of
// them).
using KeyArrays = Datum *;

// Upserts the view's rows with these keys into dest; leaves dest rows whose key the view has not. As dest's owner, with
// the latest snapshot. The caller sees to it that nobody changes these source rows meanwhile. SPI must be connected.
void upsert_keys(Mapping *mapping, KeyArrays keys);

// Deletes the rows of dest with these keys that no mapping view yields. As above.
void remove_keys(Mapping *mapping, KeyArrays keys);

// Both in one statement (where dest allows: else one after the other), so that dest's foreign keys are checked, and
// their actions taken, on the outcome: a row may have been turned away from one that goes. As above.
void replace_keys(Mapping *mapping, KeyArrays removed, KeyArrays upserted);

// Gives the row of dest that has the one key the other, if dest has no row with that one, and the view has, or the row
// is to move on from there (`all` are the keys that rows move from): what dest alone has of the row goes with it. As
// above.
void move_row(Mapping *mapping, KeyArrays from, KeyArrays to, KeyArrays all);

// For an upsert that this unique index of dest refuses: deletes the rows that hold there what the view's rows with
// these keys are to have, and that no mapping view yields. (Their removal is still to come: the statement around this
// one has taken their row of origin away, or it was refused once, and waits for a worker.) Whether there were any. As
// above.
bool remove_rivals(Mapping *mapping, KeyArrays keys, Oid index);

// Deletes every row of this mapping's share of dest that no mapping view yields: what TRUNCATE asks for. As above.
void remove_all_missing(Mapping *mapping);

// Finds the keys of those rows, as origin has them: they are in SPI_tuptable, and their number is returned. As above.
uint64 find_all_missing(Mapping *mapping);

// Whether this backend is inside a write by this mapping (a function called by it has led to another one).
bool is_in_use(const Mapping *mapping);

// Whether this backend is inside a write of this migration's own.
bool is_applying(int32 migration);

// Whether it is inside a write of this migration's own in the other direction: an event on the mapping's origin is then
// the echo of that write, not to be carried back. (In the same direction it is not: a user's trigger on dest, or a
// foreign key's cascade, writes to origin in earnest.)
bool is_echo(const Mapping *mapping);
void begin_applying(const Mapping *mapping);
void end_applying();

// Runs fn as dest's owner, with the loop guard set and plans pinned to indexes.
template <class Fn>
void as_dest_owner(const Mapping *mapping, int extra_flags, Fn fn) {
    with_user(mapping->dest_owner, SECURITY_LOCAL_USERID_CHANGE | SECURITY_NOFORCE_RLS | extra_flags, [&] {
        pin_planner_to_indexes();
        begin_applying(mapping);
        fn();
        end_applying();
    });
}

void init_flow();

}  // namespace migrate
