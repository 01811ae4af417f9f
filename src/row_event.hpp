// What one event of a row touches: the keys that are to be applied, and the moves of rows whose key has changed.
#pragma once
#include "mapping_cache.hpp"

namespace migrate {

// How many triggers this one is nested in, itself included.
int trigger_depth();

// Notes in entry->touched what the event of an AFTER … FOR EACH ROW trigger has touched. True: to be applied at once,
// for a foreign key's check comes next.
bool note_row(CacheEntry *entry, const TriggerData *data);

}  // namespace migrate
