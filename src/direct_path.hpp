// Whether a mapping's rows may be written without SQL, row by row with the executor's own routines (direct_apply.cpp).
#pragma once
#include "mapping_load.hpp"

namespace migrate {

// NULL where they may; else the first reason why not. Whatever dest has that the direct path does not honour is one.
// The answer holds until origin, dest or the view changes; who acts on it holds a lock on dest that keeps DDL out.
const char *why_not_direct(const Mapping *m, Relation origin, Relation dest);

// The unique indexes over just the mapping's key columns of origin or dest, that a key can be looked up in.
List *find_key_indexes(const Mapping *m, Relation relation, AttrNumber KeyColumn::*column);

// For SQL: what `ask` says of the flow that is the call's first argument, NULL where it says nothing or there is no
// such flow.
template <class Ask>
Datum answer_of_flow(FunctionCallInfo fcinfo, bool reverse, Ask ask) {
    MemoryContext result = CurrentMemoryContext;
    const char *answer = with_spi([&]() -> const char * {
        Mapping *m = load_mapping(PG_GETARG_INT32(0), reverse, Lifetime::kCall);
        if (m == NULL) return NULL;
        Relation origin = table_open(m->origin, AccessShareLock), dest = table_open(m->dest, AccessShareLock);
        const char *text = ask(m, origin, dest);
        table_close(origin, NoLock);
        table_close(dest, NoLock);
        return text ? MemoryContextStrdup(result, text) : NULL;
    });
    if (answer == NULL) PG_RETURN_NULL();
    PG_RETURN_TEXT_P(cstring_to_text(answer));
}

}  // namespace migrate
