from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class InvertRequest(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: InvertHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[InvertHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class InvertHeader(_message.Message):
    __slots__ = ("run", "epoch", "group", "version", "digest", "payload_bytes", "deadline_milliseconds", "fingerprint")
    RUN_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    GROUP_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_MILLISECONDS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    run: str
    epoch: int
    group: str
    version: int
    digest: str
    payload_bytes: int
    deadline_milliseconds: int
    fingerprint: str
    def __init__(self, run: _Optional[str] = ..., epoch: _Optional[int] = ..., group: _Optional[str] = ..., version: _Optional[int] = ..., digest: _Optional[str] = ..., payload_bytes: _Optional[int] = ..., deadline_milliseconds: _Optional[int] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class InvertResponse(_message.Message):
    __slots__ = ("header", "chunk")
    HEADER_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    header: InvertResultHeader
    chunk: bytes
    def __init__(self, header: _Optional[_Union[InvertResultHeader, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class InvertResultHeader(_message.Message):
    __slots__ = ("payload_bytes", "digest", "seconds", "owner_id")
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    OWNER_ID_FIELD_NUMBER: _ClassVar[int]
    payload_bytes: int
    digest: str
    seconds: float
    owner_id: str
    def __init__(self, payload_bytes: _Optional[int] = ..., digest: _Optional[str] = ..., seconds: _Optional[float] = ..., owner_id: _Optional[str] = ...) -> None: ...

class ListPeersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListPeersResponse(_message.Message):
    __slots__ = ("owners",)
    OWNERS_FIELD_NUMBER: _ClassVar[int]
    owners: _containers.RepeatedCompositeFieldContainer[Owner]
    def __init__(self, owners: _Optional[_Iterable[_Union[Owner, _Mapping]]] = ...) -> None: ...

class Owner(_message.Message):
    __slots__ = ("owner_id", "address", "fingerprint", "draining")
    OWNER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    owner_id: str
    address: str
    fingerprint: str
    draining: bool
    def __init__(self, owner_id: _Optional[str] = ..., address: _Optional[str] = ..., fingerprint: _Optional[str] = ..., draining: _Optional[bool] = ...) -> None: ...
