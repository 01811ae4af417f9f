// One row of dest made equal to what the mapping view has for its key, without SQL: by the routines that the executor
// itself writes rows with.
#pragma once
#include "projection.hpp"

namespace migrate {

// A unique index that a key is looked up in.
struct KeyLookup {
    Oid index;
    ScanKeyData scan_keys[INDEX_MAX_KEYS];
    int key[INDEX_MAX_KEYS];  // which column of the mapping's key each scan key is for
};

// What is known of a mapping's relations for as long as their definitions stay.
struct RowPath {
    const Mapping *mapping;
    Projection *projection;
    KeyLookup source, target;
    List *arbiters;        // unique indexes of dest over just the key
    Bitmapset *mapped;     // columns of dest, as a query's updatedCols
    bool fires_triggers;   // those of foreign keys and of other migrations
    bool checks_rows;      // there are constraints other than NOT NULL
    bool calls_functions;  // anything may be run that reads settings or tables
};

// In the current memory context; the mapping must be eligible (why_not_direct).
RowPath *make_row_path(const Mapping *m, Relation origin, Relation dest, Projection *projection);

// While rows are written. What it holds is released by close_writer, or by the end of the (sub)transaction.
struct RowWriter {
    RowPath *path;
    Relation origin, dest;
    EState *estate;
    ResultRelInfo *target;
    TupleTableSlot *source_row, *old_row, *new_row;
    Relation source_index, target_index;
    IndexScanDesc source_scan, target_scan;
    SnapshotData dirty;
    bool indexes_open, inserted, updated, deleted;
};

void open_writer(RowWriter *w, RowPath *path, Relation origin, Relation dest);
void close_writer(RowWriter *w);

// The view's row with this key upserted; nothing where it has none. place: where the row may be, or NULL. As
// upsert_keys: the caller holds the source row.
void upsert_row(RowWriter *w, const Datum *key, ItemPointer place);

// The row with this key deleted from dest where the view has none.
void remove_row(RowWriter *w, const Datum *key);

}  // namespace migrate
