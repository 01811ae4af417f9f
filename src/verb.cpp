// The door between users and the extension's own functions. Every public verb is this one C function, which runs the
// internal function of the same name with a leading underscore, as the extension's owner, and tells it who called.
// (SECURITY DEFINER would not do: inside it nobody can tell the role that called.)
#include "spi.hpp"
#include "text.hpp"

MIGRATE_FUNCTION(migrate_verb)
MIGRATE_FUNCTION(migrate_as)
MIGRATE_FUNCTION(migrate_caller_search_path)
MIGRATE_FUNCTION(migrate_commit_synchronously)
MIGRATE_FUNCTION(migrate_raise)

namespace migrate {
namespace {

// The search_path of the last caller of a verb: names in a mapping are resolved by it. Nothing trusts it for anything
// else.
char *caller_search_path = NULL;
// Asked for by the verb that is running: this transaction's commit must be on disk before it is acknowledged.
bool synchronous_commit_wanted = false;

struct Verb {
    const char *name;
    int nargs;
    Oid types[FUNC_MAX_ARGS];
    Datum values[FUNC_MAX_ARGS];
    char nulls[FUNC_MAX_ARGS + 1];
    bool returns_set;
};

// Args: the caller, then what the public function was called with.
void read_call(FunctionCallInfo fcinfo, Verb *verb) {
    HeapTuple tuple = SearchSysCache1(PROCOID, ObjectIdGetDatum(fcinfo->flinfo->fn_oid));
    if (!HeapTupleIsValid(tuple)) elog(ERROR, "cache lookup failed for function %u", fcinfo->flinfo->fn_oid);
    Form_pg_proc proc = (Form_pg_proc)GETSTRUCT(tuple);
    verb->name = pstrdup(NameStr(proc->proname));
    if (proc->provolatile == PROVOLATILE_VOLATILE && RecoveryInProgress())
        ereport(
            ERROR,
            (errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
             errmsg("cannot execute migrate.%s() during recovery", verb->name),
             errdetail("This server is a replica: it follows the migration that its primary runs."),
             errhint("Run it on the primary, or promote this server. The views of schema migrate can be read here.")));
    if (proc->provolatile == PROVOLATILE_VOLATILE && XactReadOnly)
        ereport(ERROR, (errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
                        errmsg("cannot execute migrate.%s() in a read-only transaction", verb->name),
                        IsTransactionBlock() ? errhint("ROLLBACK; BEGIN READ WRITE; and call it again.")
                                             : errhint("SET default_transaction_read_only = off; and call it again.")));
    verb->returns_set = proc->proretset;
    verb->nargs = PG_NARGS() + 1;
    verb->types[0] = REGROLEOID;
    verb->values[0] = ObjectIdGetDatum(GetUserId());
    verb->nulls[0] = ' ';
    for (int i = 0; i < PG_NARGS(); i++) {
        verb->types[i + 1] = proc->proargtypes.values[i];
        verb->values[i + 1] = PG_ARGISNULL(i) ? (Datum)0 : PG_GETARG_DATUM(i);
        verb->nulls[i + 1] = PG_ARGISNULL(i) ? 'n' : ' ';
    }
    ReleaseSysCache(tuple);
}

// SELECT * FROM migrate._start($1, $2)
char *internal_call(const Verb &verb) {
    Sql sql;
    sql.add("SELECT * FROM migrate.").ident(psprintf("_%s", verb.name)).add("(");
    for (int i = 0; i < verb.nargs; i++) sql.comma(i == 0).addf("$%d", i + 1);
    sql.add(")");
    return pstrdup(sql.c_str());
}

void store_rows(ReturnSetInfo *info, Tuplestorestate *store) {
    TupleDesc desc = SPI_tuptable->tupdesc;
    Datum *values = (Datum *)palloc(sizeof(Datum) * desc->natts);
    bool *nulls = (bool *)palloc(sizeof(bool) * desc->natts);
    for (uint64 row = 0; row < SPI_processed; row++) {
        heap_deform_tuple(SPI_tuptable->vals[row], desc, values, nulls);
        tuplestore_putvalues(store, info->setDesc, values, nulls);
    }
}

ReturnSetInfo *begin_set(FunctionCallInfo fcinfo) {
    ReturnSetInfo *info = (ReturnSetInfo *)fcinfo->resultinfo;
    if (info == NULL || !IsA(info, ReturnSetInfo) || !(info->allowedModes & SFRM_Materialize) ||
        info->expectedDesc == NULL)
        ereport(ERROR, (errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
                        errmsg("set-valued function called in a context that cannot accept a set"),
                        errhint("Call it in FROM: SELECT * FROM migrate.…(…);")));
    MemoryContext old = MemoryContextSwitchTo(info->econtext->ecxt_per_query_memory);
    info->returnMode = SFRM_Materialize;
    info->setDesc = CreateTupleDescCopy(info->expectedDesc);
    info->setResult = tuplestore_begin_heap(true, false, work_mem);
    MemoryContextSwitchTo(old);
    return info;
}

Datum first_value(bool *isnull) {
    if (SPI_processed == 0 || SPI_tuptable == NULL) return *isnull = true, (Datum)0;
    const Form_pg_attribute att = TupleDescAttr(SPI_tuptable->tupdesc, 0);
    const Datum value = SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, 1, isnull);
    return *isnull || att->atttypid == VOIDOID ? (Datum)0 : SPI_datumTransfer(value, att->attbyval, att->attlen);
}

void remember_search_path() {
    char *path = MemoryContextStrdup(TopMemoryContext, namespace_search_path);
    if (caller_search_path) pfree(caller_search_path);
    caller_search_path = path;
}

}  // namespace
}  // namespace migrate

using namespace migrate;

Datum migrate_verb(PG_FUNCTION_ARGS) {
    Verb verb;
    read_call(fcinfo, &verb);
    ReturnSetInfo *info = verb.returns_set ? begin_set(fcinfo) : NULL;
    remember_search_path();
    synchronous_commit_wanted = false;

    bool isnull = true;
    Datum result = with_extension_owner([&] {
        return with_spi([&] {
            run_sql(internal_call(verb), verb.nargs, verb.types, verb.values, verb.nulls);
            if (info == NULL) return first_value(&isnull);
            store_rows(info, info->setResult);
            return (Datum)0;
        });
    });
    if (synchronous_commit_wanted && synchronous_commit < SYNCHRONOUS_COMMIT_ON)
        (void)set_config_option("synchronous_commit", "on", PGC_USERSET, PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0,
                                false);
    if (isnull) PG_RETURN_NULL();
    PG_RETURN_DATUM(result);
}

// migrate._as(role regrole, query text, VARIADIC params text[]) RETURNS SETOF text[]; and _as_of, which is STABLE
Datum migrate_as(PG_FUNCTION_ARGS) {
    const Oid role = PG_GETARG_OID(0);
    const char *query = text_to_cstring(PG_GETARG_TEXT_PP(1));
    Datum *values;
    bool *isnull;
    int nparams;
    deconstruct_array(PG_GETARG_ARRAYTYPE_P(2), TEXTOID, -1, false, TYPALIGN_INT, &values, &isnull, &nparams);
    Oid *types = (Oid *)palloc(sizeof(Oid) * (nparams + 1));
    char *nulls = (char *)palloc0(nparams + 1);
    for (int i = 0; i < nparams; i++) types[i] = TEXTOID, nulls[i] = isnull[i] ? 'n' : ' ';
    ReturnSetInfo *info = begin_set(fcinfo);

    with_user(role, SECURITY_RESTRICTED_OPERATION, [&] {
        pin_output_settings();
        with_spi([&] {
            // As a PL does: a function that is declared STABLE reads in the snapshot of the query that calls it.
            const bool read_only = func_volatile(fcinfo->flinfo->fn_oid) != PROVOLATILE_VOLATILE;
            run_sql(query, nparams, types, values, nulls, read_only);
            if (SPI_tuptable == NULL) return;
            TupleDesc desc = SPI_tuptable->tupdesc;
            int dims[1] = {desc->natts}, lower[1] = {1};
            Datum *fields = (Datum *)palloc(sizeof(Datum) * desc->natts);
            bool *field_nulls = (bool *)palloc(sizeof(bool) * desc->natts);
            for (uint64 row = 0; row < SPI_processed; row++) {
                for (int i = 0; i < desc->natts; i++) {
                    char *text = SPI_getvalue(SPI_tuptable->vals[row], desc, i + 1);
                    field_nulls[i] = text == NULL;
                    fields[i] = text ? CStringGetTextDatum(text) : (Datum)0;
                }
                Datum array = PointerGetDatum(
                    construct_md_array(fields, field_nulls, 1, dims, lower, TEXTOID, -1, false, TYPALIGN_INT));
                bool array_null = false;
                tuplestore_putvalues(info->setResult, info->setDesc, &array, &array_null);
            }
        });
    });
    PG_RETURN_NULL();
}

// migrate._caller_search_path() RETURNS text
Datum migrate_caller_search_path(PG_FUNCTION_ARGS) {
    PG_RETURN_TEXT_P(cstring_to_text(caller_search_path ? caller_search_path : namespace_search_path));
}

// migrate._commit_synchronously() RETURNS void
Datum migrate_commit_synchronously(PG_FUNCTION_ARGS) {
    synchronous_commit_wanted = true;
    PG_RETURN_VOID();
}

// migrate._raise(sqlstate text, message text, detail text, hint text) RETURNS void
Datum migrate_raise(PG_FUNCTION_ARGS) {
    const char *state = text_to_cstring(PG_GETARG_TEXT_PP(0));
    const char *message = text_to_cstring(PG_GETARG_TEXT_PP(1));
    const char *detail = text_to_cstring(PG_GETARG_TEXT_PP(2));
    const char *hint = text_to_cstring(PG_GETARG_TEXT_PP(3));
    if (strlen(state) != 5) elog(ERROR, "\"%s\" is no SQLSTATE", state);
    error_context_stack = NULL;  // whoever catches the error sets its own again
    ereport(ERROR, (errcode(MAKE_SQLSTATE(state[0], state[1], state[2], state[3], state[4])), errmsg("%s", message),
                    *detail ? errdetail("%s", detail) : 0, *hint ? errhint("%s", hint) : 0));
    PG_RETURN_VOID();
}
