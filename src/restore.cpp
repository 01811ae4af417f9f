// User code that an index or a foreign key runs (index functions, casts, operators, domain checks) is run as the
// table's owner and in a security-restricted operation, as everywhere. CREATE INDEX CONCURRENTLY sees to that itself
// while it builds; before, the worker has become the owner for the time of the whole statement, and parses it in the
// restricted bracket, for the constants of a predicate may be of a domain. (The bracket cannot be around the statement:
// it must not be open where a transaction begins.)
#include "restore.hpp"
#include "background.hpp"
#include "debug_point.hpp"

namespace migrate {
namespace {

struct Statement {
    Oid role, relation;
    Oid referenced;  // by the foreign key that is to be validated
    char *sql;       // NULL: nothing is to be done
    char *tablespace;
};

char *text_of(int column, MemoryContext context) {
    char *value = SPI_getvalue(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, column);
    return value ? MemoryContextStrdup(context, value) : NULL;
}

Oid oid_of(int column) {
    bool isnull;
    return DatumGetObjectId(SPI_getbinval(SPI_tuptable->vals[0], SPI_tuptable->tupdesc, column, &isnull));
}

void ask(const char *job, Statement *statement, MemoryContext context) {
    const Oid types[] = {TEXTOID};
    const Datum values[] = {CStringGetTextDatum(job)};
    if (run_sql("SELECT s.role, s.relation, s.referenced, s.statement, s.tablespace"
                " FROM migrate._restore_statement($1::migrate._job) AS s",
                1, types, values) == 0)
        return;
    *statement = {oid_of(1), oid_of(2), oid_of(3), text_of(4, context), text_of(5, context)};
}

void note_done(const char *job) {
    const Oid types[] = {TEXTOID};
    const Datum values[] = {CStringGetTextDatum(job)};
    run_sql("SELECT migrate._restored($1::migrate._job)", 1, types, values);
}

// As a client's statement outside of a transaction block is run. What it is made of must outlive the transaction.
void run_top_level(Node *tree, const char *sql) {
    PlannedStmt *statement = makeNode(PlannedStmt);
    statement->commandType = CMD_UTILITY;
    statement->utilityStmt = tree;
    statement->stmt_len = (int)strlen(sql);
    PushActiveSnapshot(GetTransactionSnapshot());
    run_utility(statement, sql);
    if (ActiveSnapshotSet()) PopActiveSnapshot();  // of the last of its transactions
}

// The tables' locks, while there is no snapshot yet that vacuum would have to wait for. None of the application's
// writes waits for them; but who locks a table himself would queue behind whoever waits for one, or meet a deadlock. So
// they are not waited for long, and less than it takes others to look for a deadlock. (We look at once, for an
// autovacuum of the table gives way only to who has found it in his way.)
void take_locks(const Statement &s) {
    char look[16];
    snprintf(look, sizeof look, "%d", Max(1, polite_lock_timeout(100) / 2));
    const char *settings[][2] = {{"deadlock_timeout", look}, {"log_lock_waits", "off"}};
    for (auto &setting : settings)
        (void)set_config_option(setting[0], setting[1], PGC_SUSET, PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0, false);
    LockRelationOid(s.relation, ShareUpdateExclusiveLock);
    if (OidIsValid(s.referenced)) LockRelationOid(s.referenced, RowShareLock);
}

// Under a lock that is held until the statement has its own, so that what was parsed is what is built.
IndexStmt *parse_index(const Statement &s, IndexStmt *raw) {
    if (RangeVarGetRelid(raw->relation, NoLock, true) != s.relation)
        ereport(ERROR, (errcode(ERRCODE_LOCK_NOT_AVAILABLE),
                        errmsg("table with OID %u was renamed at this moment", s.relation)));
    raw->tableSpace = s.tablespace;
    PushActiveSnapshot(GetTransactionSnapshot());
    IndexStmt *parsed =
        with_user(s.role, SECURITY_RESTRICTED_OPERATION, [&] { return transformIndexStmt(s.relation, raw, s.sql); });
    PopActiveSnapshot();
    return parsed;
}

void run_statement(const Statement &s, MemoryContext context) {
    MemoryContextSwitchTo(context);
    take_locks(s);
    Node *tree = linitial_node(RawStmt, parse_sql(s.sql))->stmt;
    if (IsA(tree, AlterTableStmt)) {
        PushActiveSnapshot(GetTransactionSnapshot());
        with_user(s.role, SECURITY_RESTRICTED_OPERATION, [&] { with_spi([&] { run_sql(s.sql); }); });
        PopActiveSnapshot();
    } else {
        if (IsA(tree, IndexStmt)) {
            tree = (Node *)parse_index(s, (IndexStmt *)tree);
            DEBUG_POINT("restore: index parsed");
        }
        // From here on it waits as long as it takes: for old transactions, as CREATE INDEX CONCURRENTLY must.
        SetConfigOption("lock_timeout", "0", PGC_SUSET, PGC_S_SESSION);
        run_top_level(tree, s.sql);
    }
    DEBUG_POINT("restore: statement run");
}

ErrorData *run_as_owner(const Statement &s) {
    MemoryContext context = CurrentMemoryContext;
    Oid user;
    int sec_context;
    GetUserIdAndSecContext(&user, &sec_context);
    SetConfigOption("default_tablespace", "", PGC_SUSET, PGC_S_SESSION);
    SetUserIdAndSecContext(s.role, sec_context);
    auto step = [&s, context] { run_statement(s, context); };
    ErrorData *error = attempt(Undo::kTransaction, step);
    SetUserIdAndSecContext(user, sec_context);
    pin_lock_timeout();
    return error;
}

}  // namespace

ErrorData *run_restore(const char *job) {
    MemoryContext context = CurrentMemoryContext;
    Statement statement = {};
    auto look = [&] { as_extension_owner([&] { ask(job, &statement, context); }); };
    ErrorData *error = attempt(Undo::kTransaction, look);
    if (error == NULL && statement.sql) error = run_as_owner(statement);
    auto note = [&] { as_extension_owner([&] { note_done(job); }); };
    return error ? error : attempt(Undo::kTransaction, note);
}

}  // namespace migrate
