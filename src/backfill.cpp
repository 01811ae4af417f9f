// The primitive under row locks, for callers that do not hold them already: the backfill (a key range, where it cannot
// be copied in bulk), retries and repair (keys). Protocol P1: source rows are locked FOR SHARE SKIP LOCKED, so nobody
// changes them until the batch commits and the application never waits for us longer than a batch; what was skipped is
// given back.
#include "backfill.hpp"
#include "debug_point.hpp"
#include "flow.hpp"
#include "flow_lock.hpp"
#include "flow_sql.hpp"
#include "mapping_cache.hpp"
#include "mapping_load.hpp"
#include "mutant.hpp"

MIGRATE_FUNCTION(migrate_apply_keys)
MIGRATE_FUNCTION(migrate_apply_range)

namespace migrate {
namespace {

void raise_no_mapping(int32 flow, bool reverse) {
    ereport(ERROR, (errcode(ERRCODE_UNDEFINED_OBJECT),
                    errmsg("flow %d has no %s mapping", flow, reverse ? "reverse" : "forward")));
}

Mapping *require_mapping(int32 flow, bool reverse) {
    Mapping *m = load_mapping(flow, reverse, Lifetime::kCall);
    if (m == NULL) raise_no_mapping(flow, reverse);
    return m;
}

// A row of the view as the text[] of its key
void view_key_text(Sql &sql, const Mapping *m, const char *alias) {
    sql.add("ARRAY[");
    for (int i = 0; i < m->nparams; i++)
        sql.comma(i == 0).add(alias).add(".").column(m->view, m->key[m->params[i]].view).add("::text");
    sql.add("]");
}

// (v.k1, v.k2) <operator> (($n)[1]::t1, ($n)[2]::t2), where parameter n is a key as text[]
void compare_key(Sql &sql, const Mapping *m, const char *op, int param) {
    view_key(sql.add("ROW("), m, "v");
    sql.add(") OPERATOR(pg_catalog.").add(op).add(") ROW(");
    for (int i = 0; i < m->nparams; i++)
        sql.comma(i == 0).addf("($%d)[%d]::", param, i + 1).type(m->key[m->params[i]].origin_type);
    sql.add(")");
}

struct Range {
    Datum bounds[2];  // low (exclusive), high (inclusive) as text[]
    char nulls[3];    // 'n': open on that side
};

Range whole_range(const Batch &batch) {
    return {{batch.low, batch.high}, {batch.low ? ' ' : 'n', batch.high ? ' ' : 'n', 0}};
}

// ROW(v.k) > low AND ROW(v.k) <= high
char *in_range(const Mapping *m, const Range &range) {
    Sql sql;
    sql.add("true");
    if (range.nulls[0] != 'n') compare_key(sql.add(" AND "), m, ">", 1);
    if (range.nulls[1] != 'n') compare_key(sql.add(" AND "), m, "<=", 2);
    return pstrdup(sql.c_str());
}

constexpr Oid kRangeTypes[2] = {TEXTARRAYOID, TEXTARRAYOID};

// SELECT ARRAY[v.k::text] FROM view v WHERE <range> ORDER BY v.k OFFSET n - 1 LIMIT 1: the key that ends the batch.
void last_key_by_rows(Sql &sql, const Mapping *m, const Range &range, int max_rows) {
    view_key_text(sql.add("SELECT "), m, "v");
    sql.add(" FROM ").relation(m->view).add(" v WHERE ").add(in_range(m, range)).add(" ORDER BY ");
    view_key(sql, m, "v");
    sql.addf(" OFFSET %d LIMIT 1", max_rows - 1);
}

// 0 + coalesce(pg_column_size(v.c1), 0) + …: the bytes of a row of the view, as it is stored
void row_bytes(Sql &sql, const Mapping *m) {
    sql.add("0");
    for (int i = 0; i < m->ncolumns; i++) {
        if (get_typlen(get_atttype(m->view, i + 1)) != -1) continue;
        sql.add(" + coalesce(pg_catalog.pg_column_size(v.").column(m->view, i + 1).add("), 0)");
    }
}

// The same where that many rows may be too large: the row with which the sum of bytes reaches the limit ends the batch.
// SELECT x.key FROM (SELECT ARRAY[v.k::text] AS key, count(*) OVER w AS rows, sum(v.bytes) OVER w AS bytes
//                    FROM (SELECT v.k1, …, <bytes> AS bytes FROM view v WHERE <range> ORDER BY v.k LIMIT n) v
//                    WINDOW w AS (ORDER BY v.k ROWS UNBOUNDED PRECEDING)) x
// WHERE x.rows = n OR x.bytes >= max_bytes LIMIT 1
void last_key_by_bytes(Sql &sql, const Mapping *m, const Range &range, int max_rows, int64 max_bytes) {
    Sql key;
    view_key(key, m, "v");
    view_key_text(sql.add("SELECT x.key FROM (SELECT "), m, "v");
    sql.add(" AS key, count(*) OVER w AS rows, sum(v.bytes) OVER w AS bytes FROM (SELECT ").add(key.c_str());
    row_bytes(sql.add(", "), m);
    sql.add(" AS bytes FROM ").relation(m->view).add(" v WHERE ").add(in_range(m, range));
    sql.add(" ORDER BY ").add(key.c_str()).addf(" LIMIT %d) v", max_rows);
    sql.add(" WINDOW w AS (ORDER BY ").add(key.c_str());
    sql.addf(" ROWS UNBOUNDED PRECEDING)) x WHERE x.rows = %d OR x.bytes >= ", max_rows)
        .addf("%lld", (long long)max_bytes);
    sql.add(" LIMIT 1");
}

// Narrows range->bounds[1] to the key that ends the batch; false where fewer rows are left (the batch then takes the
// range to its end). max_bytes: 0: no limit.
bool narrow_to(const Mapping *m, Range *range, int max_rows, int64 max_bytes, MemoryContext result) {
    Sql sql;
    if (max_bytes > 0)
        last_key_by_bytes(sql, m, *range, max_rows, max_bytes);
    else
        last_key_by_rows(sql, m, *range, max_rows);
    if (run_sql(sql.c_str(), 2, kRangeTypes, range->bounds, range->nulls) == 0) return false;
    bool isnull;
    const Datum key = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull);
    MemoryContext old = MemoryContextSwitchTo(result);
    range->bounds[1] = datumCopy(key, false, -1);
    MemoryContextSwitchTo(old);
    range->nulls[1] = ' ';
    return true;
}

// l.k1 = v.k1 AND …, both rows of the view
void same_key(Sql &sql, const Mapping *m) {
    for (int i = 0; i < m->nparams; i++) {
        const AttrNumber column = m->key[m->params[i]].view;
        sql.sep(i == 0, " AND ")
            .add("l.")
            .column(m->view, column)
            .add(" OPERATOR(pg_catalog.=) v.")
            .column(m->view, column);
    }
}

constexpr const char *kSkipLocked = " FOR SHARE OF v SKIP LOCKED";

// FROM view v WHERE <condition> AND NOT EXISTS (SELECT FROM locked l WHERE l.k = v.k)
void from_not_locked(Sql &sql, const Mapping *m, const char *condition) {
    sql.add(" FROM ")
        .relation(m->view)
        .add(" v WHERE ")
        .add(condition)
        .add(" AND NOT EXISTS (SELECT FROM locked l WHERE ");
    same_key(sql, m);
    sql.add(")");
}

// WITH locked AS …, copied AS (INSERT INTO dest … SELECT … FROM locked v … RETURNING 1)
// SELECT (SELECT count(*) FROM locked), (SELECT count(*) FROM copied),
//        (SELECT array_agg(v.key) FROM view v WHERE <condition> AND NOT EXISTS (SELECT FROM locked l WHERE l.k = v.k))
char *copy_sql(const Mapping *m, const char *condition) {
    Sql sql;
    locked_rows(sql.add("WITH "), m, condition, is_mutant(mutant::no_row_lock) ? "" : kSkipLocked);
    insert_from(sql.add(", copied AS ("), m, "locked", "true");
    sql.add(" RETURNING 1) SELECT (SELECT count(*) FROM locked), (SELECT count(*) FROM copied), (SELECT array_agg(");
    view_key_text(sql, m, "v");
    from_not_locked(sql.add(")"), m, condition);
    sql.add(")");
    return pstrdup(sql.c_str());
}

void read_answer(Batch *batch, MemoryContext result) {
    bool isnull;
    HeapTuple row = SPI_tuptable->vals[0];
    batch->rows_done = DatumGetInt64(SPI_getbinval(row, SPI_tuptable->tupdesc, 1, &isnull));
    batch->rows_written = DatumGetInt64(SPI_getbinval(row, SPI_tuptable->tupdesc, 2, &isnull));
    const Datum skipped = SPI_getbinval(row, SPI_tuptable->tupdesc, 3, &isnull);
    MemoryContext old = MemoryContextSwitchTo(result);
    batch->skipped = isnull ? (Datum)0 : datumCopy(skipped, false, -1);
    MemoryContextSwitchTo(old);
}

// A batch by SQL: first the key that ends it, then one statement.
void copy_by_query(const Mapping *m, Batch *batch, MemoryContext result) {
    Range range = whole_range(*batch);
    if (narrow_to(m, &range, batch->max_rows, batch->max_bytes, result)) batch->reached = range.bounds[1];
    DEBUG_POINT("batch: bound known");
    run_sql(copy_sql(m, in_range(m, range)), 2, kRangeTypes, range.bounds, range.nulls);
    read_answer(batch, result);
}

// The typed key arrays out of a list of keys as 2-D text[].
// SELECT array_agg(($1)[i][1]::t1), array_agg(($1)[i][2]::t2) FROM generate_subscripts($1, 1) AS i WHERE <condition>
char *typed_arrays_sql(const Mapping *m) {
    Sql sql;
    sql.add("SELECT ");
    for (int i = 0; i < m->nparams; i++)
        sql.comma(i == 0).addf("array_agg(($1)[i][%d]::", i + 1).type(m->key[m->params[i]].origin_type).add(")");
    sql.add(" FROM generate_subscripts($1, 1) AS i");
    return pstrdup(sql.c_str());
}

// The types of those arrays.
void array_types(const Mapping *m, Oid *types) {
    for (int i = 0; i < m->nparams; i++) types[i] = get_array_type(m->key[m->params[i]].origin_type);
}

KeyArrays typed_arrays(const Mapping *m, Datum keys) {
    const Oid types[1] = {TEXTARRAYOID};
    run_sql(typed_arrays_sql(m), 1, types, &keys);
    Datum *arrays = (Datum *)palloc(sizeof(Datum) * m->nparams);
    for (int i = 0; i < m->nparams; i++) {
        bool isnull;
        arrays[i] = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, i + 1, &isnull);
        if (isnull) return NULL;
        arrays[i] = datumCopy(arrays[i], false, -1);
    }
    return arrays;
}

// Locks what can be locked at once of the view's and dest's rows with these keys; true when nothing was left out.
// WITH src AS MATERIALIZED (SELECT 1 FROM view v WHERE <keys> FOR SHARE SKIP LOCKED),
//      dst AS MATERIALIZED (SELECT 1 FROM dest d WHERE <keys> FOR UPDATE SKIP LOCKED)
// SELECT (SELECT count(*) FROM src) = (SELECT count(*) FROM view v WHERE <keys>)
//    AND (SELECT count(*) FROM dst) = (SELECT count(*) FROM dest d WHERE <keys>)
bool lock_keys(const Mapping *m, KeyArrays keys) {
    const char *from_view = view_key_in_params(m), *from_dest = dest_key_in_params(m);
    Sql sql;
    sql.add("WITH src AS MATERIALIZED (SELECT 1 FROM ")
        .relation(m->view)
        .add(" v WHERE ")
        .add(from_view)
        .add(" FOR SHARE OF v SKIP LOCKED), ");
    sql.add("dst AS MATERIALIZED (SELECT 1 FROM ")
        .relation(m->dest)
        .add(" d WHERE ")
        .add(from_dest)
        .add(" FOR UPDATE OF d SKIP LOCKED) ");
    sql.add("SELECT (SELECT count(*) FROM src) = (SELECT count(*) FROM ")
        .relation(m->view)
        .add(" v WHERE ")
        .add(from_view)
        .add(") AND ");
    sql.add("(SELECT count(*) FROM dst) = (SELECT count(*) FROM ")
        .relation(m->dest)
        .add(" d WHERE ")
        .add(from_dest)
        .add(")");
    Oid types[INDEX_MAX_KEYS];
    array_types(m, types);
    run_sql(sql.c_str(), m->nparams, types, keys);
    bool isnull;
    return DatumGetBool(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
}

// Upserts the view's rows with these keys; true when none was left out. What is written is read under a row lock: a row
// that was not there yet when lock_keys looked could else change, or go, between the read and the write.
// WITH locked AS …, [updated AS (UPDATE dest d SET … FROM locked v … RETURNING 1),] copied AS (INSERT INTO dest …
//      SELECT … FROM locked v … RETURNING 1)
// SELECT NOT EXISTS (SELECT FROM view v WHERE <keys> AND NOT EXISTS (SELECT FROM locked l WHERE l.k = v.k))
bool upsert_locked(const Mapping *m, KeyArrays keys) {
    const char *condition = view_key_in_params(m);
    Sql sql, update;
    locked_rows(sql.add("WITH "), m, condition, is_mutant(mutant::no_key_lock) ? "" : kSkipLocked);
    if (m->partial && update_from(update, m, "locked", "true"))
        sql.add(", updated AS (").add(update.c_str()).add(" RETURNING 1)");
    insert_from(sql.add(", copied AS ("), m, "locked", "true");
    sql.add(" RETURNING 1) SELECT NOT EXISTS (SELECT");
    from_not_locked(sql, m, condition);
    sql.add(")");
    Oid types[INDEX_MAX_KEYS];
    array_types(m, types);
    SPIPlanPtr plan = SPI_prepare(sql.c_str(), m->nparams, types);
    if (plan == NULL) elog(ERROR, "SPI_prepare: %s", SPI_result_code_string(SPI_result));
    run_latest(plan, keys, NULL);
    bool isnull;
    return DatumGetBool(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, &isnull));
}

// The rows of one list of keys made right; false where one of them is locked by somebody else.
// The lock on dest's row keeps a writer of the same key from getting between the look and the delete.
bool apply_locked(Mapping *m, Datum keys) {
    KeyArrays arrays = typed_arrays(m, keys);
    if (arrays == NULL) return true;
    if (!lock_keys(m, arrays)) return false;
    DEBUG_POINT("keys: rows locked");
    if (m->carry_delete) remove_keys(m, arrays);
    DEBUG_POINT("keys: deletes done");
    const bool all = upsert_locked(m, arrays);
    DEBUG_POINT("keys: upserts done");
    return all;
}

Datum one_key(ArrayType *keys, int index, int width, Datum *elements, bool *nulls) {
    int dims[2] = {1, width}, lower[2] = {1, 1};
    return PointerGetDatum(construct_md_array(elements + index * width, nulls + index * width, 2, dims, lower, TEXTOID,
                                              -1, false, TYPALIGN_INT));
}

}  // namespace

// The forward mapping, kept from batch to batch, with the locks that a batch takes on its two tables: what the mapping
// says of them then holds until the end of the transaction.
Mapping *locked_mapping(int32 flow) {
    CacheEntry *entry = find_entry(flow, false);
    if (entry == NULL) raise_no_mapping(flow, false);
    LockRelationOid(entry->mapping->origin, AccessShareLock);
    LockRelationOid(entry->mapping->dest, RowExclusiveLock);
    if (entry->stale) entry = find_entry(flow, false);  // somebody had just changed one of them
    if (entry == NULL) raise_no_mapping(flow, false);
    return entry->mapping;
}

void end_batch(Batch *batch) {
    if (is_mutant(mutant::no_requeue)) batch->skipped = (Datum)0;
    DEBUG_POINT("batch: rows written");
}

void copy_keys_by_query(const Mapping *m, Datum keys, Batch *batch, MemoryContext result) {
    KeyArrays arrays = typed_arrays(m, keys);
    if (arrays == NULL) return;
    Oid types[INDEX_MAX_KEYS];
    array_types(m, types);
    run_sql(copy_sql(m, view_key_in_params(m)), m->nparams, types, arrays);
    read_answer(batch, result);
}

}  // namespace migrate

using namespace migrate;

// migrate._apply_range(flow int, low text[], high text[], max_rows int, max_bytes bigint, OUT rows_done bigint,
//                      OUT rows_written bigint, OUT reached text[], OUT skipped text[])
// Copies the next at most max_rows rows of (low, high] in key order, fewer where they have more than max_bytes.
// reached: the key of the last row considered, NULL when the range is exhausted. skipped: keys (2-D) whose rows were
// locked; they are the caller's to queue in this transaction.
Datum migrate_apply_range(PG_FUNCTION_ARGS) {
    const int max_rows = PG_GETARG_INT32(3);
    if (max_rows < 1)
        ereport(ERROR, (errcode(ERRCODE_INVALID_PARAMETER_VALUE), errmsg("max_rows is %d, below 1", max_rows)));
    Batch batch = {};
    batch.low = PG_ARGISNULL(1) ? (Datum)0 : PG_GETARG_DATUM(1);
    batch.high = PG_ARGISNULL(2) ? (Datum)0 : PG_GETARG_DATUM(2);
    batch.max_rows = max_rows;
    batch.max_bytes = PG_ARGISNULL(4) ? 0 : PG_GETARG_INT64(4);
    TupleDesc desc;
    if (get_call_result_type(fcinfo, NULL, &desc) != TYPEFUNC_COMPOSITE) elog(ERROR, "return type must be a row type");
    MemoryContext result = CurrentMemoryContext;
    with_spi([&] {
        Mapping *m = locked_mapping(PG_GETARG_INT32(0));
        as_dest_owner(m, kBackground, [&] {
            pin_output_settings();
            if (!bulk_copy(m, &batch, result)) copy_by_query(m, &batch, result);
            end_batch(&batch);
        });
    });
    Datum values[4] = {Int64GetDatum(batch.rows_done), Int64GetDatum(batch.rows_written), batch.reached, batch.skipped};
    bool nulls[4] = {false, false, batch.reached == 0, batch.skipped == 0};
    PG_RETURN_DATUM(HeapTupleGetDatum(heap_form_tuple(BlessTupleDesc(desc), values, nulls)));
}

// migrate._apply_keys(flow int, direction text, keys text[]) RETURNS text[]
// keys: a list (2-D). Returns those that somebody else holds locked, which are still to do; NULL when none is.
Datum migrate_apply_keys(PG_FUNCTION_ARGS) {
    ArrayType *keys = PG_GETARG_ARRAYTYPE_P(2);
    if (ARR_NDIM(keys) == 0) PG_RETURN_NULL();
    if (ARR_NDIM(keys) != 2)
        ereport(ERROR,
                (errcode(ERRCODE_ARRAY_SUBSCRIPT_ERROR), errmsg("keys have %d dimensions, not 2", ARR_NDIM(keys))));
    const int nkeys = ARR_DIMS(keys)[0], width = ARR_DIMS(keys)[1];
    const bool reverse = strcmp(text_to_cstring(PG_GETARG_TEXT_PP(1)), "reverse") == 0;
    Datum *elements;
    bool *element_null;
    int n;
    deconstruct_array(keys, TEXTOID, -1, false, TYPALIGN_INT, &elements, &element_null, &n);
    ArrayBuildStateAny *busy = NULL;
    bool all_busy = false;
    MemoryContext result = CurrentMemoryContext;

    with_spi([&] {
        Mapping *m = require_mapping(PG_GETARG_INT32(0), reverse);
        if (width != m->nparams)
            ereport(ERROR, (errcode(ERRCODE_ARRAY_SUBSCRIPT_ERROR),
                            errmsg("keys have %d columns, not %d", width, m->nparams)));
        // Batches that are under way have rows which SQL does not see.
        if (!reverse && !try_lock_flow(m, ShareLock)) {
            all_busy = true;
            return;
        }
        as_dest_owner(m, kBackground, [&] {
            pin_output_settings();
            if (apply_locked(m, PointerGetDatum(keys))) return;
            for (int i = 0; i < nkeys; i++) {  // somebody holds one of them: take the others
                if (apply_locked(m, one_key(keys, i, width, elements, element_null))) continue;
                int dims[1] = {width}, lower[1] = {1};
                Datum key = PointerGetDatum(construct_md_array(elements + i * width, element_null + i * width, 1, dims,
                                                               lower, TEXTOID, -1, false, TYPALIGN_INT));
                busy = accumArrayResultAny(busy, key, false, TEXTARRAYOID, result);
            }
        });
    });
    if (all_busy) PG_RETURN_DATUM(PG_GETARG_DATUM(2));
    if (busy == NULL) PG_RETURN_NULL();
    PG_RETURN_DATUM(makeArrayResultAny(busy, CurrentMemoryContext, true));
}
