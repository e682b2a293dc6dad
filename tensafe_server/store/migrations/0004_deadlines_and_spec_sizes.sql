-- Operations know their deadline and the size of what they carry, without its bytes being read.

ALTER TABLE operations ADD COLUMN spec_bytes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE operations ADD COLUMN deadline_ns INTEGER;  -- if it has not started by then, it never runs
UPDATE operations SET spec_bytes = LENGTH(spec) WHERE spec IS NOT NULL AND state IN (1, 2);
