"""The command line `tensafe`: one file for each group of commands.

Client commands need only what the bare install brings. `up`, `server` and `worker` come from the
packages that do the work and are imported when they are called.
"""
