// Reading a flow's source in the order of place: block by block, without an index. That is how the backfill reads where
// the order of the key is another one, for there each row would be a page read by itself.
//
// A row's place is not its own: an UPDATE gives the row another one, and from a part of the table that is still to be
// read it may move to one that has been read. Nevertheless no row is missed by batches that go on from a place:
//   - Dual writes are on before the first batch, and every transaction that had written before has ended. A row that
//     nobody has changed since stays where it is, is visible to every snapshot, and is met there.
//   - A row that somebody changes is written to dest by that very transaction, wherever the row moves. This needs that
//     *every* UPDATE is: one of columns that the mapping does not read, which is else passed over, moves the row too.
//     So nothing is passed over until the backfill has ended (Mapping::copied_by_place, unchanged() in dual_write.cpp).
//     What dest refuses is recorded, and tried again by key.
//   - An UPDATE that is undone leaves the old row where it was. A batch that meets it meanwhile copies it, or gives it
//     back by key, as it does with any row (bulk_copy.hpp).
//   - Blocks that are added after the ranges were made hold rows that were written under dual writes.
//   - VACUUM FULL, CLUSTER, and whatever else writes the table anew, gives it another file. The file is compared under
//     the lock of each batch, and where it is another one the ranges are made anew.
#pragma once
#include "catalog.hpp"

namespace migrate {

struct PlaceScan {
    TableScanDesc scan;  // NULL: there is nothing
    ItemPointerData after, until;
};

// The visible rows of origin at places in (after, until]. Both are a text[] of one place, '(block,offset)'; 0: open.
// The offset 0, which no row has, stands before all of a block. Raises where origin is no heap (any more).
void begin_place_scan(PlaceScan *scan, Relation origin, Snapshot snapshot, Datum after, Datum until);
bool next_in_place(PlaceScan *scan, TupleTableSlot *row);
void end_place_scan(PlaceScan *scan);

// The place as the ledger has it, in the current memory context.
Datum place_texts(ItemPointer place);

}  // namespace migrate
