#include "bulk_copy.hpp"
#include "bulk_slice.hpp"
#include "debug_point.hpp"
#include "direct_path.hpp"
#include "flow_lock.hpp"
#include "key_scan.hpp"
#include "place_scan.hpp"

MIGRATE_FUNCTION(migrate_no_bulk_copy)

namespace migrate {
namespace {

// The first slice is small: it shows whether dest has the rows already.
constexpr int kFirstSliceRows = 64;

struct Copy {
    const Mapping *mapping;
    Relation origin, dest, index;
    Snapshot snapshot;
    IndexScanDesc by_key;  // NULL: by_place
    PlaceScan by_place;
    Slice slice;
    TupleTableSlot *row, *skipped_row;  // of origin
    MemoryContext result;
    int64 total, total_bytes, written;
    ItemPointerData *discarded;  // own copies that are to be taken back
    int ndiscarded, max_discarded;
    Datum *skipped;  // keys that are given back, nparams texts each
    int nskipped, max_skipped;
};

void begin_copy(Copy *c, const Mapping *m, Relation origin, Relation dest, MemoryContext result) {
    memset(c, 0, sizeof(Copy));
    c->mapping = m, c->origin = origin, c->dest = dest, c->result = result;
    c->index = index_open(key_order_index(m, origin), AccessShareLock);
    c->snapshot = RegisterSnapshot(GetLatestSnapshot());
    PushActiveSnapshot(c->snapshot);
    open_slice(&c->slice, m, origin, dest, c->snapshot);
    c->row = table_slot_create(origin, NULL);
    c->skipped_row = table_slot_create(origin, NULL);
    c->max_discarded = c->max_skipped = kSliceRows;
    c->discarded = (ItemPointerData *)palloc(sizeof(ItemPointerData) * c->max_discarded);
    c->skipped = (Datum *)palloc(sizeof(Datum) * c->max_skipped * m->nparams);
}

// The locks stay until the end of the transaction: what was found out under them is to hold until then.
void end_copy(Copy *c) {
    ExecDropSingleTupleTableSlot(c->row);
    ExecDropSingleTupleTableSlot(c->skipped_row);
    close_slice(&c->slice);
    index_close(c->index, NoLock);
    PopActiveSnapshot();
    UnregisterSnapshot(c->snapshot);
}

void discard(Copy *c, ItemPointer place) {
    if (c->ndiscarded == c->max_discarded) {
        c->max_discarded *= 2;
        c->discarded = (ItemPointerData *)repalloc_huge(c->discarded, sizeof(ItemPointerData) * (Size)c->max_discarded);
    }
    c->discarded[c->ndiscarded++] = *place;
}

// The key is read from the source row as it was, changed since or not: the snapshot keeps it.
void give_back(Copy *c, ItemPointer source) {
    if (!table_tuple_fetch_row_version(c->origin, source, SnapshotAny, c->skipped_row))
        ereport(ERROR,
                (errcode(ERRCODE_T_R_SERIALIZATION_FAILURE), errmsg("a row of the batch was removed too early")));
    const Size width = c->mapping->nparams;
    if (c->nskipped == c->max_skipped) {
        c->max_skipped *= 2;
        c->skipped = (Datum *)repalloc_huge(c->skipped, sizeof(Datum) * width * c->max_skipped);
    }
    MemoryContext old = MemoryContextSwitchTo(c->result);
    key_texts(c->mapping, c->skipped_row, c->skipped + width * c->nskipped++);
    MemoryContextSwitchTo(old);
}

// Returns whether dest had the most of the keys already.
bool flush_slice(Copy *c) {
    Slice *s = &c->slice;
    if (s->filled == 0) return false;
    const int conflicts = write_slice(s), rows = s->filled;
    for (int i = 0; i < rows; i++) {
        if (s->fates[i] != Fate::written) discard(c, &s->rows[i]->tts_tid);
        if (s->fates[i] == Fate::given_back) give_back(c, &s->sources[i]);
    }
    clear_slice(s);
    return conflicts * 2 > rows;
}

void begin_scan(Copy *c, const Batch &batch) {
    if (batch.by_place) {
        begin_place_scan(&c->by_place, c->origin, c->snapshot, batch.low, batch.high);
        return;
    }
    ScanKeyData bounds[2];
    int n = 0;
    if (batch.low) compare_row(&bounds[n++], c->mapping, c->index, BTGreaterStrategyNumber, batch.low);
    if (batch.high) compare_row(&bounds[n++], c->mapping, c->index, BTLessEqualStrategyNumber, batch.high);
    c->by_key = begin_index_scan(c->origin, c->index, c->snapshot, n);
    index_rescan(c->by_key, bounds, n, NULL, 0);
}

bool next_row(Copy *c) {
    return c->by_key ? index_getnext_slot(c->by_key, ForwardScanDirection, c->row)
                     : next_in_place(&c->by_place, c->row);
}

void end_scan(Copy *c) {
    if (c->by_key)
        index_endscan(c->by_key);
    else
        end_place_scan(&c->by_place);
}

bool is_full(const Copy &c, const Batch &batch) {
    return c.total >= batch.max_rows || (batch.max_bytes > 0 && c.total_bytes >= batch.max_bytes);
}

// The batch ends with the row that was read last.
void set_reached(const Copy &c, Batch *batch) {
    Datum texts[INDEX_MAX_KEYS];
    MemoryContext old = MemoryContextSwitchTo(c.result);
    if (batch->by_place) {
        batch->reached = place_texts(&c.row->tts_tid);
    } else {
        key_texts(c.mapping, c.row, texts);
        batch->reached = PointerGetDatum(construct_array(texts, c.mapping->nparams, TEXTOID, -1, false, TYPALIGN_INT));
    }
    MemoryContextSwitchTo(old);
}

// Reads and writes up to the batch's limits, or until dest has most of a slice's keys already: then the batch ends
// there. False where that is its first slice: such rows are for a query, which writes only what differs.
bool copy_rows(Copy *c, Batch *batch) {
    Slice *s = &c->slice;
    begin_scan(c, *batch);
    bool first = true, ended = false, there_already = false;
    while (!ended && next_row(c)) {
        CHECK_FOR_INTERRUPTS();
        if (!take_row(s, c->row)) continue;
        c->total++;
        if (batch->max_bytes > 0) c->total_bytes += last_row_bytes(s);
        ended = is_full(*c, *batch);
        if (ended || s->filled == (first ? kFirstSliceRows : kSliceRows) || s->bytes >= kSliceBytes) {
            there_already = flush_slice(c);
            if (there_already && first) break;
            ended = ended || there_already;
            first = false;
        }
        if (ended) set_reached(*c, batch);
    }
    end_scan(c);
    if (there_already && first) return false;
    (void)flush_slice(c);
    return true;
}

// Own copies that did not stay. A command does not delete what it has itself inserted: this is another one.
void take_back(Copy *c) {
    if (c->ndiscarded == 0) return;
    CommandCounterIncrement();
    for (int i = 0; i < c->ndiscarded; i++) simple_heap_delete(c->dest, &c->discarded[i]);
}

void report(const Copy &c, Batch *batch) {
    batch->rows_done = c.total - c.nskipped;
    batch->rows_written = c.total - c.ndiscarded;
    if (c.nskipped > 0) batch->skipped = key_list(c.mapping, c.skipped, c.nskipped, c.result);
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
    if (why_no_bulk_copy(m, origin, dest) == NULL && try_lock_flow(m, RowExclusiveLock)) {
        Copy c;
        begin_copy(&c, m, origin, dest, result);
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
    return answer_of_flow(fcinfo, false, why_no_bulk_copy);
}
