// A lock that keeps two ways of writing a flow's target apart. A bulk copy (bulk_copy.hpp) locks no source row: it is
// safe beside writers that see its uncommitted rows. Whoever writes by SQL does not see them, and so takes the other
// side of this lock:
//   RowExclusiveLock  a bulk copy; it only tries, so that it waits for nobody
//   ShareLock         writes by SQL, of forward mappings
// Either is held until the end of the transaction.
#pragma once
#include "catalog.hpp"

namespace migrate {

bool try_lock_flow(const Mapping *mapping, LOCKMODE mode);
void lock_flow(const Mapping *mapping, LOCKMODE mode);

}  // namespace migrate
