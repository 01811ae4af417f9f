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

// Deletes every row of this mapping's share of dest that no mapping view yields: what TRUNCATE asks for. As above.
void remove_all_missing(Mapping *mapping);

// Whether this backend is inside a write of this migration's own: its triggers then do nothing.
bool is_applying(int32 migration);
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
