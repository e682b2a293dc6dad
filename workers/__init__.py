"""TenSafe's worker: a process that holds base models and adapters and executes planned operations.

`link` speaks with the coordinator, `executor` runs one operation after another on a thread of its
own, and a `Backend` (`mock`, or `engine` for torch) does the work. Importing this package imports
no torch; the backend is chosen, and loaded, by the command line.
"""
