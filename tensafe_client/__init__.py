"""The TenSafe SDK: fine-tune LoRA adapters on a service from your own training loop.

from tensafe_client import ServiceClient

client = ServiceClient()
tc = client.create_training_client({"model_ref": "smollm2-135m"})
for batch in dataloader:
    loss = tc.forward_backward(batch)
    step = tc.optim_step()
    print(step.result().step, loss.result().loss)
print(tc.sample("Once upon a time").samples[0].completion)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tensafe_client.admin import Admin
    from tensafe_client.aio import AsyncAdmin, AsyncServiceClient, AsyncTrainingClient
    from tensafe_client.config import LoRAConfig, OptimizerConfig, TrainingConfig
    from tensafe_client.connection import ClientConfig
    from tensafe_client.custom_loss import Logprobs
    from tensafe_client.data.datum import Datum
    from tensafe_client.data.loader import DataLoader
    from tensafe_client.dp_config import DPConfig
    from tensafe_client.dp_metrics import DPMetrics
    from tensafe_client.errors import (
        ArtifactExpiredError,
        ArtifactInUseError,
        ArtifactMismatchError,
        ArtifactNotFoundError,
        AuthenticationError,
        BatchError,
        ChecksumMismatchError,
        ClientClosedError,
        ConfigError,
        ConflictError,
        ConnectionFailedError,
        ContextExceededError,
        DatasetInUseError,
        DatasetNotFoundError,
        DeadlineExceededError,
        DPBudgetExceededError,
        DPStepLostError,
        EmptyWindowError,
        InvalidArgumentError,
        InvalidDatasetError,
        MaxStepsReachedError,
        MessageTooLargeError,
        MissingExtraError,
        MixedReductionError,
        ModelNotFoundError,
        NameTakenError,
        NoChatTemplateError,
        NonFiniteGradientError,
        NonFiniteLossError,
        NotFoundError,
        OperationCancelledError,
        OperationLostError,
        OperationNotFoundError,
        OperationTimeoutError,
        OutOfMemoryError,
        OutOfRangeError,
        PermissionDeniedError,
        PreconditionError,
        QueueFullError,
        RequestTimeoutError,
        ResourceExhaustedError,
        RunDeletedError,
        RunNotFoundError,
        SampleDivergedError,
        SequenceConflictError,
        SequenceGapError,
        ServerError,
        StorageFullError,
        TenSafeError,
        TokenOutOfRangeError,
        UnknownTargetModuleError,
        UnsupportedOptionError,
        VersionNotSavedError,
        WindowPoisonedError,
    )
    from tensafe_client.futures import OperationFuture
    from tensafe_client.infos import (
        AdapterShape,
        ArtifactFile,
        ArtifactInfo,
        KeyInfo,
        ModelInfo,
        NewKey,
        OperationInfo,
        RunInfo,
        RunSummary,
        StorageInfo,
        TenantInfo,
        VerifyReport,
    )
    from tensafe_client.losses import LossInfo
    from tensafe_client.privacy_report import DatasetInfo, LedgerLine, PrivacyReport
    from tensafe_client.profiles import Profile, read_profiles, save_profile
    from tensafe_client.results import (
        ForwardBackwardResult,
        ForwardResult,
        LoadStateResult,
        OptimStepResult,
        SaveStateResult,
        StepMetrics,
    )
    from tensafe_client.samples import Sample, SampleChunk, SampleResult
    from tensafe_client.schedules import Schedule, constant, cosine, linear
    from tensafe_client.service import ServiceClient
    from tensafe_client.token_streams import AsyncSampleStream, SampleStream
    from tensafe_client.training import TrainingClient

__all__ = [
    "AdapterShape",
    "Admin",
    "ArtifactExpiredError",
    "ArtifactFile",
    "ArtifactInUseError",
    "ArtifactInfo",
    "ArtifactMismatchError",
    "ArtifactNotFoundError",
    "AsyncAdmin",
    "AsyncSampleStream",
    "AsyncServiceClient",
    "AsyncTrainingClient",
    "AuthenticationError",
    "BatchError",
    "ChecksumMismatchError",
    "ClientClosedError",
    "ClientConfig",
    "ConfigError",
    "ConflictError",
    "ConnectionFailedError",
    "ContextExceededError",
    "DPBudgetExceededError",
    "DPConfig",
    "DPMetrics",
    "DPStepLostError",
    "DataLoader",
    "DatasetInUseError",
    "DatasetInfo",
    "DatasetNotFoundError",
    "Datum",
    "DeadlineExceededError",
    "EmptyWindowError",
    "ForwardBackwardResult",
    "ForwardResult",
    "InvalidArgumentError",
    "InvalidDatasetError",
    "KeyInfo",
    "LedgerLine",
    "LoRAConfig",
    "LoadStateResult",
    "Logprobs",
    "LossInfo",
    "MaxStepsReachedError",
    "MessageTooLargeError",
    "MissingExtraError",
    "MixedReductionError",
    "ModelInfo",
    "ModelNotFoundError",
    "NameTakenError",
    "NewKey",
    "NoChatTemplateError",
    "NonFiniteGradientError",
    "NonFiniteLossError",
    "NotFoundError",
    "OperationCancelledError",
    "OperationFuture",
    "OperationInfo",
    "OperationLostError",
    "OperationNotFoundError",
    "OperationTimeoutError",
    "OptimStepResult",
    "OptimizerConfig",
    "OutOfMemoryError",
    "OutOfRangeError",
    "PermissionDeniedError",
    "PreconditionError",
    "PrivacyReport",
    "Profile",
    "QueueFullError",
    "RequestTimeoutError",
    "ResourceExhaustedError",
    "RunDeletedError",
    "RunInfo",
    "RunNotFoundError",
    "RunSummary",
    "Sample",
    "SampleChunk",
    "SampleDivergedError",
    "SampleResult",
    "SampleStream",
    "SaveStateResult",
    "Schedule",
    "SequenceConflictError",
    "SequenceGapError",
    "ServerError",
    "ServiceClient",
    "StepMetrics",
    "StorageFullError",
    "StorageInfo",
    "TenSafeError",
    "TenantInfo",
    "TokenOutOfRangeError",
    "TrainingClient",
    "TrainingConfig",
    "UnknownTargetModuleError",
    "UnsupportedOptionError",
    "VerifyReport",
    "VersionNotSavedError",
    "WindowPoisonedError",
    "constant",
    "cosine",
    "linear",
    "read_profiles",
    "save_profile",
]

# Where each name is; the …Errors are in `errors`. They are imported when they are first used (PEP
# 562), so that the command line, which lives below this package, minds its signals from the first
# moment on.
_MODULES = {
    "admin": "Admin",
    "aio": "AsyncAdmin AsyncServiceClient AsyncTrainingClient",
    "config": "LoRAConfig OptimizerConfig TrainingConfig",
    "connection": "ClientConfig",
    "custom_loss": "Logprobs",
    "data.datum": "Datum",
    "data.loader": "DataLoader",
    "dp_config": "DPConfig",
    "dp_metrics": "DPMetrics",
    "futures": "OperationFuture",
    "infos": "AdapterShape ArtifactFile ArtifactInfo KeyInfo ModelInfo NewKey OperationInfo "
    "RunInfo RunSummary StorageInfo TenantInfo VerifyReport",
    "losses": "LossInfo",
    "privacy_report": "DatasetInfo LedgerLine PrivacyReport",
    "profiles": "Profile read_profiles save_profile",
    "results": "ForwardBackwardResult ForwardResult LoadStateResult OptimStepResult "
    "SaveStateResult StepMetrics",
    "samples": "Sample SampleChunk SampleResult",
    "schedules": "Schedule constant cosine linear",
    "service": "ServiceClient",
    "token_streams": "AsyncSampleStream SampleStream",
    "training": "TrainingClient",
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _HOMES.get(name, "errors")
    value = getattr(import_module(f"{__name__}.{module}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
