// The mappings that this backend's dual writes or batches have used, each with the keys that are still to be applied.
#pragma once
#include "touched.hpp"

namespace migrate {

struct CacheKey {
    int32 flow;
    bool reverse;
};

struct CacheEntry {
    CacheKey key;
    Mapping *mapping;
    bool stale;
    int gap_level;   // of the (sub)transaction that has recorded a gap; 0: none
    bool gap_known;  // this backend has committed such a record since the mapping was read
    Touched touched;
};

// The entry of a flow and direction; its mapping is read again where it is out of date and not in use. NULL where the
// mapping is gone, or (dual_write = best_effort) lost.
CacheEntry *find_entry(int32 flow, bool reverse);

// The same for a trigger's arguments.
CacheEntry *find_entry(const Trigger *trigger);

// The entry's mapping, for a write that is to be made now, with the lock that this takes on dest: whoever has changed
// dest while the statement ran may have made it refuse what it did not before. NULL as above.
Mapping *present_mapping(CacheEntry *entry);

// False where there are none.
bool begin_entries(HASH_SEQ_STATUS *scan);

// Calls each(entry) for all of them.
template <class Fn>
void for_each_entry(Fn each) {
    HASH_SEQ_STATUS scan;
    if (!begin_entries(&scan)) return;
    while (CacheEntry *entry = (CacheEntry *)hash_seq_search(&scan)) each(entry);
}

}  // namespace migrate
