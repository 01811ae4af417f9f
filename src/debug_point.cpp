// Not compiled but for test builds: see the Makefile and debug_point.hpp.
#include "debug_point.hpp"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

MIGRATE_FUNCTION(migrate_debug_point)

namespace migrate {
namespace {

constexpr uint32 kWaitKey = 7104;
constexpr long kWaitMicroseconds = 10000;
constexpr char kKilled[] = "migrate_debug_point";

enum class Action { kNone, kError, kKill, kWait };

struct Point {
    char text[200];  // the setting it was read from
    char name[100];
    Action action;
    int sqlerrcode;
    int arrival;
};

char *setting = NULL;
Point wanted;
int arrivals = 0;

// Cuts the last word off and returns it; the text itself where it is the only one.
char *last_word(char *text) {
    char *space = strrchr(text, ' ');
    if (space == NULL) return text;
    *space = '\0';
    return space + 1;
}

// 'NAME ACTION [N]'; '' is no point. False where it is neither.
bool parse(const char *text, Point *point) {
    memset(point, 0, sizeof *point);
    if (text == NULL || *text == '\0') return true;
    strlcpy(point->text, text, sizeof point->text);
    char rest[sizeof point->text];
    strlcpy(rest, text, sizeof rest);
    char *word = last_word(rest);
    point->arrival = 1;
    if (*word >= '0' && *word <= '9') {
        point->arrival = atoi(word);
        word = last_word(rest);
    }
    point->sqlerrcode = ERRCODE_INTERNAL_ERROR;
    if (strcmp(word, "kill") == 0)
        point->action = Action::kKill;
    else if (strcmp(word, "wait") == 0)
        point->action = Action::kWait;
    else if (strcmp(word, "error") == 0)
        point->action = Action::kError;
    else if (strncmp(word, "error=", 6) == 0 && strlen(word) == 11) {
        point->action = Action::kError;
        point->sqlerrcode = MAKE_SQLSTATE(word[6], word[7], word[8], word[9], word[10]);
    }
    strlcpy(point->name, rest, sizeof point->name);
    return point->action != Action::kNone && word != rest && point->arrival > 0 && strlen(text) < sizeof point->name;
}

bool check_setting(char **value, void **, GucSource) {
    Point ignored;
    return parse(*value, &ignored);
}

// A reload that leaves the setting as it was does not begin to count anew.
void assign_setting(const char *value, void *) {
    if (strcmp(value ? value : "", wanted.text) == 0) return;
    (void)parse(value, &wanted);
    arrivals = 0;
}

// True once, until the file is removed.
bool claim_kill() {
    const int file = open(kKilled, O_CREAT | O_EXCL | O_WRONLY, 0600);
    if (file >= 0) close(file);
    return file >= 0;
}

void wait_for_release() {
    LOCKTAG tag;
    SET_LOCKTAG_ADVISORY(tag, MyDatabaseId, 0, kWaitKey, 1);
    pgstat_report_wait_start(PG_WAIT_EXTENSION);
    while (LockAcquire(&tag, ShareLock, true, true) == LOCKACQUIRE_NOT_AVAIL) {
        CHECK_FOR_INTERRUPTS();
        pg_usleep(kWaitMicroseconds);
    }
    pgstat_report_wait_end();
    LockRelease(&tag, ShareLock, true);
}

// The log has it before the process dies.
void tell(const char *name, const char *action) {
    ereport(LOG, (errmsg("debug point \"%s\": %s", name, action), errhidestmt(true), errhidecontext(true)));
}

// Of a transaction that wrote: after everything else that a commit does first, and when it is committed but its client
// not told yet (an error there would be a PANIC).
void at_commit(XactEvent event, void *) {
    if (!TransactionIdIsValid(GetTopTransactionIdIfAny())) return;
    if (event == XACT_EVENT_PRE_COMMIT) DEBUG_POINT("transaction: before commit");
    if (event == XACT_EVENT_COMMIT) DEBUG_POINT("transaction: committed");
}

}  // namespace

void init_debug_points() {
    DefineCustomStringVariable("migrate.debug_point", "What happens at one debug point.", "NAME ACTION [N]", &setting,
                               "", PGC_USERSET, 0, check_setting, assign_setting, NULL);
    // The callback that was registered first is called last.
    RegisterXactCallback(at_commit, NULL);
}

void reach_debug_point(const char *name) {
    if (wanted.action == Action::kNone || strcmp(name, wanted.name) != 0 || ++arrivals != wanted.arrival) return;
    switch (wanted.action) {
        case Action::kKill:
            if (!claim_kill()) return;
            tell(name, "kill");
            kill(MyProcPid, SIGKILL);
            pause();
            return;
        case Action::kWait:
            tell(name, "wait");
            wait_for_release();
            tell(name, "released");
            return;
        default:
            tell(name, "error");
            ereport(ERROR, (errcode(wanted.sqlerrcode), errmsg("error at debug point \"%s\"", name)));
    }
}

}  // namespace migrate

using namespace migrate;

// migrate._debug_point(name text) RETURNS void
Datum migrate_debug_point(PG_FUNCTION_ARGS) {
    reach_debug_point(text_to_cstring(PG_GETARG_TEXT_PP(0)));
    PG_RETURN_VOID();
}
