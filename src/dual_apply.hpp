// Applying touched keys on behalf of the application: with failures as the migration's option dual_write says.
#pragma once
#include "touched.hpp"

namespace migrate {

// Removals and upserts, as one change where dest allows. strict: an error is the statement's. best_effort: what fails
// is recorded, and a worker retries it.
void apply_touched(Mapping *mapping, const Touched &touched);

// Of that only the moves of rows whose key has changed, and the removals.
void apply_removals(Mapping *mapping, const Touched &touched);

// TRUNCATE of origin.
void apply_truncation(Mapping *mapping);

// The target may lack, or have, what nothing will tell of: no switch is made until all is validated anew (gate
// dual_writes). Nothing is read, which among serializable transactions could be a conflict.
void record_gap(const Mapping *mapping);

// Whether the statements' share of subtransactions, which best_effort takes, is used up in this transaction.
bool is_exhausted(const Mapping *mapping);

// Many keys are worth some more subtransactions, in the middle of a transaction and at its end.
void grant_subtransactions();

// At the end of a transaction. committed: a worker is started for the failures it recorded.
void end_applying_transaction(bool committed);

}  // namespace migrate
