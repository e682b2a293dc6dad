-- What worker processes were at and have not told the end of: whatever takes one worker after the
-- other is found out, however often the coordinator starts anew.

CREATE TABLE attempts (
  subject TEXT NOT NULL,         -- id of an operation; or of a run, brought to the worker
  worker TEXT NOT NULL,          -- drawn when its process started
  running INTEGER NOT NULL,      -- 1: it had begun the operation; 0: that is not known
  PRIMARY KEY (subject, worker)
) WITHOUT ROWID;
