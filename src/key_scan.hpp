// Reading a flow's source directly by its key index, in the order in which the backfill's ranges are kept.
#pragma once
#include "catalog.hpp"

namespace migrate {

// The index of origin that yields its rows in the order of the mapping's key: unique and immediate, of the whole table,
// over exactly the key's columns in their order, ascending by their types' own operators and under their own
// collations. InvalidOid: there is none.
Oid key_order_index(const Mapping *mapping, Relation origin);

// Fills in one condition of an index scan: (k1, k2, …) <strategy> key, where key is a text[] as the checkpoint has it.
// The members are allocated in the current memory context.
void compare_row(ScanKey condition, const Mapping *mapping, Relation index, StrategyNumber strategy, Datum key);

// The key of a row of origin, as texts in the form kept in tables (within a bracket that has pinned the output
// settings): mapping->nparams of them, in the current memory context.
void key_texts(const Mapping *mapping, TupleTableSlot *row, Datum *texts);

// The texts of n keys as one list, text[] (2-D), in the memory context `result`.
Datum key_list(const Mapping *mapping, Datum *texts, int n, MemoryContext result);

}  // namespace migrate
