from kfdist.rpc._generated.kfdist.v1 import inversion_pb2 as _inversion_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class GroupSpec(_message.Message):
    __slots__ = ("name", "cost", "position")
    NAME_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    name: str
    cost: float
    position: int
    def __init__(self, name: _Optional[str] = ..., cost: _Optional[float] = ..., position: _Optional[int] = ...) -> None: ...

class RegisterWorkerRequest(_message.Message):
    __slots__ = ("run", "epoch", "worker_rank", "world_size", "groups", "fingerprint", "assignment", "pid", "process")
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    GROUPS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    worker_rank: int
    world_size: int
    groups: _containers.RepeatedCompositeFieldContainer[GroupSpec]
    fingerprint: str
    assignment: str
    pid: int
    process: str
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., worker_rank: _Optional[int] = ..., world_size: _Optional[int] = ..., groups: _Optional[_Iterable[_Union[GroupSpec, _Mapping]]] = ..., fingerprint: _Optional[str] = ..., assignment: _Optional[str] = ..., pid: _Optional[int] = ..., process: _Optional[str] = ...) -> None: ...

class RegisterWorkerResponse(_message.Message):
    __slots__ = ("settings",)
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    settings: RunSettings
    def __init__(self, settings: _Optional[_Union[RunSettings, _Mapping]] = ...) -> None: ...

class RegisterOwnerRequest(_message.Message):
    __slots__ = ("owner", "restarts", "pid")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    RESTARTS_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    owner: _inversion_pb2.Owner
    restarts: int
    pid: int
    def __init__(self, owner: _Optional[_Union[_inversion_pb2.Owner, _Mapping]] = ..., restarts: _Optional[int] = ..., pid: _Optional[int] = ...) -> None: ...

class RegisterOwnerResponse(_message.Message):
    __slots__ = ("owners",)
    OWNERS_FIELD_NUMBER: _ClassVar[int]
    owners: _containers.RepeatedCompositeFieldContainer[_inversion_pb2.Owner]
    def __init__(self, owners: _Optional[_Iterable[_Union[_inversion_pb2.Owner, _Mapping]]] = ...) -> None: ...

class HeartbeatRequest(_message.Message):
    __slots__ = ("worker", "owner", "samples")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    SAMPLES_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerBeat
    owner: OwnerBeat
    samples: _containers.RepeatedCompositeFieldContainer[Sample]
    def __init__(self, worker: _Optional[_Union[WorkerBeat, _Mapping]] = ..., owner: _Optional[_Union[OwnerBeat, _Mapping]] = ..., samples: _Optional[_Iterable[_Union[Sample, _Mapping]]] = ...) -> None: ...

class WorkerBeat(_message.Message):
    __slots__ = ("run", "epoch", "worker_rank", "step", "phase", "in_force", "inversion_seconds")
    class InversionSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    WORKER_RANK_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    IN_FORCE_FIELD_NUMBER: _ClassVar[int]
    INVERSION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    worker_rank: int
    step: int
    phase: str
    in_force: InForce
    inversion_seconds: _containers.ScalarMap[str, float]
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., worker_rank: _Optional[int] = ..., step: _Optional[int] = ..., phase: _Optional[str] = ..., in_force: _Optional[_Union[InForce, _Mapping]] = ..., inversion_seconds: _Optional[_Mapping[str, float]] = ...) -> None: ...

class OwnerBeat(_message.Message):
    __slots__ = ("owner_id", "address")
    OWNER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    owner_id: str
    address: str
    def __init__(self, owner_id: _Optional[str] = ..., address: _Optional[str] = ...) -> None: ...

class Sample(_message.Message):
    __slots__ = ("name", "labels", "value")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    name: str
    labels: _containers.ScalarMap[str, str]
    value: float
    def __init__(self, name: _Optional[str] = ..., labels: _Optional[_Mapping[str, str]] = ..., value: _Optional[float] = ...) -> None: ...

class HeartbeatResponse(_message.Message):
    __slots__ = ("settings", "owners", "assignment_revision")
    SETTINGS_FIELD_NUMBER: _ClassVar[int]
    OWNERS_FIELD_NUMBER: _ClassVar[int]
    ASSIGNMENT_REVISION_FIELD_NUMBER: _ClassVar[int]
    settings: RunSettings
    owners: _containers.RepeatedCompositeFieldContainer[_inversion_pb2.Owner]
    assignment_revision: int
    def __init__(self, settings: _Optional[_Union[RunSettings, _Mapping]] = ..., owners: _Optional[_Iterable[_Union[_inversion_pb2.Owner, _Mapping]]] = ..., assignment_revision: _Optional[int] = ...) -> None: ...

class RunSettings(_message.Message):
    __slots__ = ("revision", "desired", "checkpoint_serial", "damping", "kl_clip", "factor_period", "inverse_period", "adoption", "lag", "soft_bound", "hard_bound", "at_hard_bound", "as_configured", "refresh_serial", "refresh")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    DESIRED_FIELD_NUMBER: _ClassVar[int]
    CHECKPOINT_SERIAL_FIELD_NUMBER: _ClassVar[int]
    DAMPING_FIELD_NUMBER: _ClassVar[int]
    KL_CLIP_FIELD_NUMBER: _ClassVar[int]
    FACTOR_PERIOD_FIELD_NUMBER: _ClassVar[int]
    INVERSE_PERIOD_FIELD_NUMBER: _ClassVar[int]
    ADOPTION_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    SOFT_BOUND_FIELD_NUMBER: _ClassVar[int]
    HARD_BOUND_FIELD_NUMBER: _ClassVar[int]
    AT_HARD_BOUND_FIELD_NUMBER: _ClassVar[int]
    AS_CONFIGURED_FIELD_NUMBER: _ClassVar[int]
    REFRESH_SERIAL_FIELD_NUMBER: _ClassVar[int]
    REFRESH_FIELD_NUMBER: _ClassVar[int]
    revision: int
    desired: str
    checkpoint_serial: int
    damping: float
    kl_clip: float
    factor_period: int
    inverse_period: int
    adoption: str
    lag: int
    soft_bound: int
    hard_bound: int
    at_hard_bound: str
    as_configured: _containers.RepeatedScalarFieldContainer[str]
    refresh_serial: int
    refresh: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, revision: _Optional[int] = ..., desired: _Optional[str] = ..., checkpoint_serial: _Optional[int] = ..., damping: _Optional[float] = ..., kl_clip: _Optional[float] = ..., factor_period: _Optional[int] = ..., inverse_period: _Optional[int] = ..., adoption: _Optional[str] = ..., lag: _Optional[int] = ..., soft_bound: _Optional[int] = ..., hard_bound: _Optional[int] = ..., at_hard_bound: _Optional[str] = ..., as_configured: _Optional[_Iterable[str]] = ..., refresh_serial: _Optional[int] = ..., refresh: _Optional[_Iterable[str]] = ...) -> None: ...

class MethodSettings(_message.Message):
    __slots__ = ("damping", "kl_clip", "factor_period", "inverse_period", "adoption", "lag", "soft_bound", "hard_bound", "at_hard_bound")
    DAMPING_FIELD_NUMBER: _ClassVar[int]
    KL_CLIP_FIELD_NUMBER: _ClassVar[int]
    FACTOR_PERIOD_FIELD_NUMBER: _ClassVar[int]
    INVERSE_PERIOD_FIELD_NUMBER: _ClassVar[int]
    ADOPTION_FIELD_NUMBER: _ClassVar[int]
    LAG_FIELD_NUMBER: _ClassVar[int]
    SOFT_BOUND_FIELD_NUMBER: _ClassVar[int]
    HARD_BOUND_FIELD_NUMBER: _ClassVar[int]
    AT_HARD_BOUND_FIELD_NUMBER: _ClassVar[int]
    damping: float
    kl_clip: float
    factor_period: int
    inverse_period: int
    adoption: str
    lag: int
    soft_bound: int
    hard_bound: int
    at_hard_bound: str
    def __init__(self, damping: _Optional[float] = ..., kl_clip: _Optional[float] = ..., factor_period: _Optional[int] = ..., inverse_period: _Optional[int] = ..., adoption: _Optional[str] = ..., lag: _Optional[int] = ..., soft_bound: _Optional[int] = ..., hard_bound: _Optional[int] = ..., at_hard_bound: _Optional[str] = ...) -> None: ...

class InForce(_message.Message):
    __slots__ = ("values", "fixed", "job_periods", "late_damping", "obeyed", "changed")
    class FixedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    VALUES_FIELD_NUMBER: _ClassVar[int]
    FIXED_FIELD_NUMBER: _ClassVar[int]
    JOB_PERIODS_FIELD_NUMBER: _ClassVar[int]
    LATE_DAMPING_FIELD_NUMBER: _ClassVar[int]
    OBEYED_FIELD_NUMBER: _ClassVar[int]
    CHANGED_FIELD_NUMBER: _ClassVar[int]
    values: MethodSettings
    fixed: _containers.ScalarMap[str, str]
    job_periods: _containers.RepeatedScalarFieldContainer[int]
    late_damping: _containers.RepeatedScalarFieldContainer[str]
    obeyed: _containers.RepeatedCompositeFieldContainer[Obeyed]
    changed: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Union[MethodSettings, _Mapping]] = ..., fixed: _Optional[_Mapping[str, str]] = ..., job_periods: _Optional[_Iterable[int]] = ..., late_damping: _Optional[_Iterable[str]] = ..., obeyed: _Optional[_Iterable[_Union[Obeyed, _Mapping]]] = ..., changed: _Optional[_Iterable[str]] = ...) -> None: ...

class Obeyed(_message.Message):
    __slots__ = ("revision", "step", "refused")
    REVISION_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    revision: int
    step: int
    refused: str
    def __init__(self, revision: _Optional[int] = ..., step: _Optional[int] = ..., refused: _Optional[str] = ...) -> None: ...

class GetAssignmentRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class GetAssignmentResponse(_message.Message):
    __slots__ = ("revision", "owner_by_group", "owners")
    class OwnerByGroupEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    REVISION_FIELD_NUMBER: _ClassVar[int]
    OWNER_BY_GROUP_FIELD_NUMBER: _ClassVar[int]
    OWNERS_FIELD_NUMBER: _ClassVar[int]
    revision: int
    owner_by_group: _containers.ScalarMap[str, str]
    owners: _containers.RepeatedCompositeFieldContainer[_inversion_pb2.Owner]
    def __init__(self, revision: _Optional[int] = ..., owner_by_group: _Optional[_Mapping[str, str]] = ..., owners: _Optional[_Iterable[_Union[_inversion_pb2.Owner, _Mapping]]] = ...) -> None: ...

class DrainOwnerRequest(_message.Message):
    __slots__ = ("request_id", "owner_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    owner_id: str
    def __init__(self, request_id: _Optional[str] = ..., owner_id: _Optional[str] = ...) -> None: ...

class DrainOwnerResponse(_message.Message):
    __slots__ = ("owner",)
    OWNER_FIELD_NUMBER: _ClassVar[int]
    owner: _inversion_pb2.Owner
    def __init__(self, owner: _Optional[_Union[_inversion_pb2.Owner, _Mapping]] = ...) -> None: ...

class UndrainOwnerRequest(_message.Message):
    __slots__ = ("request_id", "owner_id")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    OWNER_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    owner_id: str
    def __init__(self, request_id: _Optional[str] = ..., owner_id: _Optional[str] = ...) -> None: ...

class UndrainOwnerResponse(_message.Message):
    __slots__ = ("owner",)
    OWNER_FIELD_NUMBER: _ClassVar[int]
    owner: _inversion_pb2.Owner
    def __init__(self, owner: _Optional[_Union[_inversion_pb2.Owner, _Mapping]] = ...) -> None: ...
