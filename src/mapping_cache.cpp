#include "mapping_cache.hpp"
#include "flow.hpp"
#include "mapping_load.hpp"

namespace migrate {
namespace {

HTAB *cache = NULL;

// Any change to origin or dest (DDL, options by migrate._invalidate) makes the mapping be read again.
void relation_changed(Datum, Oid relid) {
    for_each_entry([relid](CacheEntry *entry) {
        if (entry->mapping && (relid == InvalidOid || relid == entry->mapping->origin ||
                               relid == entry->mapping->dest || relid == entry->mapping->view))
            entry->stale = true;
    });
}

// Whether dest's owner may look into its schema is no part of dest's own definition.
void schema_changed(Datum, int, uint32) {
    for_each_entry([](CacheEntry *entry) { entry->stale = true; });
}

// Where dest, its key or the view is gone, there is nothing any more to be kept equal: gates bar every switch.
CacheEntry *unless_lost(CacheEntry *entry) {
    const Mapping *m = entry->mapping;
    if (!m->lost) return entry;
    if (m->on_failure == OnFailure::kRecord) return NULL;
    ereport(ERROR,
            (errcode(ERRCODE_UNDEFINED_TABLE),
             errmsg("a dual write from \"%s\" has lost its mapping, or its table", get_rel_name(m->origin)),
             errdetail("Something was dropped that flow %d rests on, and option dual_write is strict.", m->flow),
             errhint("SELECT * FROM migrate.preflight(…); tells what; migrate.cancel or migrate.finalize ends it.")));
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
    if (!found) entry->mapping = NULL, entry->stale = false, memset(&entry->touched, 0, sizeof(Touched));
    const bool unused = entry->touched.upsert.n == 0 && entry->touched.remove.n == 0;
    if (entry->mapping && entry->stale && unused && !is_applying(entry->mapping->migration)) {
        free_mapping(entry->mapping);
        entry->mapping = NULL;
    }
    if (entry->mapping == NULL) {
        entry->stale = false;
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
