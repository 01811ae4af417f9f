-- Waits for the phase, and until a worker has validated what a switch has added.
CREATE PROCEDURE worked(goal text, migration text DEFAULT 'm') LANGUAGE plpgsql AS $$
BEGIN
    FOR i IN 1 .. 3000 LOOP
        IF EXISTS (SELECT FROM migrate._migration m WHERE m.name = migration AND m.phase = goal AND NOT migrate._is_restoring(m.id)) THEN
            RETURN;
        END IF;
        COMMIT;
        PERFORM pg_sleep(0.02);
        COMMIT;
    END LOOP;
    RAISE EXCEPTION 'not in phase % with foreign keys validated', goal;
END $$;
