// Why this is right at every isolation level.
//   The source row is looked at with SnapshotSelf: it is one that this transaction has written or holds locked, so
//   there
// is one state of it, whatever the transaction's snapshot is.
//   The target row is looked for with SnapshotDirty, which shows what others have not committed yet. Where somebody is
// about to change the row, or has just made it, we wait for the end of that transaction and look at everything again:
// what is written is always what the source row is now. A transaction with an old snapshot therefore gets no
// serialization failure and overlooks no row, whoever made it.
//   A serializable transaction reads nothing here that another one's write could turn into an anomaly: dest's row is a
// function of the source row, which is this transaction's own. So no predicate lock is taken on dest by the look, while
// heap_insert, heap_update, heap_delete and the index insertion look for the conflicts of readers of dest themselves.
#include "direct_row.hpp"
#include "direct_path.hpp"
#include "mutant.hpp"

namespace migrate {
namespace {

constexpr bool kSeesOldTarget = is_mutant(mutant::no_latest_snapshot) || is_mutant(mutant::direct_mvcc_lookup);

// ---- looking

void make_lookup(KeyLookup *lookup, const Mapping *m, Oid index_id, AttrNumber KeyColumn::*column) {
    Relation index = index_open(index_id, AccessShareLock);
    lookup->index = index_id;
    for (int i = 0; i < m->nkey; i++) {
        const Oid type = index->rd_opcintype[i];
        const Oid equal = get_opfamily_member(index->rd_opfamily[i], type, type, BTEqualStrategyNumber);
        if (!OidIsValid(equal)) elog(ERROR, "index %u has no equality operator for type %u", index_id, type);
        ScanKeyEntryInitialize(&lookup->scan_keys[i], 0, i + 1, BTEqualStrategyNumber, InvalidOid,
                               index->rd_indcollation[i], get_opcode(equal), (Datum)0);
        for (int k = 0; k < m->nkey; k++)
            if (m->key[k].*column == index->rd_index->indkey.values[i]) lookup->key[i] = k;
    }
    index_close(index, NoLock);
}

// A scan keeps things in the memory that it runs in.
bool look_up(RowWriter *w, IndexScanDesc scan, KeyLookup *lookup, const Datum *key, TupleTableSlot *slot) {
    const int nkey = w->path->mapping->nkey;
    MemoryContext old = MemoryContextSwitchTo(w->estate->es_query_cxt);
    for (int i = 0; i < nkey; i++) lookup->scan_keys[i].sk_argument = key[lookup->key[i]];
    index_rescan(scan, lookup->scan_keys, nkey, NULL, 0);
    const bool found = index_getnext_slot(scan, ForwardScanDirection, slot);
    MemoryContextSwitchTo(old);
    return found;
}

// Kept over the rows.
IndexScanDesc begin_scan(RowWriter *w, Relation relation, Relation index, Snapshot snapshot) {
    MemoryContext old = MemoryContextSwitchTo(w->estate->es_query_cxt);
    IndexScanDesc scan = begin_index_scan(relation, index, snapshot, w->path->mapping->nkey);
    MemoryContextSwitchTo(old);
    return scan;
}

bool has_key(const RowWriter *w, const Datum *key) {
    const Mapping *m = w->path->mapping;
    for (int i = 0; i < m->nkey; i++) {
        bool isnull;
        const AttrNumber column = m->key[i].origin;
        const Form_pg_attribute att = TupleDescAttr(RelationGetDescr(w->origin), column - 1);
        const Datum value = slot_getattr(w->source_row, column, &isnull);
        if (isnull || !datum_image_eq(value, key[i], att->attbyval, att->attlen)) return false;
    }
    return true;
}

// The source row with this key, if there is one. No two have it: the key is not deferrable. Where the row was written
// last is asked first; if it is still there, and still has the key, it is the one.
bool find_source(RowWriter *w, const Datum *key, ItemPointer place) {
    if (place && ItemPointerIsValid(place) &&
        table_tuple_fetch_row_version(w->origin, place, SnapshotSelf, w->source_row) && has_key(w, key))
        return true;
    KeyLookup *lookup = &w->path->source;
    if (w->source_scan == NULL) {
        w->source_index = index_open(lookup->index, AccessShareLock);
        w->source_scan = begin_scan(w, w->origin, w->source_index, SnapshotSelf);
    }
    return look_up(w, w->source_scan, lookup, key, w->source_row);
}

enum class Found { nothing, row, moving };

// Waits for the transaction that is about to change the row found, or has made it and not committed.
Found wait_for_writer(RowWriter *w) {
    const TransactionId writer = TransactionIdIsValid(w->dirty.xmin) ? w->dirty.xmin : w->dirty.xmax;
    if (!TransactionIdIsValid(writer)) return Found::row;
    ItemPointerData place = w->old_row->tts_tid;
    ExecClearTuple(w->old_row);
    if (TransactionIdIsValid(w->dirty.xmin) && w->dirty.speculativeToken)
        SpeculativeInsertionWait(w->dirty.xmin, w->dirty.speculativeToken);
    else
        XactLockTableWait(writer, w->dest, &place, XLTW_Update);
    return Found::moving;
}

// The target row with this key in w->old_row. `moving`: somebody was writing it, and has ended; all must be looked at
// again.
Found find_target(RowWriter *w, const Datum *key) {
    KeyLookup *lookup = &w->path->target;
    if (w->target_scan == NULL) {
        w->target_index = index_open(lookup->index, AccessShareLock);
        w->target_scan = begin_scan(w, w->dest, w->target_index, &w->dirty);
    }
    if (kSeesOldTarget) w->target_scan->xs_snapshot = GetTransactionSnapshot();
    InitDirtySnapshot(w->dirty);
    if (!look_up(w, w->target_scan, lookup, key, w->old_row)) return Found::nothing;
    return wait_for_writer(w);
}

// Whether dest really has no row with this key, when a look with SnapshotDirty found none. It can miss a row whose
// update was committed between its look at the index and its look at the row, for it sees one version too late and the
// next too early. A snapshot taken now shows either of them. (To an insertion, the index itself tells.)
bool is_certainly_absent(RowWriter *w, const Datum *key) {
    CommandCounterIncrement();  // let it see what we have deleted
    Snapshot snapshot = RegisterSnapshot(GetLatestSnapshot());
    IndexScanDesc scan = begin_scan(w, w->dest, w->target_index, snapshot);
    const bool found = look_up(w, scan, &w->path->target, key, w->old_row);
    ExecClearTuple(w->old_row);
    index_endscan(scan);
    UnregisterSnapshot(snapshot);
    return !found;
}

// ---- writing

// Somebody was faster: all is looked at again. (Not with a snapshot that would show the same for ever.)
bool look_again() {
    if (kSeesOldTarget) ereport(ERROR, (errcode(ERRCODE_T_R_SERIALIZATION_FAILURE), errmsg("not to be seen")));
    return false;
}

void check_row(RowWriter *w) {
    w->new_row->tts_tableOid = RelationGetRelid(w->dest);
    if (w->dest->rd_att->constr) ExecConstraints(w->target, w->new_row, w->estate);
}

List *write_indexes(RowWriter *w, bool update, bool only_summarizing, bool *conflict) {
    if (!w->indexes_open) {
        MemoryContext old = MemoryContextSwitchTo(w->estate->es_query_cxt);
        ExecOpenIndices(w->target, true);
        MemoryContextSwitchTo(old);
        w->indexes_open = true;
    }
    return insert_index_entries(w->estate, w->target, w->new_row, update, conflict, conflict ? w->path->arbiters : NIL,
                                only_summarizing);
}

// Inserts w->new_row; false where somebody else has inserted the key meanwhile: ours is undone then. A conflict on any
// other unique index is an error.
bool insert_row(RowWriter *w) {
    add_defaults(w->path->projection, w->new_row);
    check_row(w);
    const CommandId command = GetCurrentCommandId(true);
    List *recheck;
    if (is_mutant(mutant::no_speculation)) {
        table_tuple_insert(w->dest, w->new_row, command, 0, NULL);
        recheck = write_indexes(w, false, false, NULL);
    } else {
        bool conflict = false;
        const TransactionId xid = GetCurrentTransactionId();
        const uint32 token = SpeculativeInsertionLockAcquire(xid);
        table_tuple_insert_speculative(w->dest, w->new_row, command, 0, NULL, token);
        recheck = write_indexes(w, false, false, &conflict);
        table_tuple_complete_speculative(w->dest, w->new_row, token, !conflict);
        SpeculativeInsertionLockRelease(xid);
        if (conflict) return look_again();
    }
    if (w->path->fires_triggers) ExecARInsertTriggers(w->estate, w->target, w->new_row, recheck, NULL);
    return w->inserted = true;
}

// w->new_row completed by what the view has not, from w->old_row, which it is to follow; true where they differ. Of
// equal values the old one is kept: it need not be stored again out of line.
bool merge_rows(RowWriter *w) {
    TupleTableSlot *next = w->new_row, *last = w->old_row;
    bool differs = false;
    slot_getallattrs(last);
    for (int i = 0; i < next->tts_tupleDescriptor->natts; i++) {
        const Form_pg_attribute att = TupleDescAttr(next->tts_tupleDescriptor, i);
        if (att->attisdropped) continue;
        if (bms_is_member(att->attnum - FirstLowInvalidHeapAttributeNumber, w->path->mapped)) {
            const bool either_null = last->tts_isnull[i] || next->tts_isnull[i];
            if (either_null ? last->tts_isnull[i] != next->tts_isnull[i]
                            : !datum_image_eq(last->tts_values[i], next->tts_values[i], att->attbyval, att->attlen)) {
                differs = true;
                continue;
            }
        }
        next->tts_values[i] = last->tts_values[i];
        next->tts_isnull[i] = last->tts_isnull[i];
    }
    return differs;
}

bool is_ours(TupleTableSlot *row) {
    bool isnull;
    const Datum xmin = slot_getsysattr(row, MinTransactionIdAttributeNumber, &isnull);
    return TransactionIdIsCurrentTransactionId(DatumGetTransactionId(xmin));
}

// A row that is right already is held until we commit. Who else deletes it for want of a source row (the worker, which
// does not see ours yet) would have to wait; and one that it has locked for that purpose, we wait for.
bool hold_row(RowWriter *w) {
    if (is_mutant(mutant::no_target_lock) || is_ours(w->old_row)) return true;
    ItemPointerData place = w->old_row->tts_tid;
    TM_FailureData failure;
    const TM_Result result = table_tuple_lock(w->dest, &place, SnapshotSelf, w->old_row, GetCurrentCommandId(true),
                                              LockTupleNoKeyExclusive, LockWaitBlock, 0, &failure);
    if (result == TM_Ok) return true;
    if (result != TM_Updated && result != TM_Deleted) elog(ERROR, "unexpected result %d of a row lock", (int)result);
    return look_again();
}

// False where the row was changed, or went, meanwhile.
bool update_row(RowWriter *w) {
    if (!merge_rows(w)) return hold_row(w);
    check_row(w);
    if (!w->updated) CheckCmdReplicaIdentity(w->dest, CMD_UPDATE);
    ItemPointerData place = w->old_row->tts_tid;
    TM_FailureData failure;
    LockTupleMode mode;
    IndexUpdate indexes;
    const TM_Result result = table_tuple_update(w->dest, &place, w->new_row, GetCurrentCommandId(true), InvalidSnapshot,
                                                InvalidSnapshot, true, &failure, &mode, &indexes);
    if (result == TM_Updated || result == TM_Deleted) return look_again();
    if (result != TM_Ok) elog(ERROR, "unexpected result %d of an update", (int)result);
    List *recheck = writes_indexes(indexes) ? write_indexes(w, true, only_summarizing_indexes(indexes), NULL) : NIL;
    if (w->path->fires_triggers) after_row_update(w->estate, w->target, &place, w->new_row, recheck);
    return w->updated = true;
}

bool delete_row(RowWriter *w) {
    if (!w->deleted) CheckCmdReplicaIdentity(w->dest, CMD_DELETE);
    ItemPointerData place = w->old_row->tts_tid;
    TM_FailureData failure;
    const TM_Result result = table_tuple_delete(w->dest, &place, GetCurrentCommandId(true), InvalidSnapshot,
                                                InvalidSnapshot, true, &failure, false);
    if (result == TM_Updated || result == TM_Deleted) return look_again();
    if (result != TM_Ok) elog(ERROR, "unexpected result %d of a delete", (int)result);
    if (w->path->fires_triggers) after_row_delete(w->estate, w->target, &place);
    return w->deleted = true;
}

void end_scan(IndexScanDesc scan, Relation index) {
    if (scan == NULL) return;
    index_endscan(scan);
    index_close(index, NoLock);
}

// An enabled trigger of dest that does not just see the echo of this mapping's own write.
bool must_fire(const Mapping *m, const Trigger *t) {
    if (t->tgenabled == TRIGGER_DISABLED) return false;
    if (!is_dual_write_trigger(t) || t->tgnargs != 2 || pg_strtoint32(t->tgargs[0]) != m->flow) return true;
    return (strcmp(t->tgargs[1], "reverse") == 0) == m->reverse;
}

bool has_index_expressions(Relation dest) {
    bool found = false;
    ListCell *cell;
    foreach (cell, RelationGetIndexList(dest)) {
        Relation index = index_open(lfirst_oid(cell), AccessShareLock);
        found = found || RelationGetIndexExpressions(index) != NIL || RelationGetIndexPredicate(index) != NIL;
        index_close(index, NoLock);
    }
    return found;
}

}  // namespace

RowPath *make_row_path(const Mapping *m, Relation origin, Relation dest, Projection *projection) {
    RowPath *path = (RowPath *)palloc0(sizeof(RowPath));
    path->mapping = m, path->projection = projection;
    make_lookup(&path->source, m, linitial_oid(find_key_indexes(m, origin, &KeyColumn::origin)), &KeyColumn::origin);
    path->arbiters = find_key_indexes(m, dest, &KeyColumn::dest);
    make_lookup(&path->target, m, linitial_oid(path->arbiters), &KeyColumn::dest);
    for (int i = 0; i < m->ncolumns; i++)
        path->mapped = bms_add_member(path->mapped, m->columns[i] - FirstLowInvalidHeapAttributeNumber);
    for (int i = 0; dest->trigdesc && i < dest->trigdesc->numtriggers; i++)
        path->fires_triggers = path->fires_triggers || must_fire(m, &dest->trigdesc->triggers[i]);
    const TupleConstr *constraints = dest->rd_att->constr;
    path->calls_functions = projection->calls_functions || path->fires_triggers ||
                            (constraints && constraints->num_check > 0) || has_index_expressions(dest);
    return path;
}

void open_writer(RowWriter *w, RowPath *path, Relation origin, Relation dest) {
    memset(w, 0, sizeof *w);
    w->path = path, w->origin = origin, w->dest = dest;
    begin_projection(path->projection);
    w->estate = CreateExecutorState();
    MemoryContext old = MemoryContextSwitchTo(w->estate->es_query_cxt);
    w->target = open_result_relation(w->estate, dest, path->mapped);
    w->source_row = table_slot_create(origin, &w->estate->es_tupleTable);
    w->old_row = table_slot_create(dest, &w->estate->es_tupleTable);
    w->new_row = ExecInitExtraTupleSlot(w->estate, RelationGetDescr(dest), &TTSOpsVirtual);
    MemoryContextSwitchTo(old);
    if (path->fires_triggers) AfterTriggerBeginQuery();
}

// Foreign keys are checked, and the triggers of other migrations fired, on the outcome of all rows.
void close_writer(RowWriter *w) {
    end_scan(w->source_scan, w->source_index);
    end_scan(w->target_scan, w->target_index);
    if (w->path->fires_triggers) {
        if (w->deleted) ExecASDeleteTriggers(w->estate, w->target, NULL);
        if (w->updated) ExecASUpdateTriggers(w->estate, w->target, NULL);
        if (w->inserted) ExecASInsertTriggers(w->estate, w->target, NULL);
        AfterTriggerEndQuery(w->estate);
    }
    ExecResetTupleTable(w->estate->es_tupleTable, false);
    close_result_relation(w->estate, w->target);
    FreeExecutorState(w->estate);
}

namespace {

// Each turn waits for somebody, or sees what he has done. One that finds no row where the indexes know of one has met
// him in between, and the next does not: where that goes on, they contradict each other.
void give_up_some_time(const RowWriter *w, int turns) {
    constexpr int kMany = 10000;
    if (turns < kMany) return;
    ereport(ERROR,
            (errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
             errmsg("a row of \"%s\" is in conflict, but not found by its key", RelationGetRelationName(w->dest)),
             errdetail("It was looked for %d times.", turns),
             errhint("REINDEX TABLE %s;", quote_qualified_identifier(get_namespace_name(RelationGetNamespace(w->dest)),
                                                                     RelationGetRelationName(w->dest)))));
}

}  // namespace

void upsert_row(RowWriter *w, const Datum *key, ItemPointer place) {
    for (int missed = 0;;) {
        CHECK_FOR_INTERRUPTS();
        give_up_some_time(w, missed);
        ResetPerTupleExprContext(w->estate);
        if (!find_source(w, key, place) || !project(w->path->projection, w->source_row, w->new_row)) return;
        const Found found = find_target(w, key);
        missed += found == Found::nothing;
        if (found == Found::nothing ? insert_row(w) : found == Found::row && update_row(w)) return;
    }
}

void remove_row(RowWriter *w, const Datum *key) {
    for (int missed = 0;;) {
        CHECK_FOR_INTERRUPTS();
        give_up_some_time(w, missed);
        ResetPerTupleExprContext(w->estate);
        if (!is_mutant(mutant::event_not_state) && find_source(w, key, NULL) &&
            project(w->path->projection, w->source_row, w->new_row))
            return;
        const Found found = find_target(w, key);
        missed += found == Found::nothing;
        if (found == Found::nothing ? is_certainly_absent(w, key) : found == Found::row && delete_row(w)) return;
    }
}

}  // namespace migrate
