// Typed access to migrate._mapping: all that the apply primitive knows of a flow in one direction. No policy.
#pragma once
#include "spi.hpp"

namespace migrate {

constexpr char kVirtualColumn = 'v';  // attgenerated, since PostgreSQL 18

struct KeyColumn {
    AttrNumber dest;
    AttrNumber origin;     // 0: a constant
    AttrNumber view;       // position in the mapping view
    const char *constant;  // its text in dest's type; NULL unless origin is 0
    Oid origin_type;
    Oid dest_type;
};

struct FixedColumn {
    AttrNumber origin;
    const char *constant;
    Datum value;  // the same as one of origin's column
};

// A failed write's consequence for the statement of the application that caused it.
enum class OnFailure { kRaise, kRecord };

struct DirectChoice;

struct Mapping {
    int32 flow;
    int32 migration;
    const char *migration_name;
    bool reverse;
    Oid view;
    Oid origin;
    Oid dest;
    Oid dest_owner;
    int ncolumns;
    AttrNumber *columns;  // attribute of dest of each column of the view
    int nreads;
    AttrNumber *reads;  // attributes of origin the view reads; a single 0: all
    int nkey;
    KeyColumn *key;
    int nparams;  // key columns that are no constants: the width of a key
    int *params;  // their positions in key
    int nshared;  // other mapping views with the same dest, whose rows must not be deleted
    Oid *shared;
    AttrNumber *shared_key;   // nkey positions for each of them
    Oid carried;              // in reverse: the forward view where that is filtered; else 0
    AttrNumber *carried_key;  // nkey positions in it; 0 for a constant
    int nfixed;               // in reverse: columns of origin's key that the way forth sets to constants
    FixedColumn *fixed;
    bool plain;           // every column is bare or a constant: no expression that could raise an error
    bool filtered;        // a row may leave the view without leaving origin
    bool ambiguous;       // origin's key is deferrable: a key may stand twice for a moment
    bool partial;         // dest has columns that an INSERT from here could not fill: update first
    bool carry_delete;    // a key that the view has not is deleted from dest
    bool delete_at_once;  // dest references origin: rows of dest go before the foreign key is checked
    bool insert_at_once;  // origin references dest: rows of dest come before the foreign key is checked
    bool moves_rows;      // a row whose key changes is moved in dest, too: dest has more of it than is mapped
    bool deletion_acts;   // foreign keys act on a deletion from dest: CASCADE, SET NULL, SET DEFAULT
    bool upsert_may_fail;
    bool delete_may_fail;
    OnFailure on_failure;
    bool both_directions;  // dest is written by the application too, and carried back
    bool copied_by_place;  // the backfill, under way, reads origin by place: every UPDATE is carried (place_scan.hpp)
    bool lost;             // dest, its key or the view is gone (DROP … CASCADE), and cannot come back
    bool kept;             // over transactions, until free_mapping
    MemoryContext context;
    DirectChoice *direct;                                    // direct_apply.cpp's
    SPIPlanPtr hold, upsert, update, remove, replace, move;  // made on first use; kept as long as the mapping is
};

// Where the attribute is in the list, from 1; 0 where it is not.
int position_of(const AttrNumber *columns, int n, AttrNumber attnum);

// Whether the attribute of origin, dest or the view is one of the key's.
bool is_key(const Mapping *mapping, AttrNumber KeyColumn::*column, AttrNumber attnum);

// Calls fn(index) for each index of the relation. The locks stay until the end of the transaction: what is decided by
// the indexes is to hold until then.
template <class Fn>
void for_each_index(Relation relation, Fn fn) {
    List *indexes = RelationGetIndexList(relation);
    ListCell *cell;
    foreach (cell, indexes) {
        Relation index = index_open(lfirst_oid(cell), AccessShareLock);
        fn(index);
        index_close(index, AccessShareLock);  // kept without the table's, it would be in the way of who locks both
    }
    list_free(indexes);
}

// Whether the index's column i is a plain one, and compares as that does in SQL: by its collation, and by its type's
// own order. An index that does not may hold more, or fewer, values to be equal.
bool compares_as_column(Relation relation, Relation index, int i);

// Attribute numbers that an expression over one relation, its first, reads, in order, as a list of integers: below 0
// those of system columns, 0 for the whole row.
List *attnums_read(Node *expression);
// The same as int2[].
Datum attnum_array(const List *attnums);
Datum int2_array(Datum *values, int n);

// Whether the trigger is one of ours, whatever its name is.
bool is_dual_write_trigger(const Trigger *trigger);

// Whether a worker of the migration would do anything: it is neither paused nor failed.
bool is_going_on(int32 migration);

// Fills in what migrate._mapping, _flow, _migration and _option have, by the latest snapshot, in the current memory
// context; flow and reverse are given. False where there is no such mapping. Locks and rights are the caller's.
bool read_mapping(Mapping *mapping);

}  // namespace migrate
