#include "bulk_slice.hpp"
#include "debug_point.hpp"
#include "direct_path.hpp"
#include "mutant.hpp"

namespace migrate {
namespace {

// ---- rows that are there already

void open_key_scan(Slice *s) {
    s->key_index = index_open(linitial_oid(find_key_indexes(s->mapping, s->dest, &KeyColumn::dest)), AccessShareLock);
    s->key_scan = begin_index_scan(s->dest, s->key_index, &s->dirty, s->mapping->nkey);
    s->found = table_slot_create(s->dest, &s->estate->es_tupleTable);
}

void look_for_key(Slice *s, TupleTableSlot *row) {
    ScanKeyData keys[INDEX_MAX_KEYS];
    for (int i = 0; i < s->mapping->nkey; i++) {
        const Oid type = s->key_index->rd_opcintype[i];
        const Oid equal = get_opfamily_member(s->key_index->rd_opfamily[i], type, type, BTEqualStrategyNumber);
        bool isnull;
        const Datum value = slot_getattr(row, s->key_index->rd_index->indkey.values[i], &isnull);
        ScanKeyEntryInitialize(&keys[i], 0, i + 1, BTEqualStrategyNumber, InvalidOid, s->key_index->rd_indcollation[i],
                               get_opcode(equal), value);
    }
    index_rescan(s->key_scan, keys, s->mapping->nkey, NULL, 0);
}

bool is_same(const Slice *s, TupleTableSlot *a, TupleTableSlot *b) {
    slot_getallattrs(a), slot_getallattrs(b);
    for (int i = 0; i < s->mapping->ncolumns; i++) {
        const int column = s->mapping->columns[i] - 1;
        const Form_pg_attribute att = TupleDescAttr(RelationGetDescr(s->dest), column);
        if (a->tts_isnull[column] != b->tts_isnull[column]) return false;
        if (!a->tts_isnull[column] &&
            !datum_image_eq(a->tts_values[column], b->tts_values[column], att->attbyval, att->attlen))
            return false;
    }
    return true;
}

// Whether dest has the very row that was to be written, committed, and nobody is changing it. Then it stays right: who
// changes the source row after we have read that again finds it.
bool is_there_already(Slice *s, TupleTableSlot *row) {
    // Not in the memory of a row: what the index keeps from one scan to the next is allocated during the first.
    MemoryContext old = MemoryContextSwitchTo(s->estate->es_query_cxt);
    if (s->key_scan == NULL) open_key_scan(s);
    look_for_key(s, row);
    bool same = false;
    for (;;) {
        InitDirtySnapshot(s->dirty);
        if (!index_getnext_slot(s->key_scan, ForwardScanDirection, s->found)) break;
        if (ItemPointerEquals(&s->found->tts_tid, &row->tts_tid)) continue;
        same =
            !TransactionIdIsValid(s->dirty.xmin) && !TransactionIdIsValid(s->dirty.xmax) && is_same(s, s->found, row);
        break;
    }
    ExecClearTuple(s->found);
    MemoryContextSwitchTo(old);
    return same;
}

// ---- writing, and reading again

// Whether a source row is what it was when it was read, and nobody is changing it. Its page is locked in share mode.
bool is_current(const Slice *s, ItemPointer tid, Buffer buffer) {
    const Page page = BufferGetPage(buffer);
    const ItemId item = PageGetItemId(page, ItemPointerGetOffsetNumber(tid));
    if (!ItemIdIsNormal(item)) return false;
    HeapTupleData row;
    row.t_tableOid = RelationGetRelid(s->origin);
    row.t_data = (HeapTupleHeader)PageGetItem(page, item);
    row.t_len = ItemIdGetLength(item);
    row.t_self = *tid;
    SnapshotData dirty;
    InitDirtySnapshot(dirty);
    return HeapTupleSatisfiesVisibility(&row, &dirty, buffer) && !TransactionIdIsValid(dirty.xmin) &&
           !TransactionIdIsValid(dirty.xmax) && HeapTupleSatisfiesVisibility(&row, s->snapshot, buffer);
}

void read_again(Slice *s) {
    Buffer buffer = InvalidBuffer;
    for (int i = 0; i < s->filled && !is_mutant(mutant::no_refetch); i++) {
        const BlockNumber block = ItemPointerGetBlockNumber(&s->sources[i]);
        if (!BufferIsValid(buffer) || BufferGetBlockNumber(buffer) != block) {
            if (BufferIsValid(buffer)) UnlockReleaseBuffer(buffer);
            buffer = ReadBuffer(s->origin, block);
            LockBuffer(buffer, BUFFER_LOCK_SHARE);
        }
        if (!is_current(s, &s->sources[i], buffer)) s->fates[i] = Fate::given_back;
    }
    if (BufferIsValid(buffer)) UnlockReleaseBuffer(buffer);
}

// ---- opening

// The ring of buffers that dest's new pages go through is kept from batch to batch. A batch is smaller than a ring:
// with one of its own, each would take so many buffers more, and push out of them what the application has there.
BulkInsertState begin_bulk_insert() {
    static BufferAccessStrategy ring = NULL;
    if (ring == NULL) {
        MemoryContext old = MemoryContextSwitchTo(TopMemoryContext);
        ring = GetAccessStrategy(BAS_BULKWRITE);
        MemoryContextSwitchTo(old);
    }
    BulkInsertState bulk = GetBulkInsertState();
    FreeAccessStrategy(bulk->strategy);
    bulk->strategy = ring;
    return bulk;
}

void end_bulk_insert(BulkInsertState bulk) {
    bulk->strategy = NULL;
    FreeBulkInsertState(bulk);
}

}  // namespace

void open_slice(Slice *s, const Mapping *m, Relation origin, Relation dest, Snapshot snapshot) {
    memset(s, 0, sizeof *s);
    s->mapping = m, s->origin = origin, s->dest = dest, s->snapshot = snapshot;
    s->estate = CreateExecutorState();
    s->target = open_result_relation(s->estate, dest, NULL);
    ExecOpenIndices(s->target, false);
    s->bulk = begin_bulk_insert();
    const char *why_not;
    s->projection = make_projection(m, origin, dest, &why_not);
    begin_projection(s->projection);
}

void close_slice(Slice *s) {
    if (s->key_scan) {
        index_endscan(s->key_scan);
        index_close(s->key_index, NoLock);
    }
    end_bulk_insert(s->bulk);
    table_finish_bulk_insert(s->dest, 0);
    ExecResetTupleTable(s->estate->es_tupleTable, false);
    close_result_relation(s->estate, s->target);
    FreeExecutorState(s->estate);
}

bool take_row(Slice *s, TupleTableSlot *row) {
    if (s->filled == kSliceRows) elog(ERROR, "slice is full");
    ResetPerTupleExprContext(s->estate);
    TupleTableSlot *slot = s->rows[s->filled];
    if (slot == NULL) slot = s->rows[s->filled] = table_slot_create(s->dest, &s->estate->es_tupleTable);
    if (!project(s->projection, row, slot)) return false;
    add_defaults(s->projection, slot);
    slot->tts_tableOid = RelationGetRelid(s->dest);
    if (RelationGetDescr(s->dest)->constr) ExecConstraints(s->target, slot, s->estate);
    ExecMaterializeSlot(slot);
    s->bytes += ((HeapTupleTableSlot *)slot)->tuple->t_len;
    s->sources[s->filled++] = row->tts_tid;
    return true;
}

Size last_row_bytes(const Slice *s) {
    TupleTableSlot *row = s->rows[s->filled - 1];
    Size bytes = 0;
    for (int i = 0; i < s->mapping->ncolumns; i++) {
        if (TupleDescAttr(RelationGetDescr(s->dest), s->mapping->columns[i] - 1)->attlen != -1) continue;
        bool isnull;
        const Datum value = slot_getattr(row, s->mapping->columns[i], &isnull);
        if (!isnull) bytes += toast_datum_size(value);
    }
    return bytes;
}

int write_slice(Slice *s) {
    int conflicts = 0;
    ResetPerTupleExprContext(s->estate);
    MemoryContext old = MemoryContextSwitchTo(GetPerTupleMemoryContext(s->estate));
    // Any unique index may tell of a conflict (no arbiters: each is one): a dual write that has put the very row there,
    // committed or not, is in the way in all of them. An index that raised it would fail the batch, or wait for its
    // writer. What does conflict with another row is refused, and recorded, when the key is applied by itself.
    table_multi_insert(s->dest, s->rows, s->filled, GetCurrentCommandId(true), 0, s->bulk);
    for (int i = 0; i < s->filled; i++) {
        ResetPerTupleExprContext(s->estate);
        bool conflict = false;
        (void)insert_index_entries(s->estate, s->target, s->rows[i], false, &conflict, NIL, false);
        conflicts += conflict;
        s->fates[i] = !conflict                         ? Fate::written
                      : is_there_already(s, s->rows[i]) ? Fate::there_already
                                                        : Fate::given_back;
    }
    MemoryContextSwitchTo(old);
    DEBUG_POINT("batch: slice written");
    read_again(s);
    return conflicts;
}

void clear_slice(Slice *s) {
    for (int i = 0; i < s->filled; i++) ExecClearTuple(s->rows[i]);
    s->filled = 0;
    s->bytes = 0;
}

}  // namespace migrate
