//! One random history on all implementations: each must say what the reference
//! says. The mix of operations is drawn from the seed, too.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use store::{
    Batch, Compare, Embedded, Error, Etcd, Event, KeyValue, LeaseId, Op, Reference, Relation,
    Revision, Store, Target, Txn,
};

/// SplitMix64 (Steele, Lea, Flood 2014): small, and the same everywhere.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % sides
    }
}

const PREFIX: &str = "/h/";

struct Mix {
    keys: u64,
    deletes_of_ten: u64,
    compares_max: u64,
    leases_of_ten: u64,
}

impl Mix {
    fn draw(dice: &mut Dice) -> Self {
        Self {
            keys: 1 + dice.roll(12),
            deletes_of_ten: dice.roll(8),
            compares_max: dice.roll(4),
            leases_of_ten: dice.roll(4),
        }
    }
}

/// What differs by nature: revisions begin elsewhere in a used etcd, and leases
/// have numbers of its own.
#[derive(Default)]
struct Translation {
    revision_offset: u64,
    leases: Vec<(LeaseId, LeaseId)>,
}

impl Translation {
    fn lease(&self, reference: LeaseId) -> LeaseId {
        self.leases.iter().find(|(r, _)| *r == reference).map_or(reference, |(_, real)| *real)
    }

    fn entry(&self, entry: &KeyValue) -> KeyValue {
        KeyValue {
            created: entry.created + self.revision_offset,
            modified: entry.modified + self.revision_offset,
            lease: entry.lease.map(|l| self.lease(l)),
            ..entry.clone()
        }
    }

    fn batch(&self, batch: &Batch) -> Batch {
        let events = batch.events.iter().map(|e| match e {
            Event::Put(entry) => Event::Put(self.entry(entry)),
            Event::Deleted { key } => Event::Deleted { key: key.clone() },
        });
        Batch { revision: batch.revision + self.revision_offset, events: events.collect() }
    }

    fn txn(&self, txn: &Txn) -> Txn {
        let mut txn = txn.clone();
        for compare in &mut txn.compare {
            match &mut compare.target {
                // 0 stands for "missing" everywhere.
                Target::Created(n) | Target::Modified(n) if *n > 0 => *n += self.revision_offset,
                _ => {}
            }
        }
        for op in txn.then.iter_mut().chain(&mut txn.otherwise) {
            if let Op::Put { lease: Some(lease), .. } = op {
                *lease = self.lease(*lease);
            }
        }
        txn
    }
}

fn random_ops(dice: &mut Dice, mix: &Mix, leases: &[LeaseId]) -> Vec<Op> {
    let mut ops: Vec<Op> = Vec::new();
    for _ in 0..=dice.roll(3) {
        let key = format!("{PREFIX}{}", dice.roll(mix.keys));
        if ops.iter().any(|o| o.key() == key) {
            continue;
        }
        if dice.roll(10) < mix.deletes_of_ten {
            ops.push(Op::delete(key));
        } else {
            let lease = (dice.roll(10) < mix.leases_of_ten && !leases.is_empty())
                .then(|| leases[dice.roll(leases.len() as u64) as usize]);
            ops.push(Op::Put { key, value: vec![dice.roll(4) as u8], lease });
        }
    }
    ops
}

fn random_compare(dice: &mut Dice, mix: &Mix, revision: Revision) -> Compare {
    let relation = [Relation::Equal, Relation::NotEqual, Relation::Greater, Relation::Less]
        [dice.roll(4) as usize];
    // A number near the present: one that can hold.
    let near = revision.saturating_sub(dice.roll(6));
    let target = match dice.roll(4) {
        0 => Target::Version(dice.roll(4)),
        1 => Target::Created(if dice.roll(3) == 0 { 0 } else { near }),
        2 => Target::Modified(if dice.roll(3) == 0 { 0 } else { near }),
        _ => Target::Value(vec![dice.roll(4) as u8]),
    };
    Compare { key: format!("{PREFIX}{}", dice.roll(mix.keys)), target, relation }
}

async fn run_history(store: &dyn Store, seed: u64, steps: u64) {
    let mut dice = Dice(seed);
    let mix = Mix::draw(&mut dice);
    let mut reference = Reference::default();
    let start = store.range(PREFIX).await.unwrap();
    assert!(start.entries.is_empty(), "the store is not empty");
    let mut translation = Translation {
        revision_offset: start.revision - reference.revision(),
        ..Translation::default()
    };
    let mut watch = store.watch(PREFIX, start.revision + 1).await.unwrap();
    let mut leases: Vec<LeaseId> = Vec::new();
    for step in 0..steps {
        let at = format!("seed {seed}, step {step}");
        match dice.roll(12) {
            0 if mix.leases_of_ten > 0 => {
                let ours = reference.grant(3_600_000, 0);
                let real = store.grant(Duration::from_secs(3600)).await.unwrap();
                translation.leases.push((ours, real));
                leases.push(ours);
            }
            1 if !leases.is_empty() => {
                let lease = leases[dice.roll(leases.len() as u64) as usize];
                let expected = reference.revoke(lease).is_ok();
                let real = store.revoke(translation.lease(lease)).await;
                assert_eq!(real.is_ok(), expected, "{at}: revoke {lease:?}: {real:?}");
            }
            _ => {
                let compares = dice.roll(mix.compares_max + 1);
                let revision = reference.revision();
                let txn = Txn {
                    compare: (0..compares)
                        .map(|_| random_compare(&mut dice, &mix, revision))
                        .collect(),
                    then: random_ops(&mut dice, &mix, &leases),
                    otherwise: random_ops(&mut dice, &mix, &leases),
                };
                let real = store.txn(translation.txn(&txn)).await;
                match reference.txn(&txn) {
                    Ok(expected) => {
                        let real = real.unwrap_or_else(|e| panic!("{at}: {e}\n{txn:?}"));
                        assert_eq!(real.succeeded, expected.succeeded, "{at}: {txn:?}");
                        let expected = expected.revision + translation.revision_offset;
                        assert_eq!(real.revision, expected, "{at}: {txn:?}");
                    }
                    Err(expected) => {
                        assert!(
                            matches!(
                                (&real, &expected),
                                (Err(Error::LeaseNotFound(_)), Error::LeaseNotFound(_))
                            ),
                            "{at}: {real:?}, not {expected}"
                        );
                    }
                }
            }
        }
        if dice.roll(8) == 0 {
            let key = format!("{PREFIX}{}", dice.roll(mix.keys));
            let expected = reference.get(&key).map(|e| translation.entry(e));
            assert_eq!(store.get(&key).await.unwrap(), expected, "{at}: get {key}");
        }
    }
    let expected: Vec<_> = reference.range(PREFIX).iter().map(|e| translation.entry(e)).collect();
    assert_eq!(store.range(PREFIX).await.unwrap().entries, expected, "seed {seed}: the end");
    for expected in reference.history(PREFIX, 0) {
        let told = tokio::time::timeout(Duration::from_secs(10), watch.next()).await;
        let told = told.unwrap_or_else(|_| panic!("seed {seed}: the watch is silent"));
        assert_eq!(told.unwrap(), translation.batch(&expected), "seed {seed}: watch");
    }
}

fn seeds(count: u64) -> Vec<u64> {
    if let Ok(seed) = std::env::var("HOSTPLANE_SEED") {
        return vec![seed.parse().unwrap()];
    }
    let base = u64::from(std::process::id()) * 1000;
    (base..base + count).collect()
}

#[tokio::test]
async fn the_embedded_store_says_what_the_reference_says() {
    let seeds = seeds(40);
    eprintln!("seeds {seeds:?}");
    for seed in seeds {
        let dir = tempfile::tempdir().unwrap();
        let store = Embedded::open(&dir.path().join("x.redb"), Arc::new(|| 0)).unwrap();
        run_history(&store, seed, 120).await;
    }
}

struct Server {
    child: Child,
    _dir: tempfile::TempDir,
    endpoint: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start_etcd(test: &str) -> Option<Server> {
    if !Path::new("/usr/bin/etcd").exists() {
        sim::skip(test, "/usr/bin/etcd is missing (apt-get install etcd-server)");
        return None;
    }
    let free = || {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        format!("http://{}", listener.local_addr().unwrap())
    };
    let (endpoint, peer) = (free(), free());
    let dir = tempfile::tempdir().unwrap();
    let child = Command::new("/usr/bin/etcd")
        .arg("--data-dir")
        .arg(dir.path())
        .args(["--listen-client-urls", &endpoint, "--advertise-client-urls", &endpoint])
        .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
        .args(["--initial-cluster", &format!("default={peer}")])
        // A test's data need not outlive the machine.
        .arg("--unsafe-no-fsync")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    Some(Server { child, _dir: dir, endpoint })
}

async fn connect(server: &Server) -> Etcd {
    for _ in 0..300 {
        if let Ok(store) = Etcd::connect(std::slice::from_ref(&server.endpoint)).await
            && store.range(PREFIX).await.is_ok()
        {
            return store;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    panic!("etcd did not start");
}

#[tokio::test]
async fn etcd_says_what_the_reference_says() {
    let Some(server) = start_etcd("etcd_says_what_the_reference_says") else { return };
    let store = connect(&server).await;
    let seeds = seeds(8);
    eprintln!("seeds {seeds:?}");
    for seed in seeds {
        run_history(&store, seed, 120).await;
        for entry in store.range(PREFIX).await.unwrap().entries {
            let txn = Txn { then: vec![Op::delete(entry.key)], ..Txn::default() };
            store.txn(txn).await.unwrap();
        }
    }
}

#[tokio::test]
async fn a_lease_ends_when_its_time_is_over_and_not_before() {
    let dir = tempfile::tempdir().unwrap();
    let now = Arc::new(AtomicU64::new(1000));
    let clock = Arc::clone(&now);
    let store =
        Embedded::open(&dir.path().join("x.redb"), Arc::new(move || clock.load(Ordering::SeqCst)))
            .unwrap();
    let mut reference = Reference::default();
    let lease = store.grant(Duration::from_secs(10)).await.unwrap();
    assert_eq!(reference.grant(10_000, 1000), lease);
    let txn = Txn {
        then: vec![Op::Put { key: "a".to_owned(), value: vec![1], lease: Some(lease) }],
        ..Txn::default()
    };
    store.txn(txn.clone()).await.unwrap();
    reference.txn(&txn).unwrap();
    for (time, there) in [(9_000, true), (15_000, true), (18_999, true), (19_000, false)] {
        now.store(time, Ordering::SeqCst);
        if time == 9_000 {
            store.keep_alive(lease).await.unwrap();
            reference.keep_alive(lease, time).unwrap();
        }
        store.sweep().await.unwrap();
        reference.expire(time);
        assert_eq!(store.get("a").await.unwrap().is_some(), there, "at {time}");
        assert_eq!(reference.get("a").is_some(), there, "at {time}");
    }
    assert_eq!(store.keep_alive(lease).await, Err(Error::LeaseNotFound(lease)));
}

#[tokio::test]
async fn a_watcher_that_fell_behind_is_told_so() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.redb");
    let store = Embedded::open_with_history(&path, Arc::new(|| 0), 10).unwrap();
    for n in 0..30u8 {
        let txn = Txn { then: vec![Op::put("a", [n])], ..Txn::default() };
        store.txn(txn).await.unwrap();
    }
    let mut late = store.watch("a", 2).await.unwrap();
    assert_eq!(late.next().await, Err(Error::Compacted { from: 2, oldest: 22 }));
    let mut in_time = store.watch("a", 22).await.unwrap();
    assert_eq!(in_time.next().await.unwrap().revision, 22);
}

#[tokio::test]
async fn what_breaks_a_limit_is_refused_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = Embedded::open(&dir.path().join("x.redb"), Arc::new(|| 0)).unwrap();
    let twice = vec![Op::put("a", [1]), Op::put("a", [2])];
    let many = (0..129).map(|n| Op::put(format!("k{n}"), [1])).collect();
    let large = vec![Op::put("a", vec![0; store::VALUE_BYTES_MAX + 1])];
    for then in [twice, many, large, vec![Op::put("", [1])]] {
        let refused = store.txn(Txn { then, ..Txn::default() }).await;
        assert!(matches!(refused, Err(Error::Refused(_))), "{refused:?}");
    }
    assert_eq!(store.range("").await.unwrap().entries, []);
}
