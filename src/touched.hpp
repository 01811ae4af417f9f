// The keys that a statement touched and that are still to be applied: collected by the row trigger, applied in bulk by
// the statement trigger. Only keys are kept, never rows: what is applied is the state at that time.
#pragma once
#include "catalog.hpp"

namespace migrate {

// A growing list of keys; one column of Datums for each column of the key, copied into the list's memory context.
struct KeyList {
    int n;
    int capacity;
    Datum *columns[INDEX_MAX_KEYS];
};

struct Touched {
    KeyList upsert;  // keys that origin has, or had, after a write
    KeyList remove;  // keys that a write may have taken away
    int nest_level;  // of the outermost (sub)transaction that touched one of them
    MemoryContext context;
};

// Appends the key that `values` holds (mapping->nparams of them).
void append_key(KeyList *list, const Mapping *mapping, const Datum *values, MemoryContext context);

// The keys [from, to) as one array a column, in the current memory context.
Datum *key_arrays(const KeyList &list, const Mapping *mapping, int from, int to);

// One key as text[] in the form kept in tables; within a bracket that has pinned the output settings.
Datum key_text(const KeyList &list, const Mapping *mapping, int index);

}  // namespace migrate
