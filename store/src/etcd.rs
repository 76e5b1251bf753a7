//! The store of many hosts: an etcd, asked over gRPC.

use std::time::Duration;

use async_trait::async_trait;
use etcd_client as proto;
use etcd_client::{Client, GetOptions, PutOptions, WatchOptions, WatchStream};

use crate::txn::{Compare, Op, Relation, Target, Txn, TxnAnswer, validate};
use crate::{Batch, Error, Event, KeyValue, LeaseId, Range, Revision, Store, Watch};

/// An etcd that does not answer within this is as good as gone; the caller
/// tries again.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);

pub struct Etcd {
    client: Client,
    endpoints: Vec<String>,
}

impl Etcd {
    pub async fn connect(endpoints: &[String]) -> Result<Self, Error> {
        let options = proto::ConnectOptions::new()
            .with_connect_timeout(CALL_TIMEOUT)
            .with_timeout(CALL_TIMEOUT);
        let client = Client::connect(endpoints, Some(options)).await.map_err(failed)?;
        Ok(Self { client, endpoints: endpoints.to_vec() })
    }
}

fn failed(error: proto::Error) -> Error {
    let text = error.to_string();
    if text.contains("requested lease not found") {
        return Error::LeaseNotFound(LeaseId(0));
    }
    Error::Unavailable(format!("etcd: {text}"))
}

fn revision(header: Option<&proto::ResponseHeader>) -> Revision {
    header.map_or(0, |h| h.revision().unsigned_abs())
}

fn entry(kv: &proto::KeyValue) -> Result<KeyValue, Error> {
    let key = kv.key_str().map_err(|e| Error::Damaged(format!("etcd: a key is not text: {e}")))?;
    let lease = kv.lease().unsigned_abs();
    Ok(KeyValue {
        key: key.to_owned(),
        value: kv.value().to_vec(),
        created: kv.create_revision().unsigned_abs(),
        modified: kv.mod_revision().unsigned_abs(),
        version: kv.version().unsigned_abs(),
        lease: (lease != 0).then_some(LeaseId(lease)),
    })
}

fn compare(compare: &Compare) -> proto::Compare {
    let relation = match compare.relation {
        Relation::Equal => proto::CompareOp::Equal,
        Relation::NotEqual => proto::CompareOp::NotEqual,
        Relation::Greater => proto::CompareOp::Greater,
        Relation::Less => proto::CompareOp::Less,
    };
    let key = compare.key.as_str();
    match &compare.target {
        Target::Version(n) => proto::Compare::version(key, relation, n.cast_signed()),
        Target::Created(n) => proto::Compare::create_revision(key, relation, n.cast_signed()),
        Target::Modified(n) => proto::Compare::mod_revision(key, relation, n.cast_signed()),
        Target::Value(value) => proto::Compare::value(key, relation, value.as_slice()),
    }
}

fn op(op: &Op) -> proto::TxnOp {
    match op {
        Op::Put { key, value, lease } => {
            let options = lease.map(|l| PutOptions::new().with_lease(l.0.cast_signed()));
            proto::TxnOp::put(key.as_str(), value.as_slice(), options)
        }
        Op::Delete { key } => proto::TxnOp::delete(key.as_str(), None),
    }
}

#[async_trait]
impl Store for Etcd {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, Error> {
        let answer = self.client.kv_client().get(key, None).await.map_err(failed)?;
        answer.kvs().first().map(entry).transpose()
    }

    async fn range(&self, prefix: &str) -> Result<Range, Error> {
        let options = Some(GetOptions::new().with_prefix());
        let answer = self.client.kv_client().get(prefix, options).await.map_err(failed)?;
        let entries = answer.kvs().iter().map(entry).collect::<Result<_, _>>()?;
        Ok(Range { revision: revision(answer.header()), entries })
    }

    async fn txn(&self, txn: Txn) -> Result<TxnAnswer, Error> {
        validate(&txn)?;
        let request = proto::Txn::new()
            .when(txn.compare.iter().map(compare).collect::<Vec<_>>())
            .and_then(txn.then.iter().map(op).collect::<Vec<_>>())
            .or_else(txn.otherwise.iter().map(op).collect::<Vec<_>>());
        let answer = self.client.kv_client().txn(request).await.map_err(failed)?;
        Ok(TxnAnswer { succeeded: answer.succeeded(), revision: revision(answer.header()) })
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Box<dyn Watch>, Error> {
        let options = WatchOptions::new().with_prefix().with_start_revision(from.cast_signed());
        let stream =
            self.client.watch_client().watch(prefix, Some(options)).await.map_err(failed)?;
        Ok(Box::new(EtcdWatch { stream, from, ready: Vec::new() }))
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, Error> {
        let seconds = ttl.as_secs().max(1).cast_signed();
        let lease = self.client.lease_client().grant(seconds, None).await.map_err(failed)?;
        Ok(LeaseId(lease.id().unsigned_abs()))
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), Error> {
        let id = lease.0.cast_signed();
        let (mut keeper, mut answers) =
            self.client.lease_client().keep_alive(id).await.map_err(failed)?;
        keeper.keep_alive().await.map_err(failed)?;
        match answers.message().await.map_err(failed)? {
            Some(answer) if answer.ttl() > 0 => Ok(()),
            _ => Err(Error::LeaseNotFound(lease)),
        }
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), Error> {
        match self.client.lease_client().revoke(lease.0.cast_signed()).await.map_err(failed) {
            Ok(_) => Ok(()),
            Err(Error::LeaseNotFound(_)) => Err(Error::LeaseNotFound(lease)),
            Err(e) => Err(e),
        }
    }

    /// etcd ends leases by itself.
    async fn sweep(&self) -> Result<(), Error> {
        Ok(())
    }

    fn describe(&self) -> String {
        format!("etcd {}", self.endpoints.join(","))
    }
}

/// etcd may put several revisions into one message; they are told one by one.
struct EtcdWatch {
    stream: WatchStream,
    from: Revision,
    /// In reverse order: the last is the next.
    ready: Vec<Batch>,
}

impl EtcdWatch {
    fn take(&mut self, answer: &proto::WatchResponse) -> Result<(), Error> {
        let oldest = answer.compact_revision().unsigned_abs();
        if oldest != 0 {
            return Err(Error::Compacted { from: self.from, oldest });
        }
        if answer.canceled() {
            let cause = answer.cancel_reason();
            return Err(Error::Unavailable(format!("etcd: watch cancelled: {cause}")));
        }
        for event in answer.events() {
            let Some(kv) = event.kv() else { continue };
            let modified = entry(kv)?;
            let revision = modified.modified;
            let event = match event.event_type() {
                proto::EventType::Put => Event::Put(modified),
                proto::EventType::Delete => Event::Deleted { key: modified.key },
            };
            match self.ready.last_mut() {
                Some(batch) if batch.revision == revision => batch.events.push(event),
                _ => self.ready.push(Batch { revision, events: vec![event] }),
            }
        }
        for batch in &mut self.ready {
            batch.events.sort_by(|a, b| a.key().cmp(b.key()));
        }
        self.ready.reverse();
        Ok(())
    }
}

#[async_trait]
impl Watch for EtcdWatch {
    async fn next(&mut self) -> Result<Batch, Error> {
        loop {
            if let Some(batch) = self.ready.pop() {
                self.from = batch.revision + 1;
                return Ok(batch);
            }
            let closed = || Error::Unavailable("etcd: the watch was closed".to_owned());
            let answer = self.stream.message().await.map_err(failed)?.ok_or_else(closed)?;
            self.take(&answer)?;
        }
    }
}
