-- Where each privacy ledger ends, written with each entry: entries that are gone from its end are
-- missed. And an entry is not replaced either, which fires no trigger on deletion.

CREATE TABLE dp_heads (
  tenant_id TEXT NOT NULL REFERENCES tenants (id),
  dataset_id TEXT NOT NULL,
  position INTEGER NOT NULL,     -- of the newest entry
  sha256 TEXT NOT NULL,          -- of the newest entry
  PRIMARY KEY (tenant_id, dataset_id)
) WITHOUT ROWID;
INSERT INTO dp_heads
  SELECT tenant_id, dataset_id, position, sha256 FROM dp_ledger newest
  WHERE position = (SELECT max(position) FROM dp_ledger
    WHERE tenant_id = newest.tenant_id AND dataset_id = newest.dataset_id);

CREATE TRIGGER dp_ledger_is_never_replaced BEFORE INSERT ON dp_ledger
  WHEN EXISTS (SELECT 1 FROM dp_ledger
    WHERE tenant_id = NEW.tenant_id AND dataset_id = NEW.dataset_id AND position >= NEW.position)
  BEGIN SELECT RAISE(ABORT, 'the privacy ledger is append-only'); END;
