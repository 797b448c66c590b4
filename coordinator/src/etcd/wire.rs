//! The part of etcd's API (v3, gRPC) that a coordinator uses; names and numbers are those of etcd's `rpc.proto`
//! and `kv.proto`. What is not used is left out, as protobuf permits.

use prost::{Message, Oneof};

/// A key and what it has.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct KeyValue {
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    /// Of the transaction that made it; 0 if it does not exist.
    #[prost(int64, tag = "2")]
    pub create_revision: i64,
    #[prost(bytes = "vec", tag = "5")]
    pub value: Vec<u8>,
    #[prost(int64, tag = "6")]
    pub lease: i64,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct ResponseHeader {
    #[prost(uint64, tag = "2")]
    pub member_id: u64,
    #[prost(int64, tag = "3")]
    pub revision: i64,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct RangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    /// Empty for the one key.
    #[prost(bytes = "vec", tag = "2")]
    pub range_end: Vec<u8>,
    #[prost(int64, tag = "3")]
    pub limit: i64,
    #[prost(bool, tag = "8")]
    pub keys_only: bool,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct RangeResponse {
    #[prost(message, repeated, tag = "2")]
    pub kvs: Vec<KeyValue>,
    #[prost(bool, tag = "3")]
    pub more: bool,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct PutRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub value: Vec<u8>,
    #[prost(int64, tag = "3")]
    pub lease: i64,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct DeleteRangeRequest {
    #[prost(bytes = "vec", tag = "1")]
    pub key: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub range_end: Vec<u8>,
}

/// That a key has this (`Compare.CompareResult.EQUAL`, the default).
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Compare {
    /// [`CREATE`] or [`VALUE`].
    #[prost(int32, tag = "2")]
    pub target: i32,
    #[prost(bytes = "vec", tag = "3")]
    pub key: Vec<u8>,
    #[prost(oneof = "Expected", tags = "5, 7")]
    pub expected: Option<Expected>,
}

/// `Compare.CompareTarget`.
pub const CREATE: i32 = 1;
pub const VALUE: i32 = 3;

#[derive(Clone, PartialEq, Eq, Oneof)]
pub enum Expected {
    #[prost(int64, tag = "5")]
    CreateRevision(i64),
    #[prost(bytes = "vec", tag = "7")]
    Value(Vec<u8>),
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct RequestOp {
    #[prost(oneof = "Request", tags = "1, 2, 3")]
    pub request: Option<Request>,
}

#[derive(Clone, PartialEq, Eq, Oneof)]
pub enum Request {
    #[prost(message, tag = "1")]
    Range(RangeRequest),
    #[prost(message, tag = "2")]
    Put(PutRequest),
    #[prost(message, tag = "3")]
    DeleteRange(DeleteRangeRequest),
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct ResponseOp {
    #[prost(oneof = "Response", tags = "1")]
    pub response: Option<Response>,
}

#[derive(Clone, PartialEq, Eq, Oneof)]
pub enum Response {
    #[prost(message, tag = "1")]
    Range(RangeResponse),
}

/// Does `success` if all that is compared is so, else `failure`; all or nothing.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct TxnRequest {
    #[prost(message, repeated, tag = "1")]
    pub compare: Vec<Compare>,
    #[prost(message, repeated, tag = "2")]
    pub success: Vec<RequestOp>,
    #[prost(message, repeated, tag = "3")]
    pub failure: Vec<RequestOp>,
}

#[derive(Clone, PartialEq, Eq, Message)]
pub struct TxnResponse {
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    #[prost(bool, tag = "2")]
    pub succeeded: bool,
    #[prost(message, repeated, tag = "3")]
    pub responses: Vec<ResponseOp>,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct CompactionRequest {
    #[prost(int64, tag = "1")]
    pub revision: i64,
}

/// An answer of which nothing is looked at.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Done {}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct LeaseGrantRequest {
    /// In seconds.
    #[prost(int64, tag = "1")]
    pub ttl: i64,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct LeaseRevokeRequest {
    #[prost(int64, tag = "1")]
    pub id: i64,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct LeaseKeepAliveRequest {
    #[prost(int64, tag = "1")]
    pub id: i64,
}

/// Of a lease that was granted, or kept: 0 seconds if there is none any more.
#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct Lease {
    #[prost(int64, tag = "2")]
    pub id: i64,
    #[prost(int64, tag = "3")]
    pub ttl: i64,
}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct StatusRequest {}

#[derive(Clone, Copy, PartialEq, Eq, Message)]
pub struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    pub header: Option<ResponseHeader>,
    /// Number of the member that leads; 0 if none does.
    #[prost(uint64, tag = "4")]
    pub leader: u64,
}

impl TxnRequest {
    /// Does nothing, if nothing is added.
    pub fn new() -> TxnRequest {
        TxnRequest::default()
    }

    /// Only if a key was made by the transaction of this revision; 0: only if it does not exist.
    pub fn if_created(mut self, key: &[u8], revision: i64) -> TxnRequest {
        self.compare.push(Compare {
            target: CREATE,
            key: key.to_owned(),
            expected: Some(Expected::CreateRevision(revision)),
        });
        self
    }

    /// Only if a key has this value.
    pub fn if_value(mut self, key: &[u8], value: &[u8]) -> TxnRequest {
        self.compare.push(Compare {
            target: VALUE,
            key: key.to_owned(),
            expected: Some(Expected::Value(value.to_owned())),
        });
        self
    }

    /// Then puts.
    pub fn put(mut self, put: PutRequest) -> TxnRequest {
        self.success.push(Request::Put(put).into());
        self
    }

    /// Then deletes.
    pub fn delete(mut self, delete: DeleteRangeRequest) -> TxnRequest {
        self.success.push(Request::DeleteRange(delete).into());
        self
    }

    /// Then reads.
    pub fn read(mut self, range: RangeRequest) -> TxnRequest {
        self.success.push(Request::Range(range).into());
        self
    }

    /// Else reads a key.
    pub fn or_read(mut self, key: &[u8]) -> TxnRequest {
        let range = RangeRequest {
            key: key.to_owned(),
            ..RangeRequest::default()
        };
        self.failure.push(Request::Range(range).into());
        self
    }
}

impl TxnResponse {
    /// What was read: for each read the keys that there were.
    pub fn read(self) -> impl Iterator<Item = Vec<KeyValue>> {
        self.responses.into_iter().map(|op| match op.response {
            Some(Response::Range(range)) => range.kvs,
            None => Vec::new(),
        })
    }
}

impl From<Request> for RequestOp {
    fn from(request: Request) -> RequestOp {
        RequestOp {
            request: Some(request),
        }
    }
}
