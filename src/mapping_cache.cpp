#include "mapping_cache.hpp"
#include "flow.hpp"
#include "mapping_load.hpp"

namespace migrate {
namespace {

HTAB *cache = NULL;

// Any change to origin or dest (DDL, options by migrate._invalidate) makes the mapping be read again.
void relation_changed(Datum, Oid relid) {
    for_each_entry([relid](CacheEntry *entry) {
        if (entry->mapping &&
            (relid == InvalidOid || relid == entry->mapping->origin || relid == entry->mapping->dest ||
             relid == entry->mapping->view || relid == entry->mapping->carried))
            entry->stale = true;
    });
}

// Whether dest's owner may look into its schema is no part of dest's own definition.
void schema_changed(Datum, int, uint32) {
    for_each_entry([](CacheEntry *entry) { entry->stale = true; });
}

// Where dest, its key or the view is gone, there is nothing any more to be kept equal: gates bar every switch, and the
// application's statements go on. Only where they were to fail rather than leave dest behind (strict) they do, as long
// as there is a dest.
CacheEntry *unless_lost(CacheEntry *entry) {
    const Mapping *m = entry->mapping;
    if (!m->lost) return entry;
    if (m->on_failure == OnFailure::kRecord || m->reverse || get_rel_name(m->dest) == NULL) return NULL;
    ereport(
        ERROR,
        (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
         errmsg("migration \"%s\" has lost the mapping of \"%s\"", m->migration_name, get_rel_name(m->origin)),
         errdetail("Its view, or the key of \"%s\", was dropped. Without it nothing can be written there, and option "
                   "dual_write is strict.",
                   get_rel_name(m->dest)),
         errhint("SELECT migrate.cancel(%s); ends the migration.", quote_literal_cstr(m->migration_name))));
    return NULL;
}

void create_cache() {
    HASHCTL control = {};
    control.keysize = sizeof(CacheKey);
    control.entrysize = sizeof(CacheEntry);
    control.hcxt = CacheMemoryContext;
    cache = hash_create("migrate_ext mappings", 16, &control, HASH_ELEM | HASH_BLOBS | HASH_CONTEXT);
    CacheRegisterRelcacheCallback(relation_changed, (Datum)0);
    CacheRegisterSyscacheCallback(NAMESPACEOID, schema_changed, (Datum)0);
}

}  // namespace

bool begin_entries(HASH_SEQ_STATUS *scan) {
    if (cache == NULL) return false;
    hash_seq_init(scan, cache);
    return true;
}

CacheEntry *find_entry(int32 flow, bool reverse) {
    if (cache == NULL) create_cache();
    CacheKey key;
    memset(&key, 0, sizeof key);  // padding is part of the hash
    key.flow = flow;
    key.reverse = reverse;
    bool found;
    CacheEntry *entry = (CacheEntry *)hash_search(cache, &key, HASH_ENTER, &found);
    if (!found) memset((char *)entry + sizeof(CacheKey), 0, sizeof(CacheEntry) - sizeof(CacheKey));
    const bool unused = entry->touched.upsert.n == 0 && entry->touched.remove.n == 0;
    if (entry->mapping && entry->stale && unused && !is_applying(entry->mapping->migration)) {
        free_mapping(entry->mapping);
        entry->mapping = NULL;
    }
    if (entry->mapping == NULL) {
        entry->stale = entry->gap_known = false;
        entry->mapping = load_mapping(key.flow, key.reverse, Lifetime::kBackend);
    }
    return entry->mapping ? unless_lost(entry) : NULL;
}

Mapping *present_mapping(CacheEntry *entry) {
    LockRelationOid(entry->mapping->dest, RowExclusiveLock);
    if (entry->stale) look_at_tables(entry->mapping);
    return unless_lost(entry) ? entry->mapping : NULL;
}

CacheEntry *find_entry(const Trigger *trigger) {
    if (trigger->tgnargs != 2) elog(ERROR, "trigger \"%s\" has %d arguments, not 2", trigger->tgname, trigger->tgnargs);
    return find_entry(pg_strtoint32(trigger->tgargs[0]), strcmp(trigger->tgargs[1], "reverse") == 0);
}

}  // namespace migrate
