// The keys that a statement touched and that are still to be applied: collected by the row trigger, applied in bulk by
// the statement trigger. Only keys are kept, never rows: what is applied is the state at that time.
#pragma once
#include "catalog.hpp"

namespace migrate {

// A growing list of keys; one column of Datums for each column of the key, copied into the list's memory context.
struct KeyList {
    int n;
    int capacity;
    int *nest_levels;         // of the (sub)transaction that touched each key; they never fall along the list
    ItemPointerData *places;  // where origin's row with each key was written; invalid where it is not known
    Datum *columns[INDEX_MAX_KEYS];
};

struct Touched {
    KeyList upsert;                // keys that origin has, or had, after a write
    KeyList remove;                // keys that a write may have taken away
    KeyList moved_from, moved_to;  // pairs: the key that a row had, and has since (where Mapping::moves_rows)
    int departure_depth;           // of the event that left a row's move to another partition half told
    int trigger_depth;             // of the outermost statement that touched one of them
    bool left_over;  // a statement has ended without their being applied: origin may have new storage since
    MemoryContext context;
};

// Appends the key that `values` holds (mapping->nparams of them). place: of the row that has it now, or NULL.
void append_key(KeyList *list, const Mapping *mapping, const Datum *values, const ItemPointerData *place,
                MemoryContext context);

// No longer says where rows are.
void forget_places(KeyList *list);

// The outermost (sub)transaction that touched one of the keys; there must be one.
int outermost_level(const Touched &touched);

// Whether a row has left its partition, and not yet come to another.
inline bool is_under_way(const Touched &touched) {
    return touched.moved_from.n > touched.moved_to.n;
}

// No move: a trigger has made something else of it, or has a statement of its own in between.
inline void forget_departure(Touched *touched) {
    touched->moved_from.n = touched->moved_to.n;
}

// A subtransaction of this level is rolled back: the keys it touched need no writing, and its row locks, under which
// they could be read, are gone.
void forget_level(Touched *touched, int nest_level);

// A subtransaction of this level has become part of the one around it.
void merge_level(Touched *touched, int nest_level);

// The same keys in arrays of their own, in the current memory context: keys may be appended to the list meanwhile.
KeyList copy_keys(const KeyList &list, const Mapping *mapping);

// The keys [from, to) as one array a column, in the current memory context.
Datum *key_arrays(const KeyList &list, const Mapping *mapping, int from, int to);

// One key as text[] in the form kept in tables; within a bracket that has pinned the output settings.
Datum key_text(const KeyList &list, const Mapping *mapping, int index);

}  // namespace migrate
