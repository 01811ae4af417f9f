// The canonical encoding of a row, piece by piece: each column is tag 0 for NULL; or tag 1, the length in four bytes
// (most significant first), the image. So no two rows of one shape have the same encoding. For ordered_md5 and row_sum.
#pragma once
#include "image.hpp"

namespace migrate {

// What the aggregates keep from row to row; it lives in the aggregate's memory context.
struct RowEncoder {
    MemoryContext context;
    MemoryContext row;  // reset with every row
    Encoder *encoders;  // one for each column
    int columns;
    Oid types[FUNC_MAX_ARGS];  // of the step's arguments
};

// For the arguments of an aggregate's step after its state: (state, VARIADIC "any").
inline RowEncoder *make_row_encoder(FunctionCallInfo fcinfo, MemoryContext context) {
    if (get_fn_expr_variadic(fcinfo->flinfo))
        ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED), errmsg("a digest does not take a VARIADIC array"),
                        errhint("Name the columns one by one, or give the array itself as one column.")));
    RowEncoder *rows = static_cast<RowEncoder *>(MemoryContextAllocZero(context, sizeof(RowEncoder)));
    rows->context = context;
    rows->row = AllocSetContextCreate(context, "row encoder", ALLOCSET_DEFAULT_SIZES);
    for (int i = 1; i < PG_NARGS(); i++) rows->types[i] = get_fn_expr_argtype(fcinfo->flinfo, i);
    return rows;
}

// Encoder of column `index`; made when its first value is seen.
inline Encoder *encoder_at(RowEncoder *rows, int index, Oid type) {
    if (index >= rows->columns) {
        const Size size = sizeof(Encoder) * (index + 1);
        rows->encoders = static_cast<Encoder *>(rows->encoders == NULL ? MemoryContextAlloc(rows->context, size)
                                                                       : repalloc(rows->encoders, size));
        for (int i = rows->columns; i <= index; i++) rows->encoders[i].type = InvalidOid;
        rows->columns = index + 1;
    }
    if (rows->encoders[index].type != type) rows->encoders[index] = make_encoder(type, rows->context);
    return &rows->encoders[index];
}

// A Sink has put(sink, std::string_view).
template <class Sink>
void put_column(RowEncoder *rows, Sink *sink, int index, Oid type, Datum value, bool is_null) {
    if (is_null) return put(sink, std::string_view("\0", 1));
    char scratch[sizeof(int64)];
    const std::string_view image = image_of(encoder_at(rows, index, type), value, scratch);
    const char head[5] = {1, static_cast<char>(image.size() >> 24), static_cast<char>(image.size() >> 16),
                          static_cast<char>(image.size() >> 8), static_cast<char>(image.size())};
    put(sink, std::string_view(head, sizeof(head)));
    put(sink, image);
}

// The columns of ROW(…), as if each were an argument: so a digest can take more columns than a function arguments.
template <class Sink>
int put_record(RowEncoder *rows, Sink *sink, int index, Datum record) {
    HeapTupleHeader header = DatumGetHeapTupleHeader(record);
    TupleDesc desc = lookup_rowtype_tupdesc(HeapTupleHeaderGetTypeId(header), HeapTupleHeaderGetTypMod(header));
    HeapTupleData tuple;
    tuple.t_len = HeapTupleHeaderGetDatumLength(header);
    ItemPointerSetInvalid(&tuple.t_self);
    tuple.t_tableOid = InvalidOid;
    tuple.t_data = header;

    Datum *values = static_cast<Datum *>(palloc(desc->natts * sizeof(Datum)));
    bool *nulls = static_cast<bool *>(palloc(desc->natts * sizeof(bool)));
    heap_deform_tuple(&tuple, desc, values, nulls);
    for (int i = 0; i < desc->natts; i++)
        if (!TupleDescAttr(desc, i)->attisdropped)
            put_column(rows, sink, index++, TupleDescAttr(desc, i)->atttypid, values[i], nulls[i]);
    ReleaseTupleDesc(desc);
    return index;
}

// Puts the row that is in the step's arguments into the sink.
template <class Sink>
void encode_row(FunctionCallInfo fcinfo, RowEncoder *rows, Sink *sink) {
    MemoryContext caller = MemoryContextSwitchTo(rows->row);
    int index = 0;
    for (int i = 1; i < PG_NARGS(); i++) {
        const Oid type = rows->types[i];
        if (type == RECORDOID && !PG_ARGISNULL(i))
            index = put_record(rows, sink, index, PG_GETARG_DATUM(i));
        else
            put_column(rows, sink, index++, type, PG_GETARG_DATUM(i), PG_ARGISNULL(i));
    }
    MemoryContextSwitchTo(caller);
    MemoryContextReset(rows->row);
}

}  // namespace migrate
