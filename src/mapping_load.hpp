// A mapping with all that is to be known of it: what is on record (catalog.hpp), and what its tables tell.
#pragma once
#include "catalog.hpp"

namespace migrate {

// kCall: until SPI_finish, or until an error, which must leave nothing behind in a worker that lives for days.
// kBackend: until free_mapping.
enum class Lifetime { kCall, kBackend };

// Loads the mapping into a memory context of its own, by the latest snapshot. NULL when there is no such mapping; one
// that is lost is kept too, so that it need not be looked for each time.
Mapping *load_mapping(int32 flow, bool reverse, Lifetime lifetime);

// Looks at its tables (again): all that they tell is as of now.
void look_at_tables(Mapping *mapping);

// Whether dest's owner, as whom it is written, still has the rights that takes: an owner may change, or lose rights to
// himself.
bool owner_may_write(const Mapping *mapping);

// Frees a mapping that is kept, with its plans.
void free_mapping(Mapping *mapping);

}  // namespace migrate
