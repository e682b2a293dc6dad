"""`python -m workers`: the same as `tensafe worker`."""

from workers.cli import worker

if __name__ == "__main__":
    worker(prog_name="tensafe worker")
