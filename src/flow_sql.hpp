// The SQL of the primitive: one function for each clause, the final shape of the query in the comment above it.
// v is the mapping view, d is dest. Parameters $1…$n are the key arrays (one for each non-constant key column).
#pragma once
#include "catalog.hpp"
#include "text.hpp"

namespace migrate {

// "schema"."name"
char *qualified(Oid relid);

// v.k1, v.k2: the non-constant part of the key as the view has it
void view_key(Sql &sql, const Mapping *m, const char *alias);

// v.k = ANY($1)   or, for several columns,   (v.k1, v.k2) IN (SELECT * FROM unnest($1, $2)); `first`: instead of $1
char *view_key_in_params(const Mapping *m, int first = 1);

// d.k = ANY($1::dest_type[]) AND d.constant = '…': this mapping's rows of dest with the keys of the parameters;
// `first`: instead of $1
char *dest_key_in_params(const Mapping *m, int first = 1);

// d.constant = '…' AND …, or true: this mapping's share of dest
char *dest_share(const Mapping *m);

// d.c1 = (v.c1)::type AND …: the columns of a unique index of dest. False where one of them is an expression, or no
// column of the view.
bool unique_columns_equal(Sql &sql, const Mapping *m, Oid index);

// locked AS MATERIALIZED (SELECT v.* FROM view v WHERE <condition> <lock>)
void locked_rows(Sql &sql, const Mapping *m, const char *condition, const char *lock);

// INSERT INTO dest AS d (c1, …) SELECT v.c1, … FROM <from> v WHERE <condition> ON CONFLICT (k) DO UPDATE …
void insert_from(Sql &sql, const Mapping *m, const char *from, const char *condition);

// Whether the mapping has no columns but the key's: then an upsert finds nothing to write where dest has the row.
bool is_only_key(const Mapping *m);

// UPDATE dest d SET k = ($2)[1] WHERE d.k = ANY ($1) AND <dest has not $2>
// AND (<the view has $2> OR ($2)[1] = ANY ($3))
void move_dest_row(Sql &sql, const Mapping *m);

// SELECT FROM dest d WHERE <keys of the parameters> FOR NO KEY UPDATE
void hold_dest_rows(Sql &sql, const Mapping *m);

// UPDATE dest d SET c = v.c, … FROM <from> v WHERE <condition> AND v.k = d.k AND <differs>
// False, and nothing added, where there is nothing but the key.
bool update_from(Sql &sql, const Mapping *m, const char *from, const char *condition);

// DELETE FROM dest d WHERE <condition> AND NOT EXISTS (SELECT FROM view v WHERE v.k = d.k) [for each view that feeds
// dest]
void delete_missing(Sql &sql, const Mapping *m, const char *condition);

// SELECT (d.k1)::type, … FROM dest d WHERE … as above: the keys of these rows as origin has them
void select_missing(Sql &sql, const Mapping *m, const char *condition);

}  // namespace migrate
