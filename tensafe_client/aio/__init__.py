"""The asyncio twins: the same names, awaited.

async with AsyncServiceClient() as client:
    tc = await client.create_training_client({"model_ref": "smollm2-135m"})
    async for batch in batches:
        tc.forward_backward(batch)
        print(await tc.optim_step())
"""

from tensafe_client.aio.admin import AsyncAdmin
from tensafe_client.aio.service import AsyncServiceClient
from tensafe_client.aio.training import AsyncTrainingClient

__all__ = ["AsyncAdmin", "AsyncServiceClient", "AsyncTrainingClient"]
