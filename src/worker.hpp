// Background workers of a migration. Worker 0 leads: it does every kind of work. Workers 1, 2, … (option "workers")
// only copy batches while there is a backfill, and end with the leader.
#pragma once
#include "background.hpp"

namespace migrate {

// Registers the launcher when the library is being preloaded.
void init_launcher();

// The life of a worker that is connected already; does not return.
[[noreturn]] void run_worker(const WorkerStart &start);

}  // namespace migrate
