#include "flow_lock.hpp"

namespace migrate {
namespace {

// The flow's row in migrate._flow, as an object of the database.
LOCKTAG flow_tag(const Mapping *m) {
    LOCKTAG tag;
    const Oid table = get_relname_relid("_flow", get_namespace_oid("migrate", false));
    SET_LOCKTAG_OBJECT(tag, MyDatabaseId, table, (Oid)m->flow, 0);
    return tag;
}

}  // namespace

bool try_lock_flow(const Mapping *m, LOCKMODE mode) {
    const LOCKTAG tag = flow_tag(m);
    return LockAcquire(&tag, mode, false, true) != LOCKACQUIRE_NOT_AVAIL;
}

void lock_flow(const Mapping *m, LOCKMODE mode) {
    const LOCKTAG tag = flow_tag(m);
    (void)LockAcquire(&tag, mode, false, false);
}

}  // namespace migrate
