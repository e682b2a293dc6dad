"""The coordinator: accepts operations, makes them durable, dispatches them, pushes the outcomes.

Rooms, and which way they look: `api` → `operations` → `planning`; `operations` → `store`, `blobs`,
`events`; `fleet` → `operations`. Only `app` knows them all. Nothing here imports torch.
"""

import os

# Workers are started by exec, never by a bare fork, so gRPC's fork handlers only make noise.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "false")
