//! The EC2 Query API, asked over `control`'s unix socket.
//!
//! ```text
//!   POST / HTTP/1.1                       <DescribeVolumesResponse xmlns=…>
//!   Action=DescribeVolumes            ─▶    <volumeSet><item>…</item></volumeSet>
//!   &Version=2016-11-15&VolumeId.1=…      </DescribeVolumesResponse>
//! ```
//! No signature: the kernel tells `control` who calls. Called by the nouns.
//! What may never be true: that a noun knows more of `control` than this API.

pub mod advice;
pub mod session;
pub mod xml;

pub use session::{Parameters, Session};
pub use xml::Element;
