// The backfill's batch in the order of place (place_scan.hpp). Where its rows cannot be copied in bulk (any more), or
// are there already, their keys are read in that order, and the rows copied by key.
#include "backfill.hpp"
#include "flow.hpp"
#include "key_scan.hpp"
#include "place_scan.hpp"

MIGRATE_FUNCTION(migrate_apply_places)
MIGRATE_FUNCTION(migrate_next_places)

namespace migrate {
namespace {

// The bytes that a row's values are stored in.
Size stored_bytes(TupleTableSlot *row) {
    Size bytes = 0;
    slot_getallattrs(row);
    for (int i = 0; i < row->tts_tupleDescriptor->natts; i++)
        if (TupleDescAttr(row->tts_tupleDescriptor, i)->attlen == -1 && !row->tts_isnull[i])
            bytes += toast_datum_size(row->tts_values[i]);
    return bytes;
}

// The keys (2-D) of the batch's rows, 0 where there are none; sets batch->reached. The mapping is not evaluated.
Datum keys_in_place(const Mapping *m, Batch *batch, MemoryContext result) {
    Relation origin = table_open(m->origin, AccessShareLock);
    Snapshot snapshot = RegisterSnapshot(GetLatestSnapshot());
    TupleTableSlot *row = table_slot_create(origin, NULL);
    Datum *keys = (Datum *)MemoryContextAllocHuge(CurrentMemoryContext, sizeof(Datum) * m->nparams * batch->max_rows);
    PlaceScan scan;
    begin_place_scan(&scan, origin, snapshot, batch->low, batch->high);
    int n = 0;
    Size bytes = 0;
    while (batch->reached == 0 && next_in_place(&scan, row)) {
        CHECK_FOR_INTERRUPTS();
        key_texts(m, row, keys + (Size)m->nparams * n++);
        if (batch->max_bytes > 0) bytes += stored_bytes(row);
        if (n < batch->max_rows && (batch->max_bytes == 0 || bytes < (Size)batch->max_bytes)) continue;
        MemoryContext old = MemoryContextSwitchTo(result);
        batch->reached = place_texts(&row->tts_tid);
        MemoryContextSwitchTo(old);
    }
    end_place_scan(&scan);
    ExecDropSingleTupleTableSlot(row);
    UnregisterSnapshot(snapshot);
    table_close(origin, NoLock);
    return n == 0 ? (Datum)0 : key_list(m, keys, n, result);
}

void copy_places_by_query(const Mapping *m, Batch *batch, MemoryContext result) {
    const Datum keys = keys_in_place(m, batch, result);
    if (keys) copy_keys_by_query(m, keys, batch, result);
}

// The arguments that both functions begin with: flow int, file oid, after text[], until text[], max_rows int
Batch batch_of(FunctionCallInfo fcinfo) {
    Batch batch = {};
    batch.by_place = true;
    batch.low = PG_ARGISNULL(2) ? (Datum)0 : PG_GETARG_DATUM(2);
    batch.high = PG_ARGISNULL(3) ? (Datum)0 : PG_GETARG_DATUM(3);
    batch.max_rows = PG_GETARG_INT32(4);
    if (batch.max_rows < 1)
        ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("max_rows is %d, below 1", batch.max_rows)));
    return batch;
}

// Runs fn(mapping) as dest's owner; false, without having done so, where the source's file is not the one given.
template <class Fn>
bool with_places(FunctionCallInfo fcinfo, Fn fn) {
    bool same = false;
    with_spi([&] {
        Mapping *m = locked_mapping(PG_GETARG_INT32(0));
        Relation origin = table_open(m->origin, NoLock);
        same = !PG_ARGISNULL(1) && file_of(origin) == PG_GETARG_OID(1);
        table_close(origin, NoLock);
        if (!same) return;
        as_dest_owner(m, kBackground, [&] {
            pin_output_settings();
            fn(m);
        });
    });
    return same;
}

Datum answer(FunctionCallInfo fcinfo, Datum *values, bool *nulls) {
    TupleDesc desc;
    if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE) elog(ERROR, "return type must be a row type");
    return HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls));
}

}  // namespace
}  // namespace migrate

using namespace migrate;

// migrate._apply_places(flow int, file oid, after text[], until text[], max_rows int, max_bytes bigint,
//                       OUT rows_done bigint, OUT rows_written bigint, OUT reached text[], OUT skipped text[],
//                       OUT rewritten boolean)
// As _apply_range, for the next rows in (after, until] in the order of place. rewritten: the table has another file
// than this, in which the places mean nothing; nothing is done.
Datum migrate_apply_places(PG_FUNCTION_ARGS) {
    Batch batch = batch_of(fcinfo);
    batch.max_bytes = PG_ARGISNULL(5) ? 0 : PG_GETARG_INT64(5);
    MemoryContext result = CurrentMemoryContext;
    const bool same = with_places(fcinfo, [&](const Mapping *m) {
        if (!bulk_copy(m, &batch, result)) copy_places_by_query(m, &batch, result);
        end_batch(&batch);
    });
    Datum values[5] = {Int64GetDatum(batch.rows_done), Int64GetDatum(batch.rows_written), batch.reached, batch.skipped,
                       BoolGetDatum(!same)};
    bool nulls[5] = {false, false, batch.reached == 0, batch.skipped == 0, false};
    PG_RETURN_DATUM(answer(fcinfo, values, nulls));
}

// migrate._next_places(flow int, file oid, after text[], until text[], max_rows int, OUT keys text[], OUT reached
//                      text[])
// The keys (2-D) of those rows, and nothing is copied; NULL where there is none, or the file is another one.
Datum migrate_next_places(PG_FUNCTION_ARGS) {
    Batch batch = batch_of(fcinfo);
    MemoryContext result = CurrentMemoryContext;
    Datum keys = (Datum)0;
    (void)with_places(fcinfo, [&](const Mapping *m) { keys = keys_in_place(m, &batch, result); });
    Datum values[2] = {keys, batch.reached};
    bool nulls[2] = {keys == 0, batch.reached == 0};
    PG_RETURN_DATUM(answer(fcinfo, values, nulls));
}
