// What a mapping view says of itself: its columns, which of them can be mapped back, and that its expressions are such
// as may be evaluated at any time, by dest's owner.
#pragma once
#include "spi.hpp"

namespace migrate {

// A row of desc, as migrate._create_mapping_view gives it. Raises where an expression is not immutable, calls what
// dest's owner may not execute, or gives no value for its column of dest.
HeapTuple describe_mapping(Oid view, Oid origin, Oid dest, TupleDesc desc);

}  // namespace migrate
