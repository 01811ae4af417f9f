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

// Runs a utility statement as one that a client has sent by itself.
inline void run_utility(PlannedStmt *statement, const char *sql) {
#if PG_VERSION_NUM >= 140000
    ProcessUtility(statement, sql, false, PROCESS_UTILITY_TOPLEVEL, NULL, NULL, None_Receiver, NULL);
#else
    ProcessUtility(statement, sql, PROCESS_UTILITY_TOPLEVEL, NULL, NULL, None_Receiver, NULL);
#endif
}

inline bool may_execute(Oid function, Oid role) {
#if PG_VERSION_NUM >= 160000
    return object_aclcheck(ProcedureRelationId, function, role, ACL_EXECUTE) == ACLCHECK_OK;
#else
    return pg_proc_aclcheck(function, role, ACL_EXECUTE) == ACLCHECK_OK;
#endif
}

// ---- rights that a plan asks for

inline bool has_table_rights(Oid relation, Oid role, AclMode rights) {
    return pg_class_aclmask(relation, role, rights, ACLMASK_ALL) == rights;
}

// Lets the query itself, not what is in it, read the chosen views with this role's rights.
template <class Chosen>
void read_with_rights_of(Oid role, Query *query, Chosen is_chosen) {
    ListCell *cell;
#if PG_VERSION_NUM >= 160000
    foreach (cell, query->rteperminfos) {
        RTEPermissionInfo *checked = (RTEPermissionInfo *)lfirst(cell);
#else
    foreach (cell, query->rtable) {
        RangeTblEntry *checked = (RangeTblEntry *)lfirst(cell);
#endif
        if (is_chosen(checked->relid)) checked->checkAsUser = role;
    }
}

// ---- the executor's routines that write rows

#if PG_VERSION_NUM >= 160000
using IndexUpdate = TU_UpdateIndexes;
inline bool writes_indexes(IndexUpdate update) {
    return update != TU_None;
}
inline bool only_summarizing_indexes(IndexUpdate update) {
    return update == TU_Summarizing;
}
#else
using IndexUpdate = bool;
inline bool writes_indexes(IndexUpdate update) {
    return update;
}
inline bool only_summarizing_indexes(IndexUpdate) {
    return false;
}
#endif

// The relation as the only one that the executor's state writes to, with the columns (as a query's updatedCols) that an
// update of its rows assigns. In the memory context of the state.
inline ResultRelInfo *open_result_relation(EState *estate, Relation relation, Bitmapset *updated) {
    RangeTblEntry *entry = makeNode(RangeTblEntry);
    entry->rtekind = RTE_RELATION;
    entry->relid = RelationGetRelid(relation);
    entry->relkind = relation->rd_rel->relkind;
    entry->rellockmode = RowExclusiveLock;
#if PG_VERSION_NUM >= 160000
    List *permissions = NIL;
    addRTEPermissionInfo(&permissions, entry)->updatedCols = updated;
#if PG_VERSION_NUM >= 180000
    ExecInitRangeTable(estate, list_make1(entry), permissions, bms_make_singleton(1));
#else
    ExecInitRangeTable(estate, list_make1(entry), permissions);
#endif
#else
    entry->updatedCols = updated;
    ExecInitRangeTable(estate, list_make1(entry));
#endif
    ResultRelInfo *result = makeNode(ResultRelInfo);
    InitResultRelInfo(result, relation, 1, NULL, 0);
#if PG_VERSION_NUM >= 140000
    estate->es_opened_result_relations = lappend(estate->es_opened_result_relations, result);
#else
    estate->es_result_relations = result;
    estate->es_num_result_relations = 1;
    estate->es_result_relation_info = result;
#endif
    return result;
}

// Its indexes, where they have been opened, and what its triggers have opened.
inline void close_result_relation(EState *estate, ResultRelInfo *relation) {
#if PG_VERSION_NUM >= 140000
    ExecCloseResultRelations(estate);
#else
    ExecCloseIndices(relation);
    ExecCleanUpTriggerState(estate);
#endif
}

// conflict: not NULL where a conflict on one of `arbiters` (NIL: on any index) is to be told instead of raised or
// waited for.
inline List *insert_index_entries(EState *estate, ResultRelInfo *relation, TupleTableSlot *row, bool update,
                                  bool *conflict, List *arbiters, bool only_summarizing) {
#if PG_VERSION_NUM >= 160000
    return ExecInsertIndexTuples(relation, row, estate, update, conflict != NULL, conflict, arbiters, only_summarizing);
#elif PG_VERSION_NUM >= 140000
    return ExecInsertIndexTuples(relation, row, estate, update, conflict != NULL, conflict, arbiters);
#else
    return ExecInsertIndexTuples(row, estate, conflict != NULL, conflict, arbiters);
#endif
}

inline void after_row_update(EState *estate, ResultRelInfo *relation, ItemPointer old_row, TupleTableSlot *new_row,
                             List *recheck) {
#if PG_VERSION_NUM >= 150000
    ExecARUpdateTriggers(estate, relation, NULL, NULL, old_row, NULL, new_row, recheck, NULL, false);
#else
    ExecARUpdateTriggers(estate, relation, old_row, NULL, new_row, recheck, NULL);
#endif
}

inline void after_row_delete(EState *estate, ResultRelInfo *relation, ItemPointer old_row) {
#if PG_VERSION_NUM >= 150000
    ExecARDeleteTriggers(estate, relation, old_row, NULL, NULL, false);
#else
    ExecARDeleteTriggers(estate, relation, old_row, NULL, NULL);
#endif
}

inline IndexScanDesc begin_index_scan(Relation table, Relation index, Snapshot snapshot, int nkeys) {
#if PG_VERSION_NUM >= 180000
    return index_beginscan(table, index, snapshot, NULL, nkeys, 0);
#else
    return index_beginscan(table, index, snapshot, nkeys, 0);
#endif
}

inline bool may_use_schema(Oid schema, Oid role) {
#if PG_VERSION_NUM >= 160000
    return object_aclcheck(NamespaceRelationId, schema, role, ACL_USAGE) == ACLCHECK_OK;
#else
    return pg_namespace_aclcheck(schema, role, ACL_USAGE) == ACLCHECK_OK;
#endif
}

// The number of the relation's file; another one once it has been written anew.
inline Oid file_of(Relation relation) {
#if PG_VERSION_NUM >= 160000
    return relation->rd_locator.relNumber;
#else
    return relation->rd_node.relNode;
#endif
}

// Whether no row has NULL in the column; since PostgreSQL 18 NOT NULL may be in force for new rows only.
inline bool never_null(TupleDesc desc, int column) {
#if PG_VERSION_NUM >= 180000
    return TupleDescCompactAttr(desc, column)->attnullability == ATTNULLABLE_VALID;
#else
    return TupleDescAttr(desc, column)->attnotnull;
#endif
}

// expression_tree_walker and query_tree_walker, whose C declarations leave out the walker's arguments until PostgreSQL
// 16. The context is the walker's alone, const or not.
template <class Context>
bool walk_expression(Node *node, bool (*walker)(Node *, Context *), Context *context) {
    void *passed = const_cast<void *>(static_cast<const void *>(context));
#if PG_VERSION_NUM >= 160000
    return expression_tree_walker_impl(node, reinterpret_cast<tree_walker_callback>(walker), passed);
#else
    return expression_tree_walker(node, reinterpret_cast<bool (*)()>(reinterpret_cast<void *>(walker)), passed);
#endif
}

template <class Context>
bool walk_query(Query *query, bool (*walker)(Node *, Context *), Context *context) {
    void *passed = const_cast<void *>(static_cast<const void *>(context));
#if PG_VERSION_NUM >= 160000
    return query_tree_walker_impl(query, reinterpret_cast<tree_walker_callback>(walker), passed, 0);
#else
    return query_tree_walker(query, reinterpret_cast<bool (*)()>(reinterpret_cast<void *>(walker)), passed, 0);
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

}  // namespace migrate
