// How fast a worker goes: batch sizes, sleeps and back-offs, as pure functions. Nothing here looks at a clock or a
// table, so that each can be tried by hand: SELECT migrate._next_batch(1000, 50, 100);
#pragma once
#include "compat.hpp"

namespace migrate {

constexpr int kMinBatch = 10;
constexpr int kMaxBatch = 100000;

// The size of the batch after one of `rows` rows that took elapsed_ms and should have taken target_ms: at most twice
// and at least half of that, and the same within a tenth of the aim, so that sizes come to rest.
int next_batch(int rows, double elapsed_ms, double target_ms);

// The size after lock trouble or a failed row: half.
int halved_batch(int rows);

// How long to sleep after a batch of `rows` rows that took busy_ms, so that
//   - the share `ratio` of all time is slept (0: none, towards 1: all but nothing is done; the meaning of gh-ost and
//   Vitess),
//   - no more than `rate` rows a second are written (0: no limit),
//   - at least fixed_ms are slept.
// The longest of the three, at most an hour.
double sleep_ms(double busy_ms, double ratio, int64 rows, double rate, double fixed_ms);

// How long to wait after the tries-th failure in a row (from 1): first_ms, doubled each time, at most limit_ms.
double backoff_ms(int tries, double first_ms, double limit_ms);

}  // namespace migrate
