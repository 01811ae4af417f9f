// What the backfill's two kinds of batches (by key, by place) share.
#pragma once
#include "bulk_copy.hpp"

namespace migrate {

// The security flags of what runs as dest's owner in the background.
constexpr int kBackground = SECURITY_RESTRICTED_OPERATION;

// The forward mapping, kept from batch to batch, with the locks that a batch takes on its two tables: what the mapping
// says of them then holds until the end of the transaction.
Mapping *locked_mapping(int32 flow);

// Copies the view's rows with these keys (2-D) by SQL, protocol P1, in one statement: sets the batch's rows_done,
// rows_written and skipped. As dest's owner; SPI must be connected.
void copy_keys_by_query(const Mapping *mapping, Datum keys, Batch *batch, MemoryContext result);

// Its rows are written.
void end_batch(Batch *batch);

}  // namespace migrate
