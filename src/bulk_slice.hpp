// Part of a bulk copy (bulk_copy.hpp): some of a batch's rows, which are written together as COPY does it, and whose
// source rows are then read again.
#pragma once
#include "projection.hpp"

namespace migrate {

constexpr int kSliceRows = 1000;
constexpr Size kSliceBytes = 64 * 1024;

// What became of a row of the slice.
enum class Fate {
    written,
    there_already,  // dest had the very same row: ours is taken back
    given_back  // dest has the key, or is just getting it, or the source row is being changed: the same, and the key
                // is to be copied later
};

struct Slice {
    const Mapping *mapping;
    Relation origin, dest;
    Snapshot snapshot;  // by which the source is read; registered: vacuum leaves the rows where they are
    EState *estate;
    ResultRelInfo *target;
    BulkInsertState bulk;
    Projection *projection;
    Relation key_index;  // of dest; opened, as the scan is, when the first conflict is met
    IndexScanDesc key_scan;
    SnapshotData dirty;
    TupleTableSlot *found;
    // the rows
    TupleTableSlot *rows[kSliceRows];
    ItemPointerData sources[kSliceRows];
    Fate fates[kSliceRows];
    int filled;
    Size bytes;
};

// The executor's part is made in the current memory context; close_slice releases what is not released by the end of
// the (sub)transaction.
void open_slice(Slice *slice, const Mapping *mapping, Relation origin, Relation dest, Snapshot snapshot);
void close_slice(Slice *slice);

// Takes a row of origin into the slice; false where the mapping's filter does not let it through.
bool take_row(Slice *slice, TupleTableSlot *row);

// The bytes that the values of the row taken last are stored in, as the mapping view has them: what limits a batch.
Size last_row_bytes(const Slice *slice);

// Writes the rows, and then reads their source rows again: sets their fates. Returns how many of the keys dest had.
int write_slice(Slice *slice);

// To be filled again.
void clear_slice(Slice *slice);

}  // namespace migrate
