// The primitive of flow.hpp for lists of keys without SQL, where the mapping's relations allow it: the same meaning, at
// a fraction of the cost.
#pragma once
#include "touched.hpp"

namespace migrate {

// The keys [from, to) of a list; none by default.
struct KeySlice {
    const KeyList *list;
    int from, to;
};

// Removes the first keys and upserts the others, as one change. False, and nothing done, where it takes SQL. Either way
// dest is locked then, and mapping->dest_owner is who owns it now.
bool apply_direct(Mapping *mapping, const KeySlice &removed, const KeySlice &upserted);

}  // namespace migrate
