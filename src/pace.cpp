#include "pace.hpp"

MIGRATE_FUNCTION(migrate_next_batch)
MIGRATE_FUNCTION(migrate_halved_batch)
MIGRATE_FUNCTION(migrate_sleep_ms)
MIGRATE_FUNCTION(migrate_backoff_ms)

namespace migrate {
namespace {

constexpr double kLongestSleep = 3600 * 1000.0;

constexpr double clamp(double value, double low, double high) {
    return value < low ? low : value > high ? high : value;
}

}  // namespace

int next_batch(int rows, double elapsed_ms, double target_ms) {
    const double factor = elapsed_ms > 0 ? clamp(target_ms / elapsed_ms, 0.5, 2) : 2;
    if (factor > 0.9 && factor < 1.1) return (int)clamp(rows, kMinBatch, kMaxBatch);
    return (int)clamp(rows * factor, kMinBatch, kMaxBatch);
}

int halved_batch(int rows) {
    return (int)clamp(rows / 2, kMinBatch, kMaxBatch);
}

double sleep_ms(double busy_ms, double ratio, int64 rows, double rate, double fixed_ms) {
    double longest = fixed_ms;
    if (ratio > 0 && ratio < 1) longest = Max(longest, busy_ms * ratio / (1 - ratio));
    if (rate > 0) longest = Max(longest, rows * 1000.0 / rate - busy_ms);
    return clamp(longest, 0, kLongestSleep);
}

double backoff_ms(int tries, double first_ms, double limit_ms) {
    double wait = first_ms;
    for (int i = 1; i < tries && wait < limit_ms; i++) wait *= 2;
    return clamp(wait, 0, limit_ms);
}

}  // namespace migrate

// migrate._next_batch(rows integer, elapsed_ms float8, target_ms float8) RETURNS integer
Datum migrate_next_batch(PG_FUNCTION_ARGS) {
    PG_RETURN_INT32(migrate::next_batch(PG_GETARG_INT32(0), PG_GETARG_FLOAT8(1), PG_GETARG_FLOAT8(2)));
}

// migrate._halved_batch(rows integer) RETURNS integer
Datum migrate_halved_batch(PG_FUNCTION_ARGS) {
    PG_RETURN_INT32(migrate::halved_batch(PG_GETARG_INT32(0)));
}

// migrate._sleep_ms(busy_ms float8, ratio float8, rows bigint, rate float8, fixed_ms float8) RETURNS float8
Datum migrate_sleep_ms(PG_FUNCTION_ARGS) {
    PG_RETURN_FLOAT8(migrate::sleep_ms(PG_GETARG_FLOAT8(0), PG_GETARG_FLOAT8(1), PG_GETARG_INT64(2),
                                       PG_GETARG_FLOAT8(3), PG_GETARG_FLOAT8(4)));
}

// migrate._backoff_ms(tries integer, first_ms float8, limit_ms float8) RETURNS float8
Datum migrate_backoff_ms(PG_FUNCTION_ARGS) {
    PG_RETURN_FLOAT8(migrate::backoff_ms(PG_GETARG_INT32(0), PG_GETARG_FLOAT8(1), PG_GETARG_FLOAT8(2)));
}
