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
#include "mutant.hpp"

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

// Whether a row has left its partition, and not yet come to another.
bool is_under_way(const Touched &touched) {
    return touched.moved_from.n > touched.moved_to.n;
}

// No move: a trigger has made something else of it, or has a statement of its own in between.
void forget_departure(Touched *touched) {
    touched->moved_from.n = touched->moved_to.n;
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

// How many triggers this one is nested in, itself included.
int trigger_depth() {
    return DatumGetInt32(DirectFunctionCall1(pg_trigger_depth, (Datum)0));
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

// ---- what a row event touched
// ------------------------------------------------------------------------------------------

// The attribute of the trigger's relation (a partition may number them otherwise) that is origin's `attnum`.
AttrNumber local_attnum(const Mapping *m, Relation relation, AttrNumber attnum) {
    if (RelationGetRelid(relation) == m->origin) return attnum;
    return get_attnum(RelationGetRelid(relation), get_attname(m->origin, attnum, false));
}

void read_key(const Mapping *m, Relation relation, TupleTableSlot *slot, Datum *values) {
    for (int i = 0; i < m->nparams; i++) {
        bool isnull;
        values[i] = slot_getattr(slot, local_attnum(m, relation, m->key[m->params[i]].origin), &isnull);
        if (isnull)
            ereport(ERROR, (errcode(ERRCODE_NOT_NULL_VIOLATION),
                            errmsg("null in key column \"%s\" of \"%s\"",
                                   get_attname(m->origin, m->key[m->params[i]].origin, false),
                                   RelationGetRelationName(relation)),
                            errhint("A migrated key must be NOT NULL: ALTER TABLE %s ALTER COLUMN … SET NOT NULL;",
                                    RelationGetRelationName(relation))));
    }
}

bool same_value(TupleTableSlot *a, TupleTableSlot *b, AttrNumber attnum) {
    bool a_null, b_null;
    const Datum left = slot_getattr(a, attnum, &a_null), right = slot_getattr(b, attnum, &b_null);
    if (a_null || b_null) return a_null && b_null;
    const Form_pg_attribute att = TupleDescAttr(a->tts_tupleDescriptor, attnum - 1);
    if (att->attlen == -1 && DatumGetPointer(left) != DatumGetPointer(right) &&
        VARATT_IS_EXTERNAL_ONDISK(DatumGetPointer(left)) && VARATT_IS_EXTERNAL_ONDISK(DatumGetPointer(right)) &&
        memcmp(DatumGetPointer(left), DatumGetPointer(right), VARSIZE_EXTERNAL(DatumGetPointer(left))) == 0)
        return true;  // an unchanged toasted value: the same pointer
    return datum_image_eq(left, right, att->attbyval, att->attlen);
}

// Whether nothing that the mapping reads has changed: then dest's row is right already.
bool unchanged(const Mapping *m, Relation relation, TupleTableSlot *before, TupleTableSlot *after) {
    if (m->nreads == 1 && m->reads[0] == 0) return false;
    for (int i = 0; i < m->nreads; i++)
        if (!same_value(before, after, local_attnum(m, relation, m->reads[i]))) return false;
    return true;
}

// Not where the row's place matters, too: place_scan.hpp.
bool may_pass_over(const Mapping *m) {
    return !m->copied_by_place || is_mutant(mutant::skip_by_place);
}

bool same_key(const Mapping *m, Relation relation, TupleTableSlot *before, TupleTableSlot *after) {
    for (int i = 0; i < m->nparams; i++)
        if (!same_value(before, after, local_attnum(m, relation, m->key[m->params[i]].origin))) return false;
    return true;
}

// Whether the row is of this flow. One that another source feeds has other constants in its key: to look at what this
// source has under the rest of it, which is somebody else's to write, would not be ours.
bool is_own(const Mapping *m, Relation relation, TupleTableSlot *slot) {
    for (int i = 0; i < m->nfixed; i++) {
        bool isnull;
        const AttrNumber attnum = local_attnum(m, relation, m->fixed[i].origin);
        const Datum value = slot_getattr(slot, attnum, &isnull);
        const Form_pg_attribute att = TupleDescAttr(RelationGetDescr(relation), attnum - 1);
        Oid input, argument;
        getTypeInputInfo(getBaseType(att->atttypid), &input, &argument);
        const Datum constant =
            OidInputFunctionCall(input, const_cast<char *>(m->fixed[i].constant), argument, att->atttypmod);
        FmgrInfo *equal = &lookup_type_cache(att->atttypid, TYPECACHE_EQ_OPR_FINFO)->eq_opr_finfo;
        if (isnull || !DatumGetBool(FunctionCall2Coll(equal, att->attcollation, value, constant))) return false;
    }
    return true;
}

// place: where the row that has the key now is, or NULL.
void touch(CacheEntry *entry, KeyList Touched::*list, Relation relation, TupleTableSlot *slot,
           const ItemPointerData *place) {
    Datum values[INDEX_MAX_KEYS];
    read_key(entry->mapping, relation, slot, values);
    Touched &touched = entry->touched;
    const int depth = trigger_depth();
    const bool none = touched.upsert.n == 0 && touched.remove.n == 0;
    touched.trigger_depth = none ? depth : Min(touched.trigger_depth, depth);
    if (touched.context == NULL)
        touched.context =
            AllocSetContextCreate(TopTransactionContext, "migrate_ext touched keys", ALLOCSET_SMALL_SIZES);
    append_key(&(touched.*list), entry->mapping, values, place, touched.context);
}

// A key that a row has lost. Where origin's key is deferrable another row may have it too, and be the one that stays.
void touch_old_key(CacheEntry *entry, Relation relation, TupleTableSlot *slot) {
    if (entry->mapping->carry_delete) touch(entry, &Touched::remove, relation, slot, NULL);
    if (entry->mapping->ambiguous && !is_mutant(mutant::new_key_only))
        touch(entry, &Touched::upsert, relation, slot, NULL);
}

// Dest's row may get the new key on its way to yet another.
void touch_new_key(CacheEntry *entry, Relation relation, TupleTableSlot *after) {
    touch(entry, &Touched::moved_to, relation, after, NULL);
    touch(entry, &Touched::remove, relation, after, NULL);
}

// An update that takes a row to another partition is two events, one right after the other: a deletion, whose row tells
// of it, and an insertion. (Where dest references origin, the foreign key may want the deletion carried in between.)
void touch_departure(CacheEntry *entry, const TriggerData *data) {
    const Mapping *m = entry->mapping;
    if (!m->moves_rows || m->delete_at_once || !HeapTupleHeaderIndicatesMovedPartitions(data->tg_trigtuple->t_data))
        return;
    touch(entry, &Touched::moved_from, data->tg_relation, data->tg_trigslot, NULL);
    entry->touched.departure_depth = trigger_depth();
}

// Whether the row has the key that was appended last.
bool has_last_key(const Mapping *m, const KeyList &list, Relation relation, TupleTableSlot *slot) {
    Datum key[INDEX_MAX_KEYS];
    read_key(m, relation, slot, key);
    for (int i = 0; i < m->nparams; i++) {
        int16 length;
        bool by_value;
        get_typlenbyval(m->key[m->params[i]].origin_type, &length, &by_value);
        if (!datum_image_eq(key[i], list.columns[i][list.n - 1], by_value, length)) return false;
    }
    return true;
}

void touch_arrival(CacheEntry *entry, const TriggerData *data) {
    Touched &touched = entry->touched;
    if (!is_under_way(touched)) return;
    if (has_last_key(entry->mapping, touched.moved_from, data->tg_relation, data->tg_trigslot))
        forget_departure(&touched);
    else
        touch_new_key(entry, data->tg_relation, data->tg_trigslot);
}

// A row that this transaction wrote: foreign keys check it again at each update, as they do an inserted one, and the
// dual write of its insertion may still be to come (a trigger of the user's that comes before ours by name updates it).
bool is_new(HeapTuple row) {
    return TransactionIdIsCurrentTransactionId(HeapTupleHeaderGetXmin(row->t_data));
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

// What was touched; true: to be applied at once.
bool note_insertion(CacheEntry *entry, const TriggerData *data) {
    TupleTableSlot *row = data->tg_trigslot;
    if (!is_own(entry->mapping, data->tg_relation, row)) return false;
    touch(entry, &Touched::upsert, data->tg_relation, row, &row->tts_tid);
    touch_arrival(entry, data);
    return entry->mapping->insert_at_once;
}

bool note_deletion(CacheEntry *entry, const TriggerData *data) {
    if (!is_own(entry->mapping, data->tg_relation, data->tg_trigslot)) return false;
    touch_old_key(entry, data->tg_relation, data->tg_trigslot);
    touch_departure(entry, data);
    return entry->mapping->delete_at_once;
}

bool note_update(CacheEntry *entry, const TriggerData *data) {
    const Mapping *m = entry->mapping;
    Relation relation = data->tg_relation;
    TupleTableSlot *before = data->tg_trigslot, *after = data->tg_newslot;
    if (may_pass_over(m) && unchanged(m, relation, before, after)) return false;
    const bool was = is_own(m, relation, before), is = is_own(m, relation, after);
    const bool moved = !same_key(m, relation, before, after);
    bool at_once = false;
    if (was && (moved || m->filtered)) {
        touch_old_key(entry, relation, before);
        at_once = m->delete_at_once;
    }
    if (is) touch(entry, &Touched::upsert, relation, after, &after->tts_tid);
    if (was && is && moved && m->moves_rows) {
        touch(entry, &Touched::moved_from, relation, before, NULL);
        touch_new_key(entry, relation, after);
    }
    return at_once || (is && m->insert_at_once && (moved || is_new(data->tg_trigtuple)));
}

void note_event(CacheEntry *entry, const TriggerData *data) {
    const Mapping *m = entry->mapping;
    const bool inserted = TRIGGER_FIRED_BY_INSERT(data->tg_event);
    if (!inserted || trigger_depth() != entry->touched.departure_depth) forget_departure(&entry->touched);
    const bool at_once = inserted                                  ? note_insertion(entry, data)
                         : TRIGGER_FIRED_BY_DELETE(data->tg_event) ? note_deletion(entry, data)
                                                                   : note_update(entry, data);
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
