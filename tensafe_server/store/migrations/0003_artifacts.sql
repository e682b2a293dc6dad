-- Artifacts that end, and adapters on their way in.

ALTER TABLE artifacts ADD COLUMN expires_ns INTEGER;  -- NULL: kept until deleted
ALTER TABLE artifacts ADD COLUMN deleted_ns INTEGER;  -- when it was deleted or had expired
ALTER TABLE artifacts ADD COLUMN removed_ns INTEGER;  -- when its files were gone
CREATE INDEX artifacts_by_expiry ON artifacts (expires_ns)
  WHERE expires_ns IS NOT NULL AND deleted_ns IS NULL;
CREATE INDEX artifacts_to_remove ON artifacts (id)
  WHERE deleted_ns IS NOT NULL AND removed_ns IS NULL;
CREATE INDEX operations_by_artifact ON operations (artifact_id) WHERE artifact_id IS NOT NULL;

CREATE TABLE uploads (
  id TEXT PRIMARY KEY,
  tenant_id TEXT NOT NULL REFERENCES tenants (id),
  artifact_id TEXT NOT NULL,     -- what it becomes
  body BLOB NOT NULL,            -- proto BeginUploadRequest
  created_ns INTEGER NOT NULL,
  finished INTEGER NOT NULL      -- 1 once the artifact is there
);
CREATE INDEX uploads_open ON uploads (tenant_id, created_ns) WHERE NOT finished;
