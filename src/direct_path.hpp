// Whether a mapping's rows may be written without SQL, row by row with the executor's own routines (direct_apply.cpp).
#pragma once
#include "catalog.hpp"

namespace migrate {

// NULL where they may; else the first reason why not. Whatever dest has that the direct path does not honour is one.
// The answer holds until origin, dest or the view changes; who acts on it holds a lock on dest that keeps DDL out.
const char *why_not_direct(const Mapping *m, Relation origin, Relation dest);

// The unique indexes over just the mapping's key columns of origin or dest, that a key can be looked up in.
List *find_key_indexes(const Mapping *m, Relation relation, AttrNumber KeyColumn::*column);

// Whether the trigger is one of ours, whatever its name is.
bool is_dual_write_trigger(const Trigger *trigger);

}  // namespace migrate
