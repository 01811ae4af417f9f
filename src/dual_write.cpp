// The dual-write triggers. The row trigger notes the keys a row event touched; the statement trigger, which fires after
// every row trigger of the statement, applies them in bulk from the state the (outermost) statement left. Where a
// foreign key between the two tables must find dest's row gone (or there) earlier, the row trigger applies the key at
// once: its name sorts before RI_ConstraintTrigger_…. What no statement trigger comes for (the apply worker of a
// subscription fires none, a partition attached since has none) is applied before the commit.
#include "dual_write.hpp"
#include "debug_point.hpp"
#include "dual_apply.hpp"
#include "flow.hpp"
#include "mapping_cache.hpp"
#include "row_event.hpp"

MIGRATE_FUNCTION(migrate_dual_write_row)
MIGRATE_FUNCTION(migrate_dual_write_flush)
MIGRATE_FUNCTION(migrate_dual_write_truncate)
MIGRATE_FUNCTION(migrate_invalidate)

namespace migrate {
namespace {

// A statement that touches more keys than this is applied in pieces, so that memory stays flat.
constexpr int kFlushAt = 10000;

// Whether what was touched is applied for good here. In a subtransaction below the one that touched it the keys stay:
// what is applied there may yet be rolled back.
bool is_final(const CacheEntry *entry) {
    return GetCurrentTransactionNestLevel() <= outermost_level(entry->touched);
}

void flush(CacheEntry *entry) {
    Touched touched = entry->touched;
    forget_departure(&touched);
    if (touched.upsert.n == 0 && touched.remove.n == 0) return;
    if (touched.left_over) forget_places(&touched.upsert);
    const bool final = is_final(entry);
    Mapping *m = present_mapping(entry);
    if (final) memset(&entry->touched, 0, sizeof(Touched));
    if (m == NULL) return;
    KeyList *lists[] = {&touched.upsert, &touched.remove, &touched.moved_from, &touched.moved_to};
    if (!final)
        for (KeyList *list : lists) *list = copy_keys(*list, m);
    apply_touched(m, touched);
    DEBUG_POINT("dual write: upserts done");
    if (final) MemoryContextDelete(touched.context);
}

// What is to be gone, or to have moved, before a foreign key's check; the rest is left to the commit.
void flush_removals(CacheEntry *entry) {
    Mapping *m = present_mapping(entry);
    if (m == NULL) return;
    Touched touched = entry->touched;
    KeyList Touched::*const lists[] = {&Touched::remove, &Touched::moved_from, &Touched::moved_to};
    const bool final = is_final(entry);
    for (KeyList Touched::*list : lists) {
        touched.*list = copy_keys(touched.*list, m);
        if (final) memset(&(entry->touched.*list), 0, sizeof(KeyList));
    }
    apply_removals(m, touched);
}

// A statement within a statement (a user's trigger, a foreign key's cascade) leaves its keys to the one around it: only
// then the states are those that the application meant, and that dest's own constraints may be held against. What was
// left over outside of the subtransaction would have to be applied again after each of its statements.
void flush_outermost(CacheEntry *entry) {
    if (trigger_depth() > entry->touched.trigger_depth) return;
    if (is_exhausted(entry->mapping) || (entry->touched.left_over && !is_final(entry)))
        entry->touched.left_over = true;  // to the commit
    else
        flush(entry);
}

CacheEntry *any_touched() {
    CacheEntry *found = NULL;
    for_each_entry([&found](CacheEntry *entry) {
        if (entry->touched.upsert.n > 0 || entry->touched.remove.n > 0) found = entry;
    });
    return found;
}

// One write may lead to another, where one migration's target is another's source. The server has fired the deferred
// triggers already: those that our writes have queued (SET CONSTRAINTS … DEFERRED) would be forgotten.
void flush_all() {
    grant_subtransactions();
    while (CacheEntry *entry = any_touched()) {
        PushActiveSnapshot(GetTransactionSnapshot());  // the last statement's is gone by now
        entry->touched.left_over = true;
        flush(entry);
        PopActiveSnapshot();
        AfterTriggerFireDeferred();
    }
}

// What a lost transaction touched needs no writing; its memory is gone with it.
void at_transaction_end(XactEvent event, void *) {
    if (event == XACT_EVENT_PRE_COMMIT || event == XACT_EVENT_PRE_PREPARE) {
        flush_all();
        return;
    }
    if (event != XACT_EVENT_ABORT && event != XACT_EVENT_COMMIT && event != XACT_EVENT_PREPARE) return;
    end_applying_transaction(event == XACT_EVENT_COMMIT);
    for_each_entry([event](CacheEntry *entry) {
        if (entry->gap_level > 0 && event == XACT_EVENT_COMMIT) entry->gap_known = true;
        entry->gap_level = 0;
        memset(&entry->touched, 0, sizeof(Touched));
    });
}

void at_subtransaction_end(SubXactEvent event, SubTransactionId, SubTransactionId, void *) {
    const int level = GetCurrentTransactionNestLevel();
    for_each_entry([event, level](CacheEntry *entry) {
        const bool inside = entry->gap_level >= level;
        if (event == SUBXACT_EVENT_ABORT_SUB) {
            forget_level(&entry->touched, level);
            if (inside) entry->gap_level = 0;
        } else if (event == SUBXACT_EVENT_COMMIT_SUB) {
            merge_level(&entry->touched, level);
            if (inside) entry->gap_level = level - 1;
        }
    });
}

// Whether a partition has our statement triggers. One that was made or attached since has the row trigger only: its
// other writes are carried by nobody, and when it is gone again nothing is there to tell that it was.
bool is_armed(Relation partition, const Trigger *row) {
    const TriggerDesc *triggers = partition->trigdesc;
    for (int i = 0; i < triggers->numtriggers; i++) {
        const Trigger *t = &triggers->triggers[i];
        if (!TRIGGER_FOR_ROW(t->tgtype) && strncmp(t->tgname, "!migrate_", 9) == 0 && t->tgnargs == 2 &&
            strcmp(t->tgargs[0], row->tgargs[0]) == 0 && strcmp(t->tgargs[1], row->tgargs[1]) == 0)
            return true;
    }
    return false;
}

// Once a transaction; and a backend does not repeat it until the dual writes may have been armed again, for a table
// that nobody looks at for days.
void look_for_gap(CacheEntry *entry, const TriggerData *data) {
    if (RelationGetRelid(data->tg_relation) == entry->mapping->origin || entry->gap_level > 0 ||
        (entry->gap_known && !entry->stale) || is_armed(data->tg_relation, data->tg_trigger))
        return;
    record_gap(entry->mapping);
    entry->gap_level = GetCurrentTransactionNestLevel();
}

void note_event(CacheEntry *entry, const TriggerData *data) {
    const Mapping *m = entry->mapping;
    const bool at_once = note_row(entry, data);
    DEBUG_POINT("dual write: keys noted");
    if (is_under_way(entry->touched)) return;
    if (entry->touched.upsert.n + entry->touched.remove.n >= kFlushAt && is_final(entry)) {
        grant_subtransactions();
        flush(entry);
    } else if (at_once) {
        if (is_exhausted(m) && !m->insert_at_once)
            flush_removals(entry);
        else
            flush(entry);
    }
}

TriggerData *trigger_data(FunctionCallInfo fcinfo) {
    if (!CALLED_AS_TRIGGER(fcinfo))
        ereport(ERROR, (errcode(ERRCODE_E_R_I_E_TRIGGER_PROTOCOL_VIOLATED), errmsg("not called by trigger manager")));
    return (TriggerData *)fcinfo->context;
}

}  // namespace

void init_dual_write() {
    RegisterXactCallback(at_transaction_end, NULL);
    RegisterSubXactCallback(at_subtransaction_end, NULL);
}

}  // namespace migrate

using namespace migrate;

// AFTER INSERT OR UPDATE OR DELETE … FOR EACH ROW EXECUTE FUNCTION migrate._dual_write_row(flow, direction)
Datum migrate_dual_write_row(PG_FUNCTION_ARGS) {
    TriggerData *data = trigger_data(fcinfo);
    CacheEntry *entry = find_entry(data->tg_trigger);
    if (entry && !is_echo(entry->mapping)) {
        look_for_gap(entry, data);
        note_event(entry, data);
    }
    return PointerGetDatum(NULL);
}

// AFTER INSERT OR UPDATE OR DELETE … FOR EACH STATEMENT EXECUTE FUNCTION migrate._dual_write_flush(flow, direction)
Datum migrate_dual_write_flush(PG_FUNCTION_ARGS) {
    CacheEntry *entry = find_entry(trigger_data(fcinfo)->tg_trigger);
    if (entry && !is_echo(entry->mapping)) flush_outermost(entry);
    return PointerGetDatum(NULL);
}

// AFTER TRUNCATE … FOR EACH STATEMENT EXECUTE FUNCTION migrate._dual_write_truncate(flow, direction)
Datum migrate_dual_write_truncate(PG_FUNCTION_ARGS) {
    CacheEntry *entry = find_entry(trigger_data(fcinfo)->tg_trigger);
    if (entry && entry->mapping->carry_delete && !is_echo(entry->mapping)) {
        if (Mapping *m = present_mapping(entry)) apply_truncation(m);
        DEBUG_POINT("dual write: truncate carried");
    }
    return PointerGetDatum(NULL);
}

// migrate._invalidate(relation regclass) RETURNS void: every backend reads the relation's mappings again, from the
// commit on.
Datum migrate_invalidate(PG_FUNCTION_ARGS) {
    CacheInvalidateRelcacheByRelid(PG_GETARG_OID(0));
    PG_RETURN_VOID();
}
