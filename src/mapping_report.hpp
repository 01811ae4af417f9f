// What a mapping view says of itself: its columns, which of them can be mapped back, and that its expressions are such
// as may be evaluated at any time, by dest's owner.
#pragma once
#include "spi.hpp"

namespace migrate {

// A row of desc, as migrate._create_mapping_view gives it. Raises where an expression is not immutable, calls what
// dest's owner may not execute, or gives no value for its column of dest.
HeapTuple describe_mapping(Oid view, Oid origin, Oid dest, TupleDesc desc);

// Raises where its value depends on more than the row of `origin`. what: as messages call it.
void require_immutable(Node *expr, Oid origin, const char *what, bool may_call_users);

// Whether evaluating the expression would run code that a user has written. context: NULL.
bool runs_user_code(Node *node, void *context);

}  // namespace migrate
