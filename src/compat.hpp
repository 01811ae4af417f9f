// Every difference between server versions, and nothing else.
#pragma once
#include "md5.hpp"
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

inline bool may_use_schema(Oid schema, Oid role) {
#if PG_VERSION_NUM >= 160000
    return object_aclcheck(NamespaceRelationId, schema, role, ACL_USAGE) == ACLCHECK_OK;
#else
    return pg_namespace_aclcheck(schema, role, ACL_USAGE) == ACLCHECK_OK;
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

// PostgreSQL 13 has no multiranges.
inline bool is_multirange(Oid type) {
#if PG_VERSION_NUM >= 140000
    return type_is_multirange(type);
#else
    return false;
#endif
}

// MD5 of a stream, by the server's own facility (which knows of FIPS mode) where there is one. A NULL, or a result
// below 0, is a failure.
#if PG_VERSION_NUM >= 140000
using Md5Stream = pg_cryptohash_ctx;
inline Md5Stream *md5_create(MemoryContext context) {
    MemoryContext caller = MemoryContextSwitchTo(context);
    Md5Stream *stream = pg_cryptohash_create(PG_MD5);
    MemoryContextSwitchTo(caller);
    return stream;
}
inline int md5_begin(Md5Stream *stream) {
    return pg_cryptohash_init(stream);
}
inline int md5_update(Md5Stream *stream, const uint8 *data, size_t length) {
    return pg_cryptohash_update(stream, data, length);
}
inline int md5_final(Md5Stream *stream, uint8 *digest) {
#if PG_VERSION_NUM >= 150000
    return pg_cryptohash_final(stream, digest, Md5::kDigest);
#else
    return pg_cryptohash_final(stream, digest);
#endif
}
inline void md5_free(Md5Stream *stream) {
    pg_cryptohash_free(stream);
}
#else
using Md5Stream = Md5;
inline Md5Stream *md5_create(MemoryContext context) {
    return static_cast<Md5Stream *>(MemoryContextAlloc(context, sizeof(Md5Stream)));
}
inline int md5_begin(Md5Stream *stream) {
    *stream = Md5();
    return 0;
}
inline int md5_update(Md5Stream *stream, const uint8 *data, size_t length) {
    stream->update(data, length);
    return 0;
}
inline int md5_final(Md5Stream *stream, uint8 *digest) {
    stream->final(digest);
    return 0;
}
inline void md5_free(Md5Stream *stream) {
    pfree(stream);
}
#endif

inline IndexScanDesc begin_index_scan(Relation table, Relation index, Snapshot snapshot, int nkeys) {
#if PG_VERSION_NUM >= 180000
    return index_beginscan(table, index, snapshot, NULL, nkeys, 0);
#else
    return index_beginscan(table, index, snapshot, nkeys, 0);
#endif
}

// The range table of an executor state whose only relation is a table that is written.
inline void init_range_table(EState *estate, Relation table) {
    RangeTblEntry *entry = makeNode(RangeTblEntry);
    entry->rtekind = RTE_RELATION;
    entry->relid = RelationGetRelid(table);
    entry->relkind = table->rd_rel->relkind;
    entry->rellockmode = RowExclusiveLock;
#if PG_VERSION_NUM >= 160000
    List *permissions = NIL;
    (void)addRTEPermissionInfo(&permissions, entry);
#if PG_VERSION_NUM >= 180000
    ExecInitRangeTable(estate, list_make1(entry), permissions, bms_make_singleton(1));
#else
    ExecInitRangeTable(estate, list_make1(entry), permissions);
#endif
#else
    ExecInitRangeTable(estate, list_make1(entry));
#endif
}

// Enters a row that was written into the indexes of its table. A conflict in one of the arbiters is told, not raised,
// and not waited for.
inline void insert_index_entries(ResultRelInfo *target, TupleTableSlot *row, EState *estate, bool *conflict,
                                 List *arbiters) {
#if PG_VERSION_NUM >= 160000
    list_free(ExecInsertIndexTuples(target, row, estate, false, true, conflict, arbiters, false));
#elif PG_VERSION_NUM >= 140000
    list_free(ExecInsertIndexTuples(target, row, estate, false, true, conflict, arbiters));
#else
    estate->es_result_relation_info = target;
    list_free(ExecInsertIndexTuples(row, estate, true, conflict, arbiters));
#endif
}

}  // namespace migrate
