// What the throttle must measure over time: when the server's WAL was where. Kept in the memory of the worker that
// leads; each look at the signals adds a sample.
#include "pace.hpp"

MIGRATE_FUNCTION(migrate_sample_wal)
MIGRATE_FUNCTION(migrate_lsn_age_ms)
MIGRATE_FUNCTION(migrate_wal_rate)

namespace migrate {
namespace {

struct Sample {
    TimestampTz at;
    XLogRecPtr lsn;
};

constexpr int kSamples = 512;
constexpr double kRateWindow = 2000 * 1000.0;  // microseconds over which the WAL rate is measured, at least

Sample samples[kSamples];  // by age, oldest first
int count = 0;

// Makes room by dropping every other sample: recent history stays finer than old history after many rounds.
void thin() {
    for (int i = 1; 2 * i < count; i++) samples[i] = samples[2 * i];
    count /= 2;
}

}  // namespace
}  // namespace migrate

using namespace migrate;

// migrate._sample_wal() RETURNS void
Datum migrate_sample_wal(PG_FUNCTION_ARGS) {
    if (count == kSamples) thin();
    samples[count++] = Sample{GetCurrentTimestamp(), GetXLogWriteRecPtr()};
    PG_RETURN_VOID();
}

// migrate._lsn_age_ms(lsn pg_lsn) RETURNS float8: how long ago the server's WAL went past lsn. A replica that has
// replayed no further than lsn lags at least so much, whatever it reports itself; one that is stuck reports nothing
// new.
Datum migrate_lsn_age_ms(PG_FUNCTION_ARGS) {
    const XLogRecPtr lsn = DatumGetUInt64(PG_GETARG_DATUM(0));
    for (int i = 0; i < count; i++)
        if (samples[i].lsn > lsn) PG_RETURN_FLOAT8((GetCurrentTimestamp() - samples[i].at) / 1000.0);
    PG_RETURN_FLOAT8(0);
}

// migrate._wal_rate() RETURNS float8: bytes a second over the last seconds; NULL while there are too few samples to
// tell.
Datum migrate_wal_rate(PG_FUNCTION_ARGS) {
    for (int i = count - 2; i >= 0; i--) {
        const double elapsed = (double)(samples[count - 1].at - samples[i].at);
        if (elapsed >= kRateWindow || (i == 0 && elapsed > 0))
            PG_RETURN_FLOAT8((samples[count - 1].lsn - samples[i].lsn) * 1000000.0 / elapsed);
    }
    PG_RETURN_NULL();
}
