// Brackets around SPI, user identity, transactions and errors; kept plans. Instead of destructors: a PostgreSQL ERROR
// is a longjmp, so what a bracket must undo is undone by the server's own abort path, and the lambda must own nothing.
#pragma once
#include "compat.hpp"

#include <type_traits>

namespace migrate {

template <class T>
constexpr bool kSafeToSkip = std::is_void_v<T> || std::is_trivially_destructible_v<T>;

// Runs fn between SPI_connect and SPI_finish. What fn returns must not point into SPI's memory.
template <class Fn>
auto with_spi(Fn fn) -> decltype(fn()) {
    static_assert(kSafeToSkip<Fn> && kSafeToSkip<decltype(fn())>, "an error would skip a destructor");
    SPI_connect();
    if constexpr (std::is_void_v<decltype(fn())>) {
        fn();
        SPI_finish();
    } else {
        auto result = fn();
        SPI_finish();
        return result;
    }
}

struct Identity {
    Oid user;
    int sec_context;
    int guc_level;
};

// Become `user` with search_path and row_security pinned, so that no name of a lesser role's schema is found and no
// policy silently filters. Undone by leave_identity, or by the abort of the (sub)transaction.
Identity enter_identity(Oid user, int sec_flags);
void leave_identity(const Identity &identity);

// Within a with_user bracket: values leave as text in one form only, whatever the session has set, so that keys
// round-trip.
void pin_output_settings();
// Within a with_user bracket: plans by key must not fall to a sequential scan because the table was empty when planned.
void pin_planner_to_indexes();
// Nor may a plan for run_on_held_rows use an index-only scan, which cannot be had without an MVCC snapshot.
void pin_planner_to_heap();

// Runs fn as `user`; sec_flags are SECURITY_* flags added to those in force.
template <class Fn>
auto with_user(Oid user, int sec_flags, Fn fn) -> decltype(fn()) {
    static_assert(kSafeToSkip<Fn> && kSafeToSkip<decltype(fn())>, "an error would skip a destructor");
    const Identity saved = enter_identity(user, sec_flags);
    if constexpr (std::is_void_v<decltype(fn())>) {
        fn();
        leave_identity(saved);
    } else {
        auto result = fn();
        leave_identity(saved);
        return result;
    }
}

// The same without any setting: for what neither looks up a name nor reads a setting.
template <class Fn>
void with_bare_user(Oid user, int sec_flags, Fn fn) {
    static_assert(kSafeToSkip<Fn> && std::is_void_v<decltype(fn())>, "an error would skip a destructor");
    Oid saved_user;
    int saved_context;
    GetUserIdAndSecContext(&saved_user, &saved_context);
    SetUserIdAndSecContext(user, saved_context | sec_flags);
    fn();
    SetUserIdAndSecContext(saved_user, saved_context);
}

// How an error of the step is undone before it is given back.
enum class Undo { kSubtransaction, kTransaction };

using StepFn = void (*)(void *);

// Runs step(arg); returns NULL, or a copy of its error after undoing its work. The only PG_TRY of the project.
//   kSubtransaction: step runs in an internal subtransaction of the current transaction.
//   kTransaction:    step runs in a transaction of its own (none may be open), committed at its end. For workers.
// FATAL passes through. The copy is allocated in the caller's memory context.
ErrorData *attempt(Undo undo, StepFn step, void *arg);

template <class Fn>
ErrorData *attempt(Undo undo, Fn &fn) {
    static_assert(kSafeToSkip<Fn>, "an error would skip a destructor");
    return attempt(
        undo, [](void *arg) { (*static_cast<Fn *>(arg))(); }, &fn);
}

// The extension's owner (a superuser): owns migrate.* and is the role its own bookkeeping runs as.
Oid extension_owner();

Oid owner_of(Oid relation);

// Within a with_user bracket: what our own SQL means must not depend on the session's settings.
void pin_language();

template <class Fn>
auto with_extension_owner(Fn fn) -> decltype(fn()) {
    return with_user(extension_owner(), SECURITY_LOCAL_USERID_CHANGE, [&] {
        pin_language();
        return fn();
    });
}

// Runs fn in SPI as the extension's owner, in the current transaction of a worker.
template <class Fn>
void as_extension_owner(Fn fn) {
    PushActiveSnapshot(GetTransactionSnapshot());
    with_extension_owner([&] { with_spi(fn); });
    PopActiveSnapshot();
}

// Runs sql with the latest snapshot (as referential integrity triggers do), so that a REPEATABLE READ caller sees rows
// committed since its snapshot. Raises when SPI reports an error. Returns the number of rows processed; results are in
// SPI_tuptable. SPI must be connected.
uint64 run_latest(SPIPlanPtr plan, Datum *values, const char *nulls);

// As run_latest, for a plan that reads nothing but rows which this transaction has written or locked and nobody else
// can change: above READ COMMITTED it sees what is committed at the moment of each look (SnapshotSelf). Such reads take
// no predicate locks, so serializable transactions that write different rows do not conflict; and an ON CONFLICT that
// had to wait for the other writer of the row finds what that one left, where the latest snapshot would be older and
// give a serialization failure. On rows that others may change meanwhile such a look is not safe: it can miss a row
// that moves, or see it twice.
uint64 run_on_held_rows(SPIPlanPtr plan, Datum *values, const char *nulls);

// One-shot forms, by the ordinary snapshot rules, for use inside with_spi. `run_sql` raises unless the statement
// succeeds.
// read_only: in the snapshot of the query that calls, as a STABLE function reads.
uint64 run_sql(const char *sql, int nargs = 0, const Oid *types = nullptr, const Datum *values = nullptr,
               const char *nulls = nullptr, bool read_only = false);

// The same for a statement of ours that a worker runs at every turn: *plan, which is NULL at first, is kept for the
// life of the process, and made again by the server where what it rests on has changed.
uint64 run_kept(SPIPlanPtr *plan, const char *sql, int nargs, const Oid *types, const Datum *values);

}  // namespace migrate
