#include "row_event.hpp"
#include "mutant.hpp"

namespace migrate {

int trigger_depth() {
    return DatumGetInt32(DirectFunctionCall1(pg_trigger_depth, (Datum)0));
}

namespace {

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
        FmgrInfo *equal = &lookup_type_cache(att->atttypid, TYPECACHE_EQ_OPR_FINFO)->eq_opr_finfo;
        if (isnull || !DatumGetBool(FunctionCall2Coll(equal, att->attcollation, value, m->fixed[i].value)))
            return false;
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

}  // namespace

bool note_row(CacheEntry *entry, const TriggerData *data) {
    const bool inserted = TRIGGER_FIRED_BY_INSERT(data->tg_event);
    if (!inserted || trigger_depth() != entry->touched.departure_depth) forget_departure(&entry->touched);
    if (inserted) return note_insertion(entry, data);
    return TRIGGER_FIRED_BY_DELETE(data->tg_event) ? note_deletion(entry, data) : note_update(entry, data);
}

}  // namespace migrate
