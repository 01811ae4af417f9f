// What a worker must run as statements of their own, to put back what start has set aside (76_restore.sql):
// CREATE INDEX CONCURRENTLY, which commits several times, and VALIDATE CONSTRAINT, for whose time no lock of ours may
// keep a verb waiting.
#pragma once
#include "spi.hpp"

namespace migrate {

// Does this job (migrate._job in text form), in transactions of its own; none may be open. NULL, or the error.
ErrorData *run_restore(const char *job);

}  // namespace migrate
