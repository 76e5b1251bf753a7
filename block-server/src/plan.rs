//! What `serve` is to serve, from its command line or from a TOML file: two ways
//! to write down one [`Plan`].

use std::fmt::Display;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use model::Limits;
use rpc::block::Quality;
use serde::Deserialize;
use toml::Spanned;

use crate::backing::Cache;
use crate::worker::{EngineChoice, Front, THREADS_MAX};
use crate::{exposition, tls};

/// The document's bound on any string; and a name is told in one reply.
const NAME_MAX: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    pub engine: EngineChoice,
    /// That serve, at most; `None`: as many as suit the host.
    pub threads: Option<u16>,
    pub listeners: Vec<Listen>,
    pub exports: Vec<Export>,
    pub tls: Option<tls::Files>,
    pub metrics: Option<exposition::Place>,
    /// Requests that take as long are logged.
    pub slow_log: Option<Duration>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    pub place: Place,
    /// Nobody is served outside TLS.
    pub tls: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// For root, our own user and these.
    Unix(PathBuf, Vec<u32>),
    /// The same for QEMU's vhost-user-blk.
    VhostUser(PathBuf, Vec<u32>),
    Tcp(SocketAddr),
    /// Sockets that whoever started us passes on, as systemd does: for whom their
    /// modes let in, or, where there are users, for root, our own and these.
    Activated(Vec<u32>),
}

/// What passed-on sockets are called.
pub const ACTIVATED: &str = "activated";

impl Place {
    pub fn front(&self) -> Front {
        if self.is_vhost_user() { Front::VhostUser } else { Front::Nbd }
    }

    pub fn is_vhost_user(&self) -> bool {
        matches!(self, Self::VhostUser(..))
    }
}

impl Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path, _) => write!(f, "unix {}", path.display()),
            Self::VhostUser(path, _) => write!(f, "vhost-user {}", path.display()),
            Self::Tcp(address) => write!(f, "tcp {address}"),
            Self::Activated(_) => f.write_str(ACTIVATED),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Export {
    pub name: String,
    pub path: PathBuf,
    pub read_only: bool,
    pub cache: Cache,
    pub description: String,
    /// Names of certificates; `None` lets in whoever the listener lets in.
    pub clients: Option<Vec<String>>,
    pub limits: Limits,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: read: {cause}", path.display())]
    Read { path: PathBuf, cause: std::io::Error },
    /// What the parser found, with the place and the keys that it knows.
    #[error("{}: {cause}", path.display())]
    Syntax { path: PathBuf, cause: toml::de::Error },
    #[error("{}: line {line}: {text}", path.display())]
    Sense { path: PathBuf, line: usize, text: String },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Document {
    #[serde(default)]
    engine: Option<Engine>,
    threads: Option<Spanned<u16>>,
    tls: Option<tls::Files>,
    metrics: Option<Spanned<String>>,
    slow_log_ms: Option<u64>,
    #[serde(default)]
    listen: Vec<Spanned<ListenTable>>,
    #[serde(default)]
    export: Vec<Spanned<ExportTable>>,
}

#[derive(Deserialize)]
enum Engine {
    #[serde(rename = "auto")]
    Auto,
    #[serde(rename = "io_uring")]
    Uring,
    #[serde(rename = "threads")]
    Threads,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ListenTable {
    unix: Option<PathBuf>,
    user: Option<u32>,
    #[serde(default)]
    users: Vec<u32>,
    tcp: Option<SocketAddr>,
    #[serde(default)]
    activated: bool,
    vhost_user: Option<PathBuf>,
    #[serde(default)]
    tls: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct ExportTable {
    name: String,
    path: PathBuf,
    #[serde(default)]
    read_only: bool,
    #[serde(default)]
    cache: Cache,
    description: Option<String>,
    clients: Option<Vec<String>>,
    iops: Option<u64>,
    throughput_mib: Option<u64>,
}

/// A sentence that says what is wrong and what to write, and where.
struct Fault(usize, String);

fn fault<T>(at: &Spanned<T>, text: impl Into<String>) -> Fault {
    Fault(at.span().start, text.into())
}

impl Plan {
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path)
            .map_err(|cause| Error::Read { path: path.to_owned(), cause })?;
        Self::parse(path, &text)
    }

    /// `path` is for the errors.
    pub fn parse(path: &Path, text: &str) -> Result<Self, Error> {
        let document: Document =
            toml::from_str(text).map_err(|cause| Error::Syntax { path: path.to_owned(), cause })?;
        plan(document).map_err(|Fault(at, text_of)| Error::Sense {
            path: path.to_owned(),
            line: 1 + text[..at.min(text.len())].matches('\n').count(),
            text: text_of,
        })
    }
}

fn plan(document: Document) -> Result<Plan, Fault> {
    let has_tls = document.tls.is_some();
    if document.export.len() > 1
        && let Some(guest) = document.listen.iter().find(|l| l.get_ref().vhost_user.is_some())
    {
        return Err(fault(
            guest,
            "vhost-user: such a socket serves one export, and there are several; serve that \
             one by a process of its own",
        ));
    }
    let listeners =
        document.listen.iter().map(|l| listen(l, has_tls)).collect::<Result<Vec<_>, _>>()?;
    if listeners.is_empty() {
        return Err(Fault(
            0,
            "there is no [[listen]]: write one with unix = \"/run/x.sock\"".into(),
        ));
    }
    if document.export.is_empty() {
        return Err(Fault(
            0,
            "there is no [[export]]: write one with name = \"\" and path = \"disk.img\"".into(),
        ));
    }
    let mut exports: Vec<Export> = Vec::new();
    for table in &document.export {
        let export = export(table)?;
        if exports.iter().any(|other| other.name == export.name) {
            let name = &export.name;
            return Err(fault(table, format!("name: {name:?} is taken; write another")));
        }
        if export.clients.is_some() && !listeners.iter().any(|listen| listen.tls) {
            return Err(fault(
                table,
                "clients: only TLS knows who a client is; write tls = true in a [[listen]]",
            ));
        }
        exports.push(export);
    }
    let engine = match document.engine {
        None | Some(Engine::Auto) => EngineChoice::Auto,
        Some(Engine::Uring) => EngineChoice::Uring,
        Some(Engine::Threads) => EngineChoice::Threads,
    };
    let threads = |count: &Spanned<u16>| {
        let lawful = (1..=THREADS_MAX).contains(&i64::from(*count.get_ref()));
        let told = || fault(count, format!("threads: write between 1 and {THREADS_MAX}"));
        lawful.then_some(*count.get_ref()).ok_or_else(told)
    };
    let place = |text: &Spanned<String>| {
        text.get_ref().parse().map_err(|why| fault(text, format!("metrics: {why}")))
    };
    Ok(Plan {
        engine,
        threads: document.threads.as_ref().map(threads).transpose()?,
        listeners,
        exports,
        tls: document.tls,
        metrics: document.metrics.as_ref().map(place).transpose()?,
        slow_log: document.slow_log_ms.filter(|ms| *ms > 0).map(Duration::from_millis),
    })
}

fn listen(table: &Spanned<ListenTable>, has_tls: bool) -> Result<Listen, Fault> {
    let ListenTable { unix, vhost_user, user, users, tcp, activated, tls } = table.get_ref();
    let users: Vec<u32> = user.iter().chain(users).copied().collect();
    let has_users = !users.is_empty();
    let place = match (unix, vhost_user, tcp, activated) {
        (Some(path), None, None, false) => Place::Unix(path.clone(), users),
        (None, Some(path), None, false) => Place::VhostUser(path.clone(), users),
        (None, None, Some(address), false) => Place::Tcp(*address),
        (None, None, None, true) => Place::Activated(users),
        _ => {
            return Err(fault(
                table,
                "[[listen]]: write one of unix = \"PATH\", vhost-user = \"PATH\", \
                 tcp = \"ADDRESS:PORT\" and activated = true; a second socket gets a [[listen]] \
                 of its own",
            ));
        }
    };
    if has_users && matches!(place, Place::Tcp(_)) {
        return Err(fault(
            table,
            "user, users: only who comes by a unix socket has one; write unix = \"PATH\" \
             in place of tcp",
        ));
    }
    if *tls && place.is_vhost_user() {
        return Err(fault(
            table,
            "tls: a guest's memory is no stream; leave it out beside vhost-user",
        ));
    }
    if *tls && !has_tls {
        return Err(fault(
            table,
            "tls: there is no [tls]; write one with certificate, key and client-ca",
        ));
    }
    Ok(Listen { place, tls: *tls })
}

fn export(table: &Spanned<ExportTable>) -> Result<Export, Fault> {
    let ExportTable { name, path, read_only, cache, description, clients, .. } = table.get_ref();
    let ExportTable { iops, throughput_mib, .. } = *table.get_ref();
    let limits = Quality { kind: None, iops, throughput_mib }.limits(0);
    if name.len() > NAME_MAX {
        return Err(fault(table, format!("name: write at most {NAME_MAX} bytes")));
    }
    if clients.as_ref().is_some_and(Vec::is_empty) {
        return Err(fault(
            table,
            "clients: nobody could use it; name certificates, or leave the key out",
        ));
    }
    Ok(Export {
        name: name.clone(),
        path: path.clone(),
        read_only: *read_only,
        cache: *cache,
        description: description.clone().unwrap_or_else(|| path.display().to_string()),
        clients: clients.clone(),
        limits: limits.map_err(|why| fault(table, why))?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(text: &str) -> String {
        Plan::parse(Path::new("f.toml"), text).unwrap_err().to_string()
    }

    const LISTEN: &str = "[[listen]]\nunix = \"/run/x.sock\"\n";
    const GUEST: &str = "[[listen]]\nvhost-user = \"/run/v.sock\"\n";
    const TLS: &str = "[tls]\ncertificate = \"/c\"\nkey = \"/k\"\nclient-ca = \"/a\"\n";
    const EXPORT: &str = "[[export]]\nname = \"\"\npath = \"disk.img\"\n";

    #[test]
    fn a_file_says_all_that_the_guide_names() {
        let text = r#"
            engine = "threads"
            threads = 3
            metrics = "127.0.0.1:9100"
            slow-log-ms = 250
            [tls]
            certificate = "/c"
            key = "/k"
            client-ca = "/a"
            [[listen]]
            unix = "/run/x.sock"
            user = 107
            [[listen]]
            tcp = "[::1]:10809"
            tls = true
            [[listen]]
            activated = true
            [[listen]]
            vhost-user = "/run/v.sock"
            users = [64000, 64001]
            [[export]]
            name = "root"
            path = "/dev/vg/root"
            read-only = true
            description = "the root"
            clients = ["host-a"]
            iops = 500
            throughput-mib = 20
        "#;
        let plan = Plan::parse(Path::new("f.toml"), text).unwrap();
        assert_eq!((plan.engine, plan.threads), (EngineChoice::Threads, Some(3)));
        assert_eq!(plan.listeners[0].place, Place::Unix("/run/x.sock".into(), vec![107]));
        assert!(plan.listeners[1].tls && !plan.listeners[2].tls);
        assert_eq!(
            plan.listeners[3].place,
            Place::VhostUser("/run/v.sock".into(), vec![64000, 64001])
        );
        assert_eq!(plan.slow_log, Some(Duration::from_millis(250)));
        assert!(matches!(plan.metrics, Some(exposition::Place::Tcp(_))));
        let export = &plan.exports[0];
        assert_eq!(export.limits.operations.map(|r| r.sustained), Some(500));
        assert_eq!(export.limits.bytes.map(|r| r.sustained), Some(20 << 20));
        assert!(export.read_only && export.description == "the root");
        assert_eq!(export.clients.as_deref(), Some(&["host-a".to_owned()][..]));
    }

    #[test]
    fn an_error_names_its_line_its_key_and_what_to_write() {
        for (text, parts) in [
            (
                format!("{LISTEN}{EXPORT}readonly = true\n"),
                &["line 6", "readonly", "read-only"][..],
            ),
            (format!("{LISTEN}[[export]]\nname = \"a\"\n"), &["line 3", "path"]),
            (format!("engine = \"fast\"\n{LISTEN}{EXPORT}"), &["line 1", "fast", "io_uring"]),
            (format!("threads = 0\n{LISTEN}{EXPORT}"), &["line 1", "threads", "between 1"]),
            (format!("{LISTEN}tcp = \"127.0.0.1:1\"\n{EXPORT}"), &["line 1", "one of unix"]),
            (format!("{LISTEN}tls = true\n{EXPORT}"), &["line 1", "tls", "certificate, key"]),
            (
                format!("[[listen]]\ntcp = \"127.0.0.1:1\"\nusers = [1]\n{EXPORT}"),
                &["line 1", "users", "unix"],
            ),
            (format!("[[listen]]\ntcp = \"here\"\n{EXPORT}"), &["line 2", "tcp", "address"]),
            (format!("{LISTEN}{EXPORT}{EXPORT}"), &["line 6", "name", "taken"]),
            (format!("{LISTEN}{EXPORT}clients = [\"a\"]\n"), &["line 3", "clients", "tls = true"]),
            (format!("{LISTEN}{EXPORT}iops = 0\n"), &["line 3", "IOPS", "between 1"]),
            (format!("metrics = \"x\"\n{LISTEN}{EXPORT}"), &["line 1", "metrics", "ADDRESS:PORT"]),
            (format!("{GUEST}tls = true\n{TLS}{EXPORT}"), &["line 1", "tls", "vhost-user"]),
            (
                format!("{GUEST}{EXPORT}[[export]]\nname = \"b\"\npath = \"b\"\n"),
                &["line 1", "vhost-user", "one export"],
            ),
            (LISTEN.to_owned(), &["[[export]]"]),
            (EXPORT.to_owned(), &["[[listen]]"]),
        ] {
            let told = told(&text);
            for part in parts {
                assert!(told.contains(part), "{part:?} in {told}");
            }
        }
    }
}
