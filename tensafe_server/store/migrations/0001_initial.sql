-- Times are nanoseconds since 1970; protos are serialized messages of tensafe.v1.

CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

CREATE TABLE tenants (
  id TEXT PRIMARY KEY,
  name TEXT NOT NULL UNIQUE,
  created_ns INTEGER NOT NULL
);

CREATE TABLE keys (
  id TEXT PRIMARY KEY,
  secret_sha256 BLOB NOT NULL UNIQUE,
  kind INTEGER NOT NULL,
  tenant_id TEXT REFERENCES tenants (id),
  name TEXT NOT NULL,
  created_ns INTEGER NOT NULL,
  revoked_ns INTEGER
);

CREATE TABLE runs (
  id TEXT PRIMARY KEY,
  tenant_id TEXT NOT NULL REFERENCES tenants (id),
  model TEXT NOT NULL,           -- registered name
  config BLOB NOT NULL,          -- proto RunConfig
  status INTEGER NOT NULL,       -- proto RunStatus
  step INTEGER NOT NULL,
  epoch INTEGER NOT NULL,        -- number of the newest assignment to a worker
  base_artifact_id TEXT,         -- newest full artifact: where a replay begins
  base_seq INTEGER NOT NULL,     -- the seq after which that artifact was saved
  created_ns INTEGER NOT NULL
);
CREATE INDEX runs_by_tenant ON runs (tenant_id, created_ns);

CREATE TABLE operations (
  id TEXT PRIMARY KEY,
  tenant_id TEXT NOT NULL,
  run_id TEXT,
  seq INTEGER,
  request_id TEXT,
  session_id TEXT NOT NULL,
  kind INTEGER NOT NULL,         -- proto OperationKind
  state INTEGER NOT NULL,        -- proto OperationState
  executed INTEGER NOT NULL,     -- 1 if a worker ran it; 0 if refused, cancelled or pending
  spec_hash BLOB NOT NULL,
  spec BLOB,                     -- proto OperationSpec, or in the blob store
  spec_ref TEXT,
  artifact_id TEXT,              -- made by SAVE_STATE, read by LOAD_STATE and SAMPLE
  result BLOB,                   -- proto OperationResult, or in the blob store
  result_ref TEXT,
  error BLOB,                    -- proto google.rpc.Status
  cost REAL NOT NULL,
  created_ns INTEGER NOT NULL,
  finished_ns INTEGER,
  queue_ms REAL,
  compute_ms REAL,
  cursor INTEGER                 -- position among events; set when finished
);
CREATE UNIQUE INDEX operations_by_seq ON operations (run_id, seq) WHERE seq IS NOT NULL;
CREATE UNIQUE INDEX operations_by_request ON operations (tenant_id, request_id)
  WHERE request_id IS NOT NULL;
CREATE INDEX operations_by_cursor ON operations (tenant_id, cursor) WHERE cursor IS NOT NULL;
CREATE INDEX operations_unfinished ON operations (state) WHERE state IN (1, 2);

CREATE TABLE metrics (
  cursor INTEGER PRIMARY KEY,
  tenant_id TEXT NOT NULL,
  run_id TEXT NOT NULL,
  body BLOB NOT NULL             -- proto StepMetrics
);
CREATE INDEX metrics_by_run ON metrics (run_id, cursor);
CREATE INDEX metrics_by_tenant ON metrics (tenant_id, cursor);

CREATE TABLE artifacts (
  id TEXT PRIMARY KEY,
  tenant_id TEXT NOT NULL,
  run_id TEXT NOT NULL,
  step INTEGER NOT NULL,
  body BLOB NOT NULL,            -- proto Artifact
  created_ns INTEGER NOT NULL
);
CREATE INDEX artifacts_by_tenant ON artifacts (tenant_id, created_ns);
CREATE INDEX artifacts_by_run ON artifacts (run_id, step);

CREATE TABLE models (name TEXT PRIMARY KEY, body BLOB NOT NULL);  -- proto Model

CREATE TABLE requests (          -- idempotency of mutations that are not operations
  scope TEXT NOT NULL,           -- tenant id, or `admin`
  request_id TEXT NOT NULL,
  request_hash BLOB NOT NULL,
  subject TEXT NOT NULL,         -- id of what the first call made
  PRIMARY KEY (scope, request_id)
) WITHOUT ROWID;
