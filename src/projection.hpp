// A mapping view compiled to executor expressions over one row of origin: what SELECT … FROM view would give for that
// row, converted to the columns of dest as INSERT would convert it, without a query.
#pragma once
#include "catalog.hpp"

namespace migrate {

struct Projection {
    int ncolumns;
    AttrNumber *columns;       // attribute of dest of each column of the view
    AttrNumber *bare;          // attribute of origin that the column is, unconverted; 0: an expression
    Expr **expressions;        // planned; NULL where bare
    ExprState **values;        // of the expressions
    List *filter_expressions;  // implicitly ANDed; NIL: every row
    ExprState *filter;
    int ndefaults;
    AttrNumber *default_columns;  // columns of dest that the view has not and that have a default
    Expr **default_expressions;
    ExprState **defaults;
    AttrNumber last_read;  // of origin
    // Whether a function is called, be it by an operator or a domain: it may be replaced, and the right to execute it
    // may be taken away.
    bool calls_functions;
    MemoryContext context;  // that of the expressions
    MemoryContext states;   // that of the expressions' states
    bool ready;
    ExprContext *row;
};

// NULL where a projection can be made; else why not: then a query must do. Runs nothing that a user has written.
const char *why_not_projected(const Mapping *m, Relation origin, Relation dest);

// In the current memory context, from then on without a lock or a pin: good until origin, dest, the view, or (where it
// calls functions) a function or type changes. NULL, and *why_not, where it cannot be done.
// To be called as the role that the expressions run as, for immutable functions of constants are run at once.
Projection *make_projection(const Mapping *m, Relation origin, Relation dest, const char **why_not);

// To be called, as the role that the expressions run as, before the rows of a statement: rights to execute functions
// are checked, and states made where there are none that may be kept from one statement to the next.
void begin_projection(Projection *projection);

// The columns of the view in dest_row, a virtual slot; the others NULL. False: the view's filter leaves the row out.
// The values are good until the next call, and as long as origin_row holds its tuple.
bool project(Projection *projection, TupleTableSlot *origin_row, TupleTableSlot *dest_row);

// The defaults of the columns that the view has not: for a new row.
void add_defaults(Projection *projection, TupleTableSlot *dest_row);

}  // namespace migrate
