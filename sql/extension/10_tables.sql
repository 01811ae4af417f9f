-- State. It lives in logged tables, so that it survives a crash, a failover and a promotion.
-- Nobody but the extension's owner may touch these tables: a row here is code to run. Users see the views of 80_views.sql.
-- No foreign keys between tables that are dumped: pg_restore -j loads them in any order. _forget() (74_finalize.sql) deletes.

CREATE TABLE migrate._phase_move (
    from_phase text NOT NULL,
    to_phase   text NOT NULL,
    why        text NOT NULL,
    PRIMARY KEY (from_phase, to_phase)
);
COMMENT ON TABLE migrate._phase_move IS 'the legal moves between phases; _move() makes no other';
INSERT INTO migrate._phase_move VALUES
    ('planned',      'dual_writing', 'start'),
    ('dual_writing', 'backfilling',  'the upper bound of the work is known'),
    ('backfilling',  'validating',   'every range is copied and the re-queue is empty'),
    ('validating',   'shadowing',    'both sides are equal'),
    ('shadowing',    'ready',        'shadow reads agree, or none were asked for'),
    ('ready',        'validating',   'a gap in the dual writes was noticed'),
    ('shadowing',    'validating',   'a gap in the dual writes was noticed'),
    ('ready',        'cut_over',     'cutover'),
    ('cut_over',     'ready',        'rollback'),
    ('cut_over',     'finalized',    'finalize'),
    ('planned',      'cancelled',    'cancel'),
    ('dual_writing', 'cancelled',    'cancel'),
    ('backfilling',  'cancelled',    'cancel'),
    ('validating',   'cancelled',    'cancel'),
    ('shadowing',    'cancelled',    'cancel'),
    ('ready',        'cancelled',    'cancel');

CREATE TABLE migrate._migration (
    id             integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    name           text NOT NULL UNIQUE CHECK (name <> '' AND octet_length(name) <= 63),
    owner          regrole NOT NULL,
    phase          text NOT NULL DEFAULT 'planned' CHECK (phase IN ('planned', 'dual_writing', 'backfilling', 'validating',
                       'shadowing', 'ready', 'cut_over', 'finalized', 'cancelled')),
    phase_since    timestamptz NOT NULL DEFAULT now(),
    paused_since   timestamptz,
    paused_reason  text,
    failed_since   timestamptz,
    failed_reason  text,
    throttled_since  timestamptz,
    throttled_reason text,
    system_identifier bigint NOT NULL,
    database_oid   oid NOT NULL,
    started_at     timestamptz,
    backfilled_at  timestamptz,
    cut_over_at    timestamptz,
    both_directions boolean NOT NULL DEFAULT false,
    batch_rows     integer,
    CHECK ((paused_since IS NULL) = (paused_reason IS NULL)),
    CHECK ((failed_since IS NULL) = (failed_reason IS NULL))
);
COMMENT ON TABLE migrate._migration IS
    'one row a migration; phase is the only truth about which side serves: the target in cut_over and finalized, else the source';
COMMENT ON COLUMN migrate._migration.system_identifier IS 'where it runs: a clone has another identifier or database and comes up paused';
COMMENT ON COLUMN migrate._migration.both_directions IS 'reverse dual-write triggers exist too: from the first cutover until finalize';
COMMENT ON COLUMN migrate._migration.batch_rows IS 'the adaptive batch size the worker has reached';

CREATE TABLE migrate._option (
    migration integer NOT NULL,
    name      text NOT NULL,
    value     text NOT NULL,
    expires_at timestamptz,
    PRIMARY KEY (migration, name)
);
COMMENT ON COLUMN migrate._option.expires_at IS 'a throttle set by throttle(… , for_time) ends by itself then';

CREATE TABLE migrate._flow (
    id        integer PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    migration integer NOT NULL,
    name      text NOT NULL,
    source    regclass NOT NULL,
    target    regclass NOT NULL,
    mapping   text,
    filter    text,
    reverse   text,
    on_target_delete text CHECK (on_target_delete IN ('delete', 'keep')),
    not_carried text[] NOT NULL DEFAULT '{}',
    reverse_gaps text[] NOT NULL DEFAULT '{}',
    fingerprint text,
    empty_at_start boolean NOT NULL DEFAULT false,
    by_place boolean NOT NULL DEFAULT false,
    copied_file oid,
    UNIQUE (migration, name)
);
COMMENT ON TABLE migrate._flow IS 'one source to one target; the texts are what the user gave, kept to recognize the same definition again: what runs is the view of _mapping';
COMMENT ON COLUMN migrate._flow.not_carried IS 'source columns that no target column is computed from';
COMMENT ON COLUMN migrate._flow.reverse_gaps IS 'why writes to the target cannot (wholly) be carried back, one sentence each';
COMMENT ON COLUMN migrate._flow.fingerprint IS '_fingerprint() as it was when the dual writes were last known to be without a gap';
COMMENT ON COLUMN migrate._flow.empty_at_start IS 'the target had no row at all when the migration was started';
COMMENT ON COLUMN migrate._flow.by_place IS 'the backfill reads the source in the order of place: chosen by start, and until the backfill has ended every UPDATE is carried over';
COMMENT ON COLUMN migrate._flow.copied_file IS 'by_place: the file of the source (pg_relation_filenode) that its ranges are of; NULL: its places are not to be relied on';

-- A flow has a mapping in the direction 'forward' (origin = source, dest = target) and, where one can be had, in the direction
-- 'reverse' (origin = target, dest = source). The primitive of src/flow.cpp knows nothing but this row.
-- The arrays key_* are aligned: one element for each column of dest's key index, in its order. (The index itself is not kept: a
-- restored dump has the rows here before it has its indexes.)
CREATE TABLE migrate._mapping (
    flow       integer NOT NULL,
    direction  text NOT NULL CHECK (direction IN ('forward', 'reverse')),
    view       regclass NOT NULL,
    origin     regclass NOT NULL,
    dest       regclass NOT NULL,
    columns    int2[] NOT NULL,
    reads      int2[] NOT NULL,
    key_dest   int2[] NOT NULL,
    key_view   int2[] NOT NULL,
    key_origin int2[] NOT NULL,
    key_const  text[] NOT NULL,
    filtered   boolean NOT NULL,
    plain      boolean NOT NULL,
    PRIMARY KEY (flow, direction)
);
COMMENT ON TABLE migrate._mapping IS 'the mapping view of a flow in one direction, and how its columns lie on origin and dest';
COMMENT ON COLUMN migrate._mapping.columns IS 'attribute number in dest of each column of the view';
COMMENT ON COLUMN migrate._mapping.reads IS 'attribute numbers of origin that the view reads; {0}: all (a whole-row reference)';
COMMENT ON COLUMN migrate._mapping.plain IS 'every column is a bare column or a constant: no expression that could raise an error';
COMMENT ON COLUMN migrate._mapping.key_view IS 'position in the view of each key column';
COMMENT ON COLUMN migrate._mapping.key_origin IS 'attribute number in origin of each key column that is mapped bare; 0 where it is a constant';
COMMENT ON COLUMN migrate._mapping.key_const IS 'the constant (as text of dest''s type) of each key column that is one, else NULL';

CREATE TABLE migrate._view (
    migration integer NOT NULL,
    flow      integer NOT NULL,
    view      regclass NOT NULL,
    shape     text NOT NULL CHECK (shape IN ('target', 'source')),
    created   boolean NOT NULL,
    aside     text,
    use       text NOT NULL DEFAULT 'both' CHECK (use IN ('both', 'read')),
    percent   numeric,
    predicate text,
    routed_since timestamptz,
    routed_by text,
    PRIMARY KEY (migration, view),
    CHECK (num_nonnulls(percent, predicate) = CASE use WHEN 'read' THEN 1 ELSE 0 END)
);
COMMENT ON TABLE migrate._view IS 'views that cutover switches (add_view)';
COMMENT ON COLUMN migrate._view.use IS 'read: a view that cannot be written through, whose reads route() moves by and by';
COMMENT ON COLUMN migrate._view.percent IS 'use read: so many in a hundred keys are read from the target; or predicate: those it is true for';
COMMENT ON COLUMN migrate._view.aside IS 'shape source: the name under which the source table steps aside';

-- Definitions are kept in pieces, between which the present names of the tables are put: tables may be renamed meanwhile (add_view
-- does so itself). The pieces are as PostgreSQL printed them, never a user's text, and run as the table's owner.
CREATE TABLE migrate._deferred (
    flow       integer NOT NULL,
    ordinal    integer NOT NULL,
    kind       text NOT NULL CHECK (kind IN ('index', 'foreign_key')),
    name       text NOT NULL,
    referenced regclass,
    head       text NOT NULL DEFAULT '',
    tail       text NOT NULL,
    tablespace text,
    statistics integer[],
    comment    text,
    relation   regclass,
    state      text NOT NULL DEFAULT 'aside' CHECK (state IN ('aside', 'building', 'added', 'validating', 'restored', 'given_up')),
    why        text,
    PRIMARY KEY (flow, ordinal)
);
COMMENT ON TABLE migrate._deferred IS 'indexes and foreign keys of a target that start set aside for the copy; foreign keys that a swap has added NOT VALID';
COMMENT ON COLUMN migrate._deferred.relation IS 'of a swap: the table that has the foreign key; NULL: the flow''s target';
COMMENT ON COLUMN migrate._deferred.head IS 'foreign_key: FOREIGN KEY (columns)';
COMMENT ON COLUMN migrate._deferred.tail IS 'index: what follows the name of the table; foreign_key: what follows the name of the referenced table';
COMMENT ON COLUMN migrate._deferred.statistics IS 'statistics target of each column of an index, NULL where it has the default';
COMMENT ON COLUMN migrate._deferred.state IS
    'aside, building: the index is not there; added, validating: the foreign key is NOT VALID yet; given_up: it cannot be restored, why tells';

-- What a swap did, so that rollback does it the other way. The pieces are as in _deferred: between them comes the present name of
-- `relation`. By names, never OIDs of what a restored dump does not have yet.
CREATE TABLE migrate._swapped (
    migration  integer NOT NULL,
    ordinal    integer NOT NULL,
    flow       integer NOT NULL,
    kind       text NOT NULL,
    object     text NOT NULL,
    relation   regclass,
    role       regrole NOT NULL,
    inverse    text[],
    validates  boolean NOT NULL DEFAULT false,
    PRIMARY KEY (migration, ordinal)
);
COMMENT ON TABLE migrate._swapped IS 'while a target has its source''s name: what the swap changed, in its order';
COMMENT ON COLUMN migrate._swapped.inverse IS 'the statement that undoes it; NULL: something else takes it away';
COMMENT ON COLUMN migrate._swapped.validates IS 'the foreign key was valid before the swap, and is to be so after the rollback';

CREATE TABLE migrate._range (
    flow       integer NOT NULL,
    ordinal    integer NOT NULL,
    low        text[],
    high       text[],
    checkpoint text[],
    done       boolean NOT NULL DEFAULT false,
    rows_done  bigint NOT NULL DEFAULT 0,
    row_limit  integer,
    not_before timestamptz,
    PRIMARY KEY (flow, ordinal)
);
COMMENT ON TABLE migrate._range IS 'the backfill''s ledger: key ranges (low, high], which together cover the source''s key space without a gap; where the flow is by_place, ranges of places, ''{"(block,offset)"}'', which cover what the table had when they were made';
COMMENT ON COLUMN migrate._range.checkpoint IS 'every key (or place) of the range up to and including this one is copied, re-queued or in _failure';
COMMENT ON COLUMN migrate._range.row_limit IS 'a failed batch is being halved: the next batch takes at most so many rows';

CREATE TABLE migrate._requeue (
    flow integer NOT NULL,
    key  text[] NOT NULL,
    at   timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON migrate._requeue (flow, at);
ALTER TABLE migrate._requeue REPLICA IDENTITY FULL;  -- for publications of all tables, as of every table here without a primary key
COMMENT ON TABLE migrate._requeue IS 'keys that a batch skipped because the application held their row lock';

-- Append-only for writers: no unique key, for a conflict here would be a new error in the application's transaction.
CREATE TABLE migrate._failure (
    id         bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    flow       integer NOT NULL,
    direction  text NOT NULL,
    key        text[] NOT NULL,
    sqlstate   text NOT NULL,
    object     text,
    origin     text NOT NULL,
    attempts   integer NOT NULL DEFAULT 1,
    first_at   timestamptz NOT NULL DEFAULT now(),
    retry_at   timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON migrate._failure (flow, direction);
CREATE INDEX ON migrate._failure (retry_at);
COMMENT ON TABLE migrate._failure IS 'keys whose dual write or copy could not be applied; key and SQLSTATE only, never the row';
COMMENT ON COLUMN migrate._failure.object IS 'the constraint or column that refused it, where the error names one';
COMMENT ON COLUMN migrate._failure.origin IS 'dual_write or backfill';

-- Append-only for writers, too.
CREATE TABLE migrate._gap (
    flow integer NOT NULL,
    at   timestamptz NOT NULL DEFAULT now()
);
ALTER TABLE migrate._gap REPLICA IDENTITY FULL;
COMMENT ON TABLE migrate._gap IS 'dual writes met what they could not carry, or a partition that has been made since they were armed and may be gone before anybody looks: until they are armed again the flow has a gap';

CREATE TABLE migrate._watch (
    migration integer PRIMARY KEY REFERENCES migrate._migration ON DELETE CASCADE,
    since     timestamptz NOT NULL DEFAULT clock_timestamp(),
    caller    regrole NOT NULL,
    looked_at timestamptz,
    last_failure bigint NOT NULL,
    mended    bigint NOT NULL DEFAULT 0,
    transactions bigint,
    aborts    bigint,
    mean_before double precision,
    calls     bigint,
    ms        double precision,
    latency   numeric,
    latency_at timestamptz,
    passed    text[] NOT NULL DEFAULT '{}',
    why       text,
    tries     integer NOT NULL DEFAULT 0,
    retry_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    refused   text,
    shows     text
);
COMMENT ON TABLE migrate._watch IS 'one row while a migration is watched after its cutover, see 56_watch.sql';
COMMENT ON COLUMN migrate._watch.caller IS 'who cut over, and as whom it is rolled back';
COMMENT ON COLUMN migrate._watch.last_failure IS 'failures with a greater id came after the switch; mended: how many keys of them are applied by now';
COMMENT ON COLUMN migrate._watch.transactions IS 'counters of the database at the first look, or since they were reset last; so are aborts, calls and ms';
COMMENT ON COLUMN migrate._watch.mean_before IS 'mean time of a statement on the tables and views before the switch, in ms';
COMMENT ON COLUMN migrate._watch.passed IS 'the limits that were passed, each told once; why: the first, which a rollback is for';

CREATE TABLE migrate._event (
    id        bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY,
    at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    migration integer NOT NULL,
    name      text NOT NULL,
    owner     regrole NOT NULL,
    by        text NOT NULL,
    kind      text NOT NULL,
    from_phase text,
    to_phase  text,
    why       text
);
CREATE INDEX ON migrate._event (migration, id);
COMMENT ON TABLE migrate._event IS 'append-only: who, when, from, to, why; kept after drop()';
