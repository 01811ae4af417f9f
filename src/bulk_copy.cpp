#include "bulk_copy.hpp"
#include "debug_point.hpp"
#include "direct_path.hpp"
#include "flow_lock.hpp"
#include "key_scan.hpp"
#include "mutant.hpp"
#include "projection.hpp"

MIGRATE_FUNCTION(migrate_no_bulk_copy)

namespace migrate {
namespace {

// Rows are written in slices, as COPY does it. The first one is small: it shows whether dest has the rows already.
constexpr int kSliceRows = 1000, kFirstSliceRows = 64;
constexpr Size kSliceBytes = 64 * 1024;

struct Copy {
    const Mapping *mapping;
    Relation origin, dest, index;
    Snapshot snapshot;  // registered: vacuum leaves the rows that were read where they are
    EState *estate;
    ResultRelInfo *target;
    List *arbiters;  // the index of dest's key
    BulkInsertState bulk;
    Projection *projection;
    TupleTableSlot *row, *skipped_row;  // of origin
    // the slice
    TupleTableSlot *slots[kSliceRows];
    ItemPointerData sources[kSliceRows];
    int filled;
    Size bytes;
    // the outcome
    MemoryContext result;
    bool limits_bytes;
    int64 total, total_bytes;
    ItemPointerData *discarded;  // own copies to be taken back
    int ndiscarded, capacity;
    Datum *skipped;  // their keys, nparams texts each
};

// ---- one slice -----------------------------------------------------------------------------------------------------

// The stored size of a row's values, as the query's limit counts them.
Size stored_bytes(const Copy &c, TupleTableSlot *slot) {
    Size bytes = 0;
    const TupleDesc desc = slot->tts_tupleDescriptor;
    for (int i = 0; i < c.mapping->ncolumns; i++) {
        const int column = c.mapping->columns[i] - 1;
        if (TupleDescAttr(desc, column)->attlen == -1 && !slot->tts_isnull[column])
            bytes += toast_datum_size(slot->tts_values[column]);
    }
    return bytes;
}

// Takes the row of origin that was read into the slice; false where the mapping's filter does not let it through.
bool take_row(Copy *c) {
    ResetPerTupleExprContext(c->estate);
    if (c->filled == kSliceRows) elog(ERROR, "slice is full");
    TupleTableSlot *slot = c->slots[c->filled];
    if (slot == NULL) slot = c->slots[c->filled] = table_slot_create(c->dest, &c->estate->es_tupleTable);
    if (!project(c->projection, c->row, slot)) return false;
    if (c->limits_bytes) c->total_bytes += stored_bytes(*c, slot);
    add_defaults(c->projection, slot);
    slot->tts_tableOid = RelationGetRelid(c->dest);
    if (RelationGetDescr(c->dest)->constr) ExecConstraints(c->target, slot, c->estate);
    ExecMaterializeSlot(slot);
    c->bytes += ((HeapTupleTableSlot *)slot)->tuple->t_len;
    c->sources[c->filled++] = c->row->tts_tid;
    c->total++;
    return true;
}

// The keys of rows that are taken back. Their source rows are as they were read, updated since or not: the snapshot
// keeps them.
void note_skipped(Copy *c, ItemPointer source) {
    if (!table_tuple_fetch_row_version(c->origin, source, SnapshotAny, c->skipped_row))
        ereport(ERROR,
                (errcode(ERRCODE_T_R_SERIALIZATION_FAILURE), errmsg("a row of the batch was removed too early")));
    MemoryContext old = MemoryContextSwitchTo(c->result);
    key_texts(c->mapping, c->skipped_row, c->skipped + (Size)c->ndiscarded * c->mapping->nparams);
    MemoryContextSwitchTo(old);
}

void discard(Copy *c, int i) {
    if (c->ndiscarded == c->capacity) {
        c->capacity *= 2;
        c->discarded = (ItemPointerData *)repalloc_huge(c->discarded, sizeof(ItemPointerData) * (Size)c->capacity);
        c->skipped = (Datum *)repalloc_huge(c->skipped, sizeof(Datum) * (Size)c->capacity * c->mapping->nparams);
    }
    note_skipped(c, &c->sources[i]);
    c->discarded[c->ndiscarded++] = c->slots[i]->tts_tid;
}

// Writes the slice's rows with their index entries. conflicts: rows whose key dest has already, or is just getting.
int write_slice(Copy *c, bool *conflicts) {
    int n = 0;
    MemoryContext old = MemoryContextSwitchTo(GetPerTupleMemoryContext(c->estate));
    table_multi_insert(c->dest, c->slots, c->filled, GetCurrentCommandId(true), 0, c->bulk);
    MemoryContextSwitchTo(old);
    for (int i = 0; i < c->filled; i++) {
        conflicts[i] = false;
        ResetPerTupleExprContext(c->estate);
        list_free(insert_index_entries(c->estate, c->target, c->slots[i], false, &conflicts[i], c->arbiters, false));
        n += conflicts[i];
    }
    return n;
}

// Whether a source row is what it was when it was read, and nobody is changing it. The page is locked in share mode.
bool is_current(const Copy &c, Page page, ItemPointer tid, Buffer buffer) {
    const ItemId item = PageGetItemId(page, ItemPointerGetOffsetNumber(tid));
    if (!ItemIdIsNormal(item)) return false;
    HeapTupleData row;
    row.t_tableOid = RelationGetRelid(c.origin);
    row.t_data = (HeapTupleHeader)PageGetItem(page, item);
    row.t_len = ItemIdGetLength(item);
    row.t_self = *tid;
    SnapshotData dirty;
    InitDirtySnapshot(dirty);
    return HeapTupleSatisfiesVisibility(&row, &dirty, buffer) && !TransactionIdIsValid(dirty.xmin) &&
           !TransactionIdIsValid(dirty.xmax) && HeapTupleSatisfiesVisibility(&row, c.snapshot, buffer);
}

// Reads the slice's source rows again, and takes back what is contested.
void read_again(Copy *c, const bool *conflicts) {
    Buffer buffer = InvalidBuffer;
    bool contested[kSliceRows];
    for (int i = 0; i < c->filled; i++) {
        const BlockNumber block = ItemPointerGetBlockNumber(&c->sources[i]);
        if (!BufferIsValid(buffer) || BufferGetBlockNumber(buffer) != block) {
            if (BufferIsValid(buffer)) UnlockReleaseBuffer(buffer);
            buffer = ReadBuffer(c->origin, block);
            LockBuffer(buffer, BUFFER_LOCK_SHARE);
        }
        contested[i] = !is_current(*c, BufferGetPage(buffer), &c->sources[i], buffer);
    }
    if (BufferIsValid(buffer)) UnlockReleaseBuffer(buffer);
    for (int i = 0; i < c->filled; i++)
        if (conflicts[i] || (contested[i] && !is_mutant(mutant::no_refetch))) discard(c, i);
}

// Returns how many rows of the slice dest had already.
int flush_slice(Copy *c) {
    if (c->filled == 0) return 0;
    bool conflicts[kSliceRows];
    const int n = write_slice(c, conflicts);
    DEBUG_POINT("batch: slice written");
    read_again(c, conflicts);
    for (int i = 0; i < c->filled; i++) ExecClearTuple(c->slots[i]);
    c->filled = 0;
    c->bytes = 0;
    return n;
}

// ---- the batch -----------------------------------------------------------------------------------------------------

// The unique indexes of dest over just the key's columns: those that ON CONFLICT (key) takes.
List *key_indexes(const Mapping *m, const ResultRelInfo *target) {
    Bitmapset *key = NULL;
    for (int i = 0; i < m->nkey; i++) key = bms_add_member(key, m->key[i].dest);
    List *found = NIL;
    for (int i = 0; i < target->ri_NumIndices; i++) {
        const IndexInfo *info = target->ri_IndexRelationInfo[i];
        bool fits = info->ii_Unique && info->ii_NumIndexKeyAttrs == m->nkey && info->ii_Predicate == NIL;
        for (int k = 0; k < info->ii_NumIndexKeyAttrs && fits; k++)
            fits = bms_is_member(Max(info->ii_IndexAttrNumbers[k], 0), key);
        if (fits) found = lappend_oid(found, RelationGetRelid(target->ri_IndexRelationDescs[i]));
    }
    return found;
}

void begin_copy(Copy *c, const Mapping *m, Relation origin, Relation dest, MemoryContext result) {
    memset(c, 0, sizeof(Copy));
    c->mapping = m;
    c->origin = origin;
    c->dest = dest;
    c->result = result;
    c->index = index_open(key_order_index(m, origin), AccessShareLock);
    c->snapshot = RegisterSnapshot(GetLatestSnapshot());
    PushActiveSnapshot(c->snapshot);
    c->estate = CreateExecutorState();
    c->target = open_result_relation(c->estate, dest, NULL);
    ExecOpenIndices(c->target, false);
    c->arbiters = key_indexes(m, c->target);
    c->bulk = GetBulkInsertState();
    const char *why_not;
    c->projection = make_projection(m, origin, dest, &why_not);
    begin_projection(c->projection);
    c->row = table_slot_create(origin, &c->estate->es_tupleTable);
    c->skipped_row = table_slot_create(origin, &c->estate->es_tupleTable);
    c->capacity = kSliceRows;
    c->discarded = (ItemPointerData *)palloc(sizeof(ItemPointerData) * c->capacity);
    c->skipped = (Datum *)palloc(sizeof(Datum) * c->capacity * m->nparams);
}

// The locks stay until the end of the transaction: what was found out under them is to hold until then.
void end_copy(Copy *c) {
    FreeBulkInsertState(c->bulk);
    table_finish_bulk_insert(c->dest, 0);
    close_result_relation(c->estate, c->target);
    ExecResetTupleTable(c->estate->es_tupleTable, false);
    FreeExecutorState(c->estate);
    index_close(c->index, NoLock);
    PopActiveSnapshot();
    UnregisterSnapshot(c->snapshot);
}

IndexScanDesc begin_scan(const Copy &c, const Batch &batch) {
    ScanKeyData bounds[2];
    int n = 0;
    if (batch.low) compare_row(&bounds[n++], c.mapping, c.index, BTGreaterStrategyNumber, batch.low);
    if (batch.high) compare_row(&bounds[n++], c.mapping, c.index, BTLessEqualStrategyNumber, batch.high);
    IndexScanDesc scan = begin_index_scan(c.origin, c.index, c.snapshot, n);
    index_rescan(scan, bounds, n, NULL, 0);
    return scan;
}

bool is_full(const Copy &c, const Batch &batch) {
    return c.total >= batch.max_rows || (batch.max_bytes > 0 && c.total_bytes >= batch.max_bytes);
}

// The batch ends with the row that was read last.
void set_reached(const Copy &c, Batch *batch) {
    Datum texts[INDEX_MAX_KEYS];
    MemoryContext old = MemoryContextSwitchTo(c.result);
    key_texts(c.mapping, c.row, texts);
    batch->reached = PointerGetDatum(construct_array(texts, c.mapping->nparams, TEXTOID, -1, false, TYPALIGN_INT));
    MemoryContextSwitchTo(old);
}

// Reads and writes up to the batch's limits, or until dest has most of a slice's rows already: then the batch ends
// there. False where that is its first slice: the rows are for a query, which can tell what is right already.
bool copy_rows(Copy *c, Batch *batch) {
    IndexScanDesc scan = begin_scan(*c, *batch);
    bool first = true, ended = false, there_already = false;
    while (!ended && index_getnext_slot(scan, ForwardScanDirection, c->row)) {
        CHECK_FOR_INTERRUPTS();
        if (!take_row(c)) continue;
        ended = is_full(*c, *batch);
        if (ended || c->filled == (first ? kFirstSliceRows : kSliceRows) || c->bytes >= kSliceBytes) {
            const int rows = c->filled;
            if (flush_slice(c) * 2 > rows) ended = there_already = true;
            if (there_already && first) break;
            first = false;
        }
        if (ended) set_reached(*c, batch);
    }
    index_endscan(scan);
    if (there_already && first) return false;
    flush_slice(c);
    return true;
}

// Own copies of the rows that were contested, or in conflict, are taken back: this command did not see them come.
void take_back(Copy *c) {
    if (c->ndiscarded == 0) return;
    CommandCounterIncrement();
    for (int i = 0; i < c->ndiscarded; i++) simple_heap_delete(c->dest, &c->discarded[i]);
}

void report(const Copy &c, Batch *batch) {
    batch->rows_written = batch->rows_done = c.total - c.ndiscarded;
    if (c.ndiscarded == 0) return;
    int dims[2] = {c.ndiscarded, c.mapping->nparams}, lower[2] = {1, 1};
    MemoryContext old = MemoryContextSwitchTo(c.result);
    batch->skipped =
        PointerGetDatum(construct_md_array(c.skipped, NULL, 2, dims, lower, TEXTOID, -1, false, TYPALIGN_INT));
    MemoryContextSwitchTo(old);
}

// ---- whether -------------------------------------------------------------------------------------------------------

bool has_insert_trigger(const TriggerDesc *t) {
    return t && (t->trig_insert_before_row || t->trig_insert_after_row || t->trig_insert_instead_row ||
                 t->trig_insert_before_statement || t->trig_insert_after_statement || t->trig_insert_new_table);
}

// Logical decoding would show a copy that is taken back as a row of its own, which a subscriber may have already. A
// slot that is made later does not decode transactions that have an ID by then, as this one has.
bool may_be_decoded(Relation dest) {
    int slots, active;
    return RelationIsLogicallyLogged(dest) && ReplicationSlotsCountDBSlots(MyDatabaseId, &slots, &active);
}

}  // namespace

const char *why_no_bulk_copy(const Mapping *m, Relation origin, Relation dest) {
    const char *why_not = why_not_direct(m, origin, dest);
    if (why_not) return why_not;
    if (m->reverse || m->both_directions) return "the target is written by the application";
    if (has_insert_trigger(dest->trigdesc))
        return psprintf("\"%s\" has a trigger, or a foreign key", RelationGetRelationName(dest));
    if (!OidIsValid(key_order_index(m, origin)))
        return psprintf("\"%s\" has no index in the order of the key", RelationGetRelationName(origin));
    if (may_be_decoded(dest)) return "there are logical replication slots in this database";
    return NULL;
}

bool bulk_copy(const Mapping *m, Batch *batch, MemoryContext result) {
    Relation origin = table_open(m->origin, AccessShareLock), dest = table_open(m->dest, RowExclusiveLock);
    bool done = false;
    (void)GetCurrentTransactionId();
    if (try_lock_flow(m, RowExclusiveLock) && why_no_bulk_copy(m, origin, dest) == NULL) {
        Copy c;
        begin_copy(&c, m, origin, dest, result);
        c.limits_bytes = batch->max_bytes > 0;
        DEBUG_POINT("batch: snapshot taken");
        done = copy_rows(&c, batch);
        take_back(&c);
        if (done) report(c, batch);
        end_copy(&c);
    }
    table_close(origin, NoLock);
    table_close(dest, NoLock);
    return done;
}

}  // namespace migrate

using namespace migrate;

// migrate._no_bulk_copy(flow integer) RETURNS text: why its batches lock the source's rows; NULL: they do not
Datum migrate_no_bulk_copy(PG_FUNCTION_ARGS) {
    MemoryContext result = CurrentMemoryContext;
    const char *why_not = with_spi([&]() -> const char * {
        Mapping *m = load_mapping(PG_GETARG_INT32(0), false, Lifetime::kCall);
        if (m == NULL) return NULL;
        Relation origin = table_open(m->origin, AccessShareLock), dest = table_open(m->dest, AccessShareLock);
        const char *text = why_no_bulk_copy(m, origin, dest);
        table_close(origin, NoLock);
        table_close(dest, NoLock);
        return text ? MemoryContextStrdup(result, text) : NULL;
    });
    if (why_not == NULL) PG_RETURN_NULL();
    PG_RETURN_TEXT_P(cstring_to_text(why_not));
}
