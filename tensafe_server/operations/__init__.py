"""The life of an operation: intake, order within its run, dispatch, outcome, recovery."""
