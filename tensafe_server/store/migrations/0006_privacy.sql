-- Differential privacy: what was released of each dataset, for ever; how often units were used; and
-- snapshots that are stored before the private step is committed after which they were made.

CREATE TABLE dp_ledger (
  tenant_id TEXT NOT NULL REFERENCES tenants (id),
  dataset_id TEXT NOT NULL,
  position INTEGER NOT NULL,     -- from 1, without gaps
  event TEXT NOT NULL,           -- reserve, commit, release or lose
  charge_id TEXT NOT NULL,
  run_id TEXT NOT NULL,
  operation_id TEXT NOT NULL,
  epoch INTEGER NOT NULL,        -- the assignment to a worker under which it may be used
  line TEXT NOT NULL,            -- JSON: which releases it is counted with
  uses INTEGER NOT NULL,         -- of this line, without the released ones, after this entry
  created_ns INTEGER NOT NULL,
  sha256 TEXT NOT NULL,          -- over this entry and that of the one before
  PRIMARY KEY (tenant_id, dataset_id, position)
) WITHOUT ROWID;
CREATE INDEX dp_ledger_by_line ON dp_ledger (tenant_id, dataset_id, line, position);
CREATE INDEX dp_ledger_by_operation ON dp_ledger (operation_id);
CREATE TRIGGER dp_ledger_is_never_changed BEFORE UPDATE ON dp_ledger
  BEGIN SELECT RAISE(ABORT, 'the privacy ledger is append-only'); END;
CREATE TRIGGER dp_ledger_is_never_cut BEFORE DELETE ON dp_ledger
  BEGIN SELECT RAISE(ABORT, 'the privacy ledger is append-only'); END;

CREATE TABLE dp_uses (           -- of runs whose units may be used a bounded number of times
  run_id TEXT NOT NULL,
  unit BLOB NOT NULL,            -- keyed hash
  uses INTEGER NOT NULL,         -- steps that it was in
  PRIMARY KEY (run_id, unit)
) WITHOUT ROWID;

ALTER TABLE snapshots ADD COLUMN charge_id TEXT;  -- set: none yet, until this charge is committed
ALTER TABLE runs ADD COLUMN released_seq INTEGER NOT NULL DEFAULT 0;  -- newest private step told

CREATE TABLE datasets (
  tenant_id TEXT NOT NULL REFERENCES tenants (id),
  id TEXT NOT NULL,              -- made of its content
  body BLOB NOT NULL,            -- proto Dataset
  created_ns INTEGER NOT NULL,
  deleted_ns INTEGER,            -- its files are gone, or about to go
  PRIMARY KEY (tenant_id, id)
) WITHOUT ROWID;

CREATE TABLE dataset_uploads (
  id TEXT PRIMARY KEY,
  tenant_id TEXT NOT NULL REFERENCES tenants (id),
  body BLOB NOT NULL,            -- proto BeginDatasetUploadRequest
  created_ns INTEGER NOT NULL,
  dataset_id TEXT                -- what it has become; NULL before
);
