#include "row_image.hpp"

namespace migrate {

namespace {

// MD5 of a stream, as an aggregate's state. It lives in the aggregate's memory context, but the hash itself belongs to
// the cryptohash facility and to a resource owner: after an error the owner frees it, otherwise finish() or the
// aggregate's shutdown callback does (a final function need not be called: LIMIT, a closed cursor).
struct Stream {
    Md5Stream *hash;  // NULL once finished
    bool begun;       // md5_agg: a separator goes before the next value
    int used;
    char pending[1024];  // short pieces are collected: a call of the hash costs more than they do
    char hex[2 * Md5::kDigest + 1];
    RowEncoder *rows;  // ordered_md5 only
};

void check(int result) {
    if (result < 0)
        ereport(ERROR, (errcode(ERRCODE_INTERNAL_ERROR), errmsg("could not compute an MD5 hash"),
                        errhint("A server in FIPS mode does not offer MD5.")));
}

void release(Datum state) {
    Stream *stream = reinterpret_cast<Stream *>(DatumGetPointer(state));
    if (stream->hash != NULL) md5_free(stream->hash);
    stream->hash = NULL;
}

Stream *begin(FunctionCallInfo fcinfo, MemoryContext context) {
    Stream *stream = static_cast<Stream *>(MemoryContextAllocZero(context, sizeof(Stream)));
    stream->hash = md5_create(context);
    if (stream->hash == NULL) ereport(ERROR, (errcode(ERRCODE_OUT_OF_MEMORY), errmsg("out of memory")));
    AggRegisterCallback(fcinfo, release, PointerGetDatum(stream));
    check(md5_begin(stream->hash));
    return stream;
}

void hash_bytes(Stream *stream, const char *data, size_t length) {
    check(md5_update(stream->hash, reinterpret_cast<const uint8 *>(data), length));
}

void flush(Stream *stream) {
    if (stream->used > 0) hash_bytes(stream, stream->pending, stream->used);
    stream->used = 0;
}

void put(Stream *stream, std::string_view bytes) {
    if (stream->used + bytes.size() > sizeof(stream->pending)) flush(stream);
    if (bytes.size() > sizeof(stream->pending)) return hash_bytes(stream, bytes.data(), bytes.size());
    memcpy(stream->pending + stream->used, bytes.data(), bytes.size());
    stream->used += static_cast<int>(bytes.size());
}

// The digest stays in the state, for the executor may ask a hashed group for it again when it rescans.
const char *finish(Stream *stream) {
    static const char digits[] = "0123456789abcdef";
    uint8 digest[Md5::kDigest];
    if (stream->hash == NULL) return stream->hex;
    flush(stream);
    check(md5_final(stream->hash, digest));
    release(PointerGetDatum(stream));
    for (size_t i = 0; i < Md5::kDigest; i++) {
        stream->hex[2 * i] = digits[digest[i] >> 4];
        stream->hex[2 * i + 1] = digits[digest[i] & 15];
    }
    return stream->hex;
}

// The state so far (NULL: none yet); raises where the function is not called as an aggregate.
Stream *state_of(FunctionCallInfo fcinfo, MemoryContext *context) {
    if (AggCheckCallContext(fcinfo, context) != AGG_CONTEXT_AGGREGATE)
        ereport(ERROR,
                (errcode(ERRCODE_INVALID_PARAMETER_VALUE),
                 errmsg("an ordered MD5 can be computed only as a plain aggregate"), errhint("Leave OVER (…) out.")));
    Stream *stream = PG_ARGISNULL(0) ? NULL : reinterpret_cast<Stream *>(PG_GETARG_POINTER(0));
    if (stream != NULL && stream->hash == NULL) elog(ERROR, "this MD5 is finished");
    return stream;
}

}  // namespace

}  // namespace migrate

using namespace migrate;

MIGRATE_FUNCTION(migrate_md5_step)
MIGRATE_FUNCTION(migrate_ordered_md5_step)
MIGRATE_FUNCTION(migrate_md5_final)
MIGRATE_FUNCTION(migrate_same_image)
MIGRATE_FUNCTION(migrate_last_step)
MIGRATE_FUNCTION(migrate_operator)

// (state, value, separator): NULL values are skipped with their separator, as string_agg does.
Datum migrate_md5_step(PG_FUNCTION_ARGS) {
    MemoryContext context;
    Stream *stream = state_of(fcinfo, &context);
    if (!PG_ARGISNULL(1)) {
        if (stream == NULL) stream = begin(fcinfo, context);
        if (stream->begun && !PG_ARGISNULL(2)) {
            const text *separator = PG_GETARG_TEXT_PP(2);
            put(stream, std::string_view(VARDATA_ANY(separator), VARSIZE_ANY_EXHDR(separator)));
        }
        text *value = PG_GETARG_TEXT_PP(1);
        put(stream, std::string_view(VARDATA_ANY(value), VARSIZE_ANY_EXHDR(value)));
        stream->begun = true;
        PG_FREE_IF_COPY(value, 1);
    }
    if (stream == NULL) PG_RETURN_NULL();
    PG_RETURN_POINTER(stream);
}

// (state, VARIADIC "any")
Datum migrate_ordered_md5_step(PG_FUNCTION_ARGS) {
    MemoryContext context;
    Stream *stream = state_of(fcinfo, &context);
    if (stream == NULL) {
        stream = begin(fcinfo, context);
        stream->rows = make_row_encoder(fcinfo, context);
    }
    encode_row(fcinfo, stream->rows, stream);
    PG_RETURN_POINTER(stream);
}

Datum migrate_md5_final(PG_FUNCTION_ARGS) {
    if (PG_ARGISNULL(0)) PG_RETURN_NULL();
    PG_RETURN_TEXT_P(cstring_to_text(finish(reinterpret_cast<Stream *>(PG_GETARG_POINTER(0)))));
}

// Whether two values of one type have the same image; NULL is the same as NULL only.
Datum migrate_same_image(PG_FUNCTION_ARGS) {
    if (PG_ARGISNULL(0) || PG_ARGISNULL(1)) PG_RETURN_BOOL(PG_ARGISNULL(0) && PG_ARGISNULL(1));
    Encoder *encoder = static_cast<Encoder *>(fcinfo->flinfo->fn_extra);
    if (encoder == NULL) {
        encoder = static_cast<Encoder *>(MemoryContextAlloc(fcinfo->flinfo->fn_mcxt, sizeof(Encoder)));
        *encoder = make_encoder(get_fn_expr_argtype(fcinfo->flinfo, 0), fcinfo->flinfo->fn_mcxt);
        fcinfo->flinfo->fn_extra = encoder;
    }
    char scratch[2][sizeof(int64)];
    const std::string_view left = image_of(encoder, PG_GETARG_DATUM(0), scratch[0]);
    PG_RETURN_BOOL(left == image_of(encoder, PG_GETARG_DATUM(1), scratch[1]));
}

// (last, next): next
Datum migrate_last_step(PG_FUNCTION_ARGS) {
    if (PG_ARGISNULL(1)) PG_RETURN_NULL();
    PG_RETURN_DATUM(PG_GETARG_DATUM(1));
}

// (type, strategy): the comparison that ORDER BY and unique keys of the type go by, as OPERATOR(schema.name); strategy
// is the B-tree's: 1 < 2 <= 3 = 4 >= 5 >. NULL where the type has none. Names alone would be looked up in the search
// path.
Datum migrate_operator(PG_FUNCTION_ARGS) {
    TypeCacheEntry *entry =
        lookup_type_cache(getBaseType(PG_GETARG_OID(0)), TYPECACHE_BTREE_OPFAMILY | TYPECACHE_EQ_OPR);
    const int16 strategy = static_cast<int16>(PG_GETARG_INT32(1));
    const Oid found = strategy == BTEqualStrategyNumber ? entry->eq_opr
                      : OidIsValid(entry->btree_opf)    ? get_opfamily_member(entry->btree_opf, entry->btree_opintype,
                                                                              entry->btree_opintype, strategy)
                                                        : InvalidOid;
    HeapTuple tuple = SearchSysCache1(OPEROID, ObjectIdGetDatum(found));
    if (!HeapTupleIsValid(tuple)) PG_RETURN_NULL();
    const Form_pg_operator row = (Form_pg_operator)GETSTRUCT(tuple);
    char *name =
        psprintf("OPERATOR(%s.%s)", quote_identifier(get_namespace_name(row->oprnamespace)), NameStr(row->oprname));
    ReleaseSysCache(tuple);
    PG_RETURN_TEXT_P(cstring_to_text(name));
}
