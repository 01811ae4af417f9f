// An order-independent sum of rows: each row's canonical encoding is hashed to 128 bits, and the hashes are added
// modulo 2^128. Addition does not care for order, so parts of a table can be summed by parallel workers and added; nor
// does it lose a row that is there twice, as XOR would. What it proves: two tables that differ by chance have the same
// sum with a probability near 2^-128 (two hashes of 64 bits, by PostgreSQL's own function with two seeds). It is no
// cryptographic proof: who may choose the rows can make sums meet, which MD5 over the rows in their order does not
// allow as easily. It depends on the machine's byte order too, so it compares tables of one server and is not worth
// keeping.
#include "row_image.hpp"

namespace migrate {

namespace {

// A number of 128 bits. (Not the compiler's: memory of the server's is not aligned for it.)
struct Sum {
    uint64 high, low;

    void add(uint64 h, uint64 l) {
        low += l;
        high += h + (low < l ? 1 : 0);
    }
};

// The encoding is hashed in blocks of this size, each seeded with what those before it gave: so no row is too long.
constexpr int kBlock = 4096;
constexpr uint64 kSeeds[2] = {UINT64CONST(0x9e3779b97f4a7c15), UINT64CONST(0xc2b2ae3d27d4eb4f)};

struct RowSum {
    Sum sum;
    int64 count;
    uint64 hash[2];  // of the row so far
    int used;
    char block[kBlock];
    RowEncoder *rows;  // NULL where sums are only combined
};

void hash_block(RowSum *state, const char *data, int length) {
    for (uint64 &hash : state->hash)
        hash = hash_bytes_extended(reinterpret_cast<const unsigned char *>(data), length, hash);
}

// Blocks end at the same places of the encoding, however it comes in pieces.
void put(RowSum *state, std::string_view bytes) {
    while (state->used + bytes.size() > kBlock) {
        const size_t part = kBlock - state->used;
        if (state->used > 0) {
            memcpy(state->block + state->used, bytes.data(), part);
            hash_block(state, state->block, kBlock);
        } else {
            hash_block(state, bytes.data(), kBlock);
        }
        bytes.remove_prefix(part);
        state->used = 0;
    }
    memcpy(state->block + state->used, bytes.data(), bytes.size());
    state->used += static_cast<int>(bytes.size());
}

RowSum *new_sum(MemoryContext context) {
    return static_cast<RowSum *>(MemoryContextAllocZero(context, sizeof(RowSum)));
}

RowSum *sum_at(FunctionCallInfo fcinfo, int argument) {
    return PG_ARGISNULL(argument) ? NULL : reinterpret_cast<RowSum *>(PG_GETARG_POINTER(argument));
}

MemoryContext aggregate_context(FunctionCallInfo fcinfo) {
    MemoryContext context;
    if (AggCheckCallContext(fcinfo, &context) == 0) elog(ERROR, "row_sum called outside of an aggregate");
    return context;
}

// What a worker hands to its leader.
struct Part {
    int64 count;
    Sum sum;
};

}  // namespace

}  // namespace migrate

using namespace migrate;

MIGRATE_FUNCTION(migrate_row_sum_step)
MIGRATE_FUNCTION(migrate_row_sum_combine)
MIGRATE_FUNCTION(migrate_row_sum_serialize)
MIGRATE_FUNCTION(migrate_row_sum_deserialize)
MIGRATE_FUNCTION(migrate_row_sum_final)

// (state, VARIADIC "any")
Datum migrate_row_sum_step(PG_FUNCTION_ARGS) {
    MemoryContext context = aggregate_context(fcinfo);
    RowSum *state = sum_at(fcinfo, 0);
    if (state == NULL) state = new_sum(context);
    if (state->rows == NULL) state->rows = make_row_encoder(fcinfo, context);
    state->hash[0] = kSeeds[0];
    state->hash[1] = kSeeds[1];
    state->used = 0;
    encode_row(fcinfo, state->rows, state);
    hash_block(state, state->block, state->used);
    state->sum.add(state->hash[0], state->hash[1]);
    state->count++;
    PG_RETURN_POINTER(state);
}

Datum migrate_row_sum_combine(PG_FUNCTION_ARGS) {
    MemoryContext context = aggregate_context(fcinfo);
    RowSum *state = sum_at(fcinfo, 0);
    const RowSum *other = sum_at(fcinfo, 1);
    if (other == NULL) {
        if (state == NULL) PG_RETURN_NULL();
        PG_RETURN_POINTER(state);
    }
    if (state == NULL) state = new_sum(context);  // not `other`: that one does not live long enough
    state->sum.add(other->sum.high, other->sum.low);
    state->count += other->count;
    PG_RETURN_POINTER(state);
}

Datum migrate_row_sum_serialize(PG_FUNCTION_ARGS) {
    (void)aggregate_context(fcinfo);
    const RowSum *state = sum_at(fcinfo, 0);
    const Part part = {state->count, state->sum};
    bytea *result = static_cast<bytea *>(palloc(VARHDRSZ + sizeof(part)));
    SET_VARSIZE(result, VARHDRSZ + sizeof(part));
    memcpy(VARDATA(result), &part, sizeof(part));
    PG_RETURN_BYTEA_P(result);
}

Datum migrate_row_sum_deserialize(PG_FUNCTION_ARGS) {
    (void)aggregate_context(fcinfo);
    bytea *bytes = PG_GETARG_BYTEA_PP(0);
    Part part;
    if (VARSIZE_ANY_EXHDR(bytes) != sizeof(part)) elog(ERROR, "invalid state of row_sum");
    memcpy(&part, VARDATA_ANY(bytes), sizeof(part));
    RowSum *state = new_sum(CurrentMemoryContext);
    state->count = part.count;
    state->sum = part.sum;
    PG_RETURN_POINTER(state);
}

// The number of rows and their sum, in digits: of no rows too, so that it can always be compared with =.
Datum migrate_row_sum_final(PG_FUNCTION_ARGS) {
    const RowSum *state = sum_at(fcinfo, 0);
    const Sum sum = state == NULL ? Sum{0, 0} : state->sum;
    char *digits = psprintf(INT64_FORMAT ":%016llx%016llx", state == NULL ? 0 : state->count,
                            static_cast<unsigned long long>(sum.high), static_cast<unsigned long long>(sum.low));
    PG_RETURN_TEXT_P(cstring_to_text(digits));
}
