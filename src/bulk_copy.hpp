// Protocol P2: a batch of the backfill that writes dest as COPY does, and never writes the source. It locks no row.
//
// A batch writes dest's rows, index entries included, and then reads the source's rows again. A writer changes a source
// row and then looks for dest's row (dirty: uncommitted rows are seen, and waited for). Both go through the same index
// and heap pages, so at least one of the two sees the other:
//   - Where the batch, reading again, finds a row that is being changed, or was, it takes back its copy and gives the
//     key back to be copied later.
//   - Else the change comes after that reading, and so does the writer's look at dest: it finds the batch's row, waits
//     for the batch's end, and then writes what it has to.
// A source row that is only locked is not being changed. Its holder may change it yet; that comes after the reading
// too. So it needs no care, and it must not need any: whoever inserts a row that references it locks it.
// The same holds for dest's rows that are there already: the batch does not wait for them, or for whoever is inserting
// them, but takes back its own copy and gives back the key. It waits for nobody, so nobody can be in a deadlock with
// it.
// It holds only if every writer looks for uncommitted rows of dest, as the direct path does and SQL does not.
#pragma once
#include "catalog.hpp"

namespace migrate {

// What a batch is to do, and what it did.
struct Batch {
    bool by_place;    // in the order of place, not of the key
    Datum low, high;  // text[], a key or a place; 0: open
    int max_rows;
    int64 max_bytes;  // 0: no limit
    int64 rows_done, rows_written;
    Datum reached;  // text[]: the key, or the place, of the last row, 0: the range is exhausted
    Datum skipped;  // text[], a list of keys (2-D), 0: none
};

// Why the flow's rows cannot be copied so; NULL: they can, as long as the caller keeps its locks on the two tables (at
// least RowExclusiveLock on dest).
const char *why_no_bulk_copy(const Mapping *mapping, Relation origin, Relation dest);

// Copies a batch; false, with nothing done, where it cannot, or should not, because the most of the rows are there
// already. As dest's owner, within a bracket that has pinned the output settings; results are allocated in `result`.
bool bulk_copy(const Mapping *mapping, Batch *batch, MemoryContext result);

}  // namespace migrate
