/* The protocol by which no row is lost, comes back or stays stale, for Spin (https://spinroot.com). Run by test/model/check:
   with every safeguard below no interleaving breaks what must hold; without any one of them Spin finds one that does.

   What must hold, at every commit from `start` on, for each of two keys (check): the target's row equals the source's; or the key is
   queued; or it lies beyond the backfill's checkpoint and is absent. When the target begins to serve the sides are equal, and nobody
   can still read it with a snapshot from which they were not (dba).

   What is modelled: T1 and T2 transactions of two writers, each at READ COMMITTED or REPEATABLE READ (its snapshot taken any time
   before it writes), that upsert, delete, move a key or swap two, and commit or roll back; on the source, and once the target has
   served on either side. A worker that copies batches of one or two keys, queues what it had to skip and applies it later, and may be
   killed, or give a lock up, at any step. A reader with an old snapshot. Any number of cutovers and rollbacks.
   What is not: failures (best_effort), TRUNCATE, several workers, what PostgreSQL itself sees to (locks, snapshots, atomic commit).

   Safeguard        In the code                                                         Mutant (src/mutant.hpp)
   ROW_LOCK         a batch copies what it has locked FOR SHARE SKIP LOCKED:
                    copy_sql in src/backfill.cpp                                        no_row_lock
   KEY_LOCK         so do the re-queue, retries and repair, key by key:
                    upsert_locked in src/backfill.cpp                                   no_key_lock
   REQUEUE          what a batch skipped is queued: _run_copy in 54_jobs.sql            no_requeue
   ATOMIC           rows, queue and checkpoint are one transaction: _run_copy
   LATEST           dual writes see the target as it is, not as it was when the
                    application's transaction began: run_latest in src/spi.cpp          no_latest_snapshot
   STATE            dual writes follow the source's rows, not the events:
                    delete_missing and insert_from in src/flow_sql.cpp                  event_not_state
   OLD_KEYS         a key that a row has lost is looked at again, for another row
                    may have it: touch_old_key in src/dual_write.cpp                    new_key_only
   START_LOCK       triggers are made when no transaction that writes is open:
                    CREATE TRIGGER's own lock, in _create_triggers (45_dual_write.sql)
   TRIGGERS_FIRST   the backfill begins when they are committed: phase dual_writing,
                    _make_ranges in 53_ranges.sql
   BARRIER          cutover waits for snapshots older than its call:
                    migrate_old_snapshots in src/cutover.cpp, 73_cutover.sql            no_barrier
   TURN_ROUND       reverse triggers are made in the transaction that makes the
                    target serve: _switch_sides in 73_cutover.sql

   With P2 the batch is that of src/bulk_copy.cpp, which locks no row of the source, beside the dual writes of src/direct_row.cpp.
   In ROW_LOCK's place:
   SECOND_READ      what the batch has written it compares with the source as
                    it is then: read_again in src/bulk_slice.cpp                        no_refetch
   DIRTY            a dual write that has nothing to delete has looked for rows
                    that are not committed: find_target in src/direct_row.cpp           direct_mvcc_lookup

   Process writer is the application with the triggers of src/dual_write.cpp; worker is src/worker.cpp with _run_copy and _run_requeue;
   dba is start, cutover and rollback; a lock is what PostgreSQL does to a row (or, for a key that is absent, to its index entry). */

#define S 0
#define T 2
#define NOBODY 0
#define WORKER 3

mtype:op = { put, del, move, swap };
byte row[4];            /* committed: row[S + key] and row[T + key]; 0: absent */
byte lock[4];           /* whose uncommitted version (or FOR UPDATE lock) is there */
bool share[2];          /* the worker holds FOR SHARE on the row of the source */
byte checkpoint;        /* keys below it are copied: _range.checkpoint */
bool queued[2];         /* _requeue */
bool armed;             /* the forward triggers are there */
bool back;              /* the reverse triggers are there */
bool flipped;           /* the target serves */
bool old_reader;        /* somebody has a snapshot from which the sides differ */
bool awaited;           /* the switch waits for it */
byte snapshot[3];       /* of each writer at REPEATABLE READ: bit 4: taken; bits 0-3: the rows committed by others since */

#define bit(r) (1 << (r))
#define all_copied (checkpoint == 2 && !queued[0] && !queued[1])
#define equal(k) (row[S + k] == row[T + k])
#define in_progress (lock[0] || lock[1] || lock[2] || lock[3])
#define free_for(me, r) ((lock[r] == NOBODY || lock[r] == me) && !((r) < 2 && share[(r) % 2]))

inline check() {
    assert(!armed || equal(0) || queued[0] || (checkpoint <= 0 && row[T] == 0));
    assert(!armed || equal(1) || queued[1] || (checkpoint <= 1 && row[T + 1] == 0))
}

/* Old snapshots see the rows of this commit as changed by somebody else. */
inline note_commit(rows) {
    if :: me != 1 && (snapshot[1] & 16) -> snapshot[1] = snapshot[1] | (rows) :: else fi;
    if :: me != 2 && (snapshot[2] & 16) -> snapshot[2] = snapshot[2] | (rows) :: else fi
}

/* One row locked; or the end of the transaction, as the victim of a deadlock or a timeout, or, in an old snapshot,
   because somebody else has committed the row since. */
inline lock_origin(r) {
    if
    :: free_for(me, r) && !(snapshot[me] & bit(r)) -> lock[r] = me
    :: else -> goto undo
    fi
}

/* The statement's rows locked and changed, before its triggers run. */
inline change() {
    lock_origin(origin + k);
    if :: what == swap || what == move -> lock_origin(origin + j) :: else fi;
    carried = (origin == S -> armed : back);
    old = row[origin + k];
    if
    :: what != put && old == 0 || what == move && row[origin + j] != 0 || what == swap && row[origin + j] == 0 -> goto undo
    :: else
    fi;
    if
    :: what == put -> new[origin + k] = 2 + 4 * me + left
    :: what == swap -> new[origin + k] = row[origin + j]
    :: else
    fi;
    wrote = bit(origin + k);
    if :: what == swap || what == move -> new[origin + j] = old; wrote = wrote | bit(origin + j) :: else fi
}

/* The dual write of one key: removed where value is 0, else upserted. A DELETE does not wait for a row it cannot see. */
#ifdef DIRTY
#define unseen(k) (lock[dest + k] == NOBODY && row[dest + k] == 0)
#else
#define unseen(k) (lock[dest + k] != me && (row[dest + k] == 0 || stale && !(seen & (1 + k))))
#endif
inline carry(k, value) {
    if
    :: atomic { !carried || value == 0 && unseen(k) }
    :: atomic { else ->
           if
           :: free_for(me, dest + k) && !(stale && (snapshot[me] & bit(dest + k))) ->
               lock[dest + k] = me; new[dest + k] = value; wrote = wrote | bit(dest + k)
           :: else -> goto undo
           fi }
    fi
}

proctype writer(byte me; byte left) {
    byte origin, dest, k, j, old;
    byte new[4];
    byte wrote, seen;
    bool carried, stale;
    mtype:op what;
    do
    :: atomic { left > 0 ->
           if :: origin = S :: flipped || back -> origin = T fi;
           dest = 2 - origin;
           if :: k = 0 :: k = 1 fi;
           j = 1 - k;
           if :: what = put :: what = del :: what = move :: k == 0 -> what = swap fi;
           if
           :: change(); goto changed
           :: snapshot[me] = 16;
#ifndef LATEST
              stale = true;
              seen = (row[dest] != 0) + 2 * (row[dest + 1] != 0)
#endif
           fi }
       atomic { true -> change() }
changed:
       carry(k, new[origin + k]);
       if
       :: what == move -> carry(j, new[origin + j])
       :: what == swap ->
#ifndef STATE
           if :: old = 0 :: skip fi;
#endif
#ifndef OLD_KEYS
           if :: old = row[origin + j] :: skip fi;
#endif
           carry(j, old)
       :: else
       fi;
       if
       :: d_step {
              if :: wrote & 1 -> row[0] = new[0] :: else fi;
              if :: wrote & 2 -> row[1] = new[1] :: else fi;
              if :: wrote & 4 -> row[2] = new[2] :: else fi;
              if :: wrote & 8 -> row[3] = new[3] :: else fi;
              note_commit(wrote);
              left--;
              check()
          }
       :: skip                                     /* rolled back */
       fi;
undo:  atomic {
           if :: lock[0] == me -> lock[0] = NOBODY :: else fi;
           if :: lock[1] == me -> lock[1] = NOBODY :: else fi;
           if :: lock[2] == me -> lock[2] = NOBODY :: else fi;
           if :: lock[3] == me -> lock[3] = NOBODY :: else fi;
           new[0] = 0; new[1] = 0; new[2] = 0; new[3] = 0; old = 0; wrote = 0; stale = false; seen = 0; snapshot[me] = 0;
           carried = false; origin = 0; dest = 0; k = 0; j = 0; what = put
       }
    :: left == 0 -> break
    od
}

/* The backfill's worker: batches, and the keys they skipped. */
proctype worker(byte me) {
    byte end, k;
    byte value[2];
    bool there[2], got[2], skipped[2];
#ifdef P2
    bool same[2];
#endif
    do
    /* a batch: its snapshot */
    :: atomic {
#ifdef TRIGGERS_FIRST
           armed &&
#endif
           checkpoint < 2 ->
           if :: end = checkpoint + 1 :: checkpoint == 0 -> end = 2 fi;
           there[0] = row[S] != 0 && checkpoint == 0;
           there[1] = row[S + 1] != 0 && end == 2;
           value[0] = row[S];
           value[1] = row[S + 1];
           k = checkpoint
       }
#ifndef ATOMIC
       if :: checkpoint = end :: skip fi;
#endif
#ifdef P2
       /* its writes, which wait for nobody; its second look at the source; its commit, which ends the locks */
       do
       :: atomic { k < end ->
              if
              :: !there[k]
              :: there[k] && lock[T + k] == NOBODY && row[T + k] == 0 -> lock[T + k] = WORKER; got[k] = true
              :: there[k] && lock[T + k] == NOBODY && row[T + k] == value[k] -> same[k] = true
              :: there[k] && (lock[T + k] != NOBODY || row[T + k] != 0 && row[T + k] != value[k]) -> skipped[k] = true
              fi;
              k++ }
       :: k == end -> break
       od;
#ifdef SECOND_READ
       k = 0;
       do
       :: atomic { k < end ->
              if
              :: (got[k] || same[k]) && (lock[S + k] != NOBODY || row[S + k] != value[k]) -> got[k] = false; skipped[k] = true
              :: else
              fi;
              k++ }
       :: k == end -> break
       od;
#endif
#else
       /* its locks in the order of the keys, its writes, its commit */
       do
       :: atomic { k < end ->
              if
              :: !there[k]
#ifdef ROW_LOCK
              :: there[k] && (lock[S + k] != NOBODY || row[S + k] == 0) -> skipped[k] = true
              :: there[k] && lock[S + k] == NOBODY && row[S + k] != 0 -> share[k] = true; value[k] = row[S + k]; got[k] = true
#else
              :: there[k] -> got[k] = true
#endif
              fi;
              k++ }
       :: k == end -> break
       od;
       k = 0;
       do
       :: atomic { k < 2 && !got[k] -> k++ }
       :: atomic { k < 2 && got[k] && lock[T + k] == NOBODY -> lock[T + k] = WORKER; k++ }
       :: k < 2 && got[k] && lock[T + k] != NOBODY -> goto undo
       :: k == 2 -> break
       od;
#endif
       if
       :: d_step {
              if :: got[0] -> row[T] = value[0] :: else fi;
              if :: got[1] -> row[T + 1] = value[1] :: else fi;
#ifdef REQUEUE
              queued[0] = queued[0] || skipped[0];
              queued[1] = queued[1] || skipped[1];
#endif
              checkpoint = end;
              note_commit(got[0] * bit(T) + got[1] * bit(T + 1));
              check()
          }
       :: skip
       fi;
       goto undo
    /* a queued key */
    :: atomic { armed && (queued[0] || queued[1]) ->
           if :: queued[0] -> k = 0 :: queued[1] -> k = 1 fi;
           there[0] = row[S + k] != 0 }
       /* lock_keys: the source's row, then the target's */
       if
       :: atomic { there[0] && (lock[S + k] != NOBODY || row[S + k] == 0) -> goto undo }
       :: atomic { there[0] && lock[S + k] == NOBODY && row[S + k] != 0 -> share[k] = true }
       :: !there[0]
       fi;
       if
       :: atomic { row[T + k] == 0 -> skip }
       :: atomic { row[T + k] != 0 && lock[T + k] == NOBODY -> lock[T + k] = WORKER }
       :: atomic { row[T + k] != 0 && lock[T + k] != NOBODY -> goto undo }
       fi;
       /* upsert_locked: the read, then the write (a row of the target that is not written goes: remove_keys) */
#ifdef KEY_LOCK
       if
       :: atomic { row[S + k] == 0 -> value[0] = 0 }
       :: atomic { row[S + k] != 0 && lock[S + k] == NOBODY -> share[k] = true; value[0] = row[S + k] }
       :: atomic { row[S + k] != 0 && lock[S + k] != NOBODY -> goto undo }
       fi;
#else
       value[0] = row[S + k];
#endif
       if
       :: atomic { value[0] == 0 -> skip }
       :: atomic { value[0] != 0 && (lock[T + k] == NOBODY || lock[T + k] == WORKER) -> lock[T + k] = WORKER }
       :: atomic { value[0] != 0 && lock[T + k] != NOBODY && lock[T + k] != WORKER -> goto undo }
       fi;
       if
       :: d_step {
              if
              :: lock[T + k] == WORKER -> row[T + k] = value[0]; note_commit(bit(T + k))
              :: else
              fi;
              queued[k] = false;
              check()
          }
       :: skip
       fi;
undo:  atomic {
           share[0] = false; share[1] = false; got[0] = false; got[1] = false; skipped[0] = false; skipped[1] = false;
#ifdef P2
           same[0] = false; same[1] = false;
#endif
           there[0] = false; there[1] = false; value[0] = 0; value[1] = 0; end = 0; k = 0;
           if :: lock[T] == WORKER -> lock[T] = NOBODY :: else fi;
           if :: lock[T + 1] == WORKER -> lock[T + 1] = NOBODY :: else fi
       }
    od
}

/* Who keeps a snapshot from which the sides differ, and may read the side that serves at any time. */
proctype reader() {
    do
    :: d_step { !old_reader && !all_copied && !(equal(0) && equal(1)) -> old_reader = true }
    :: d_step { old_reader -> old_reader = false; awaited = false }
    od
}

proctype dba() {
    atomic {
#ifdef START_LOCK
        !in_progress ->
#endif
        armed = true; check() };
    do
    :: atomic { !flipped && all_copied -> skip };
       /* the call, gates passed: its barrier waits for who has a snapshot now */
       awaited = old_reader;
       atomic {
#ifdef BARRIER
           !awaited &&
#endif
           all_copied && !in_progress ->
           flipped = true;
#ifdef TURN_ROUND
           back = true;
#endif
           assert(!old_reader);
           assert(equal(0) && equal(1))
       }
#ifndef TURN_ROUND
       back = true;
#endif
    :: atomic { flipped && !in_progress -> flipped = false }
    od
}

init { atomic { row[S] = 1; row[S+1] = 2; run writer(1, T1); run writer(2, T2); run worker(WORKER); run reader(); run dba() } }
