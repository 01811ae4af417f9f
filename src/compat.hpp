// Every difference between server versions, and nothing else.
#pragma once
#include "pg.hpp"

#if PG_VERSION_NUM < 130000 || PG_VERSION_NUM >= 190000
#error "migrate_ext is written for PostgreSQL 13 to 18"
#endif

namespace migrate {

// The raw parse trees of one SQL text.
inline List *parse_sql(const char *sql) {
#if PG_VERSION_NUM >= 140000
    return raw_parser(sql, RAW_PARSE_DEFAULT);
#else
    return raw_parser(sql);
#endif
}

inline Query *analyze_sql(RawStmt *statement, const char *sql) {
#if PG_VERSION_NUM >= 150000
    return parse_analyze_fixedparams(statement, sql, NULL, 0, NULL);
#else
    return parse_analyze(statement, sql, NULL, 0, NULL);
#endif
}

inline bool may_execute(Oid function, Oid role) {
#if PG_VERSION_NUM >= 160000
    return object_aclcheck(ProcedureRelationId, function, role, ACL_EXECUTE) == ACLCHECK_OK;
#else
    return pg_proc_aclcheck(function, role, ACL_EXECUTE) == ACLCHECK_OK;
#endif
}

// expression_tree_walker, whose C declarations leave out the walker's arguments until PostgreSQL 16.
template <class Context>
bool walk_expression(Node *node, bool (*walker)(Node *, Context *), Context *context) {
#if PG_VERSION_NUM >= 160000
    return expression_tree_walker_impl(node, reinterpret_cast<tree_walker_callback>(walker), context);
#else
    return expression_tree_walker(node, reinterpret_cast<bool (*)()>(reinterpret_cast<void *>(walker)), context);
#endif
}

// The PID of the backend that runs a virtual transaction; 0 when it is gone.
inline int pid_of(const VirtualTransactionId &vxid) {
#if PG_VERSION_NUM >= 170000
    PGPROC *proc = ProcNumberGetProc(vxid.procNumber);
#else
    PGPROC *proc = BackendIdGetProc(vxid.backendId);
#endif
    return proc ? proc->pid : 0;
}

// Transactions whose snapshots never reach the application's data: CREATE INDEX CONCURRENTLY passes over the same ones.
#ifdef PROC_IN_SAFE_IC
constexpr int kMaintenanceFlags = PROC_IS_AUTOVACUUM | PROC_IN_VACUUM | PROC_IN_SAFE_IC;
#else
constexpr int kMaintenanceFlags = PROC_IS_AUTOVACUUM | PROC_IN_VACUUM;
#endif

}  // namespace migrate
