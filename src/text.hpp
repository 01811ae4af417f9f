// SQL text, built in one way only: identifiers and literals quoted, relations by OID with their schema.
#pragma once
#include "compat.hpp"

namespace migrate {

// A growing SQL text in the current memory context.
class Sql {
public:
    Sql() { initStringInfo(&buffer_); }
    Sql &add(const char *verbatim) { return appendStringInfoString(&buffer_, verbatim), *this; }
    Sql &addf(const char *format, ...) pg_attribute_printf(2, 3);
    Sql &ident(const char *name) { return add(quote_identifier(name)); }
    Sql &literal(const char *value);
    // "schema"."name" of a relation; raises when it is gone.
    Sql &relation(Oid relid);
    // Likewise of a collation, and of an operator class.
    Sql &collation(Oid id);
    Sql &opclass(Oid id);
    // The column's present name, quoted.
    Sql &column(Oid relid, AttrNumber attnum) { return ident(get_attname(relid, attnum, false)); }
    // The type as a cast takes it, schema-qualified, with its modifier.
    Sql &type(Oid typid, int32 typmod = -1) {
        return add(format_type_extended(typid, typmod, FORMAT_TYPE_TYPEMOD_GIVEN | FORMAT_TYPE_FORCE_QUALIFY));
    }
    // ", " between the elements of a list: nothing the first time.
    Sql &comma(bool first) { return first ? *this : add(", "); }
    Sql &sep(bool first, const char *separator) { return first ? *this : add(separator); }
    const char *c_str() const { return buffer_.data; }

private:
    // "schema"."name" of what a system cache has under an OID, by the two columns that say so.
    Sql &qualified(int cache, Oid id, AttrNumber schema, AttrNumber name);
    StringInfoData buffer_;
};

}  // namespace migrate
