-- Recovery points of runs, what has been pruned, and what replays have shown.

CREATE TABLE snapshots (
  id TEXT PRIMARY KEY,
  run_id TEXT NOT NULL REFERENCES runs (id),
  epoch INTEGER NOT NULL,        -- the assignment under which it was made
  seq INTEGER NOT NULL,          -- the last operation whose effect it holds
  step INTEGER NOT NULL,
  size_bytes INTEGER NOT NULL,
  sha256 TEXT NOT NULL,          -- of its manifest, which has those of its files
  created_ns INTEGER NOT NULL
);
CREATE INDEX snapshots_by_run ON snapshots (run_id, seq);

ALTER TABLE runs ADD COLUMN pruned_seq INTEGER NOT NULL DEFAULT 0;  -- no specs up to here
ALTER TABLE runs ADD COLUMN replay_mismatches INTEGER NOT NULL DEFAULT 0;

-- Digest of the fingerprint of the worker that ran it.
ALTER TABLE operations ADD COLUMN fingerprint TEXT;
-- 1 if the big parts of its result are gone.
ALTER TABLE operations ADD COLUMN result_pruned INTEGER NOT NULL DEFAULT 0;
-- FORWARD, FORWARD_BACKWARD and SAMPLE have results with big parts.
CREATE INDEX operations_with_results ON operations (finished_ns)
  WHERE result_pruned = 0 AND kind IN (1, 2, 4);
