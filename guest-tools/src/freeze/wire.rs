//! What a freezing process says to its daemon: lines over a pipe.

use std::ffi::OsString;
use std::io::Write;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The longest line.
pub const LINE_BYTES_MAX: usize = 8192;

/// A line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// This will be frozen: whoever outlives this process thaws it.
    Freezing(PathBuf),
    /// All is frozen.
    Frozen {
        /// How many.
        file_systems: usize,
        /// How many could not be.
        skipped: usize,
        /// For how long at most.
        hold_ms: u32,
        /// For people.
        text: String,
    },
    /// It is not, and nothing is.
    Failed(String),
    /// All is thawed.
    Thawed {
        /// Each was frozen until it was asked for.
        held: bool,
        /// How long the first was frozen.
        frozen_ms: u32,
        /// For people.
        text: String,
    },
    /// The hooks have run too; what of them failed.
    Ended(String),
}

impl Said {
    fn line(&self) -> String {
        let one = |text: &str| text.replace('\n', " ");
        match self {
            Self::Freezing(path) => format!("freezing {}", escape(path)),
            Self::Frozen { file_systems, skipped, hold_ms, text } => {
                format!("frozen {file_systems} {skipped} {hold_ms} {}", one(text))
            }
            Self::Failed(text) => format!("failed {}", one(text)),
            Self::Thawed { held, frozen_ms, text } => format!("thawed {} {frozen_ms} {}", u8::from(*held), one(text)),
            Self::Ended(text) => format!("ended {}", one(text)),
        }
    }

    /// A line as it was said.
    pub fn parse(line: &str) -> Option<Self> {
        let (word, rest) = line.split_once(' ').unwrap_or((line, ""));
        let mut fields = rest.splitn(4, ' ');
        let mut number = || fields.next()?.parse::<u32>().ok();
        Some(match word {
            "freezing" => Self::Freezing(unescape(rest)),
            "frozen" => Self::Frozen {
                file_systems: number()? as usize,
                skipped: number()? as usize,
                hold_ms: number()?,
                text: fields.next().unwrap_or_default().to_owned(),
            },
            "failed" => Self::Failed(rest.to_owned()),
            "thawed" => {
                let (held, frozen_ms) = (number()? == 1, number()?);
                let text = rest.splitn(3, ' ').nth(2).unwrap_or_default().to_owned();
                Self::Thawed { held, frozen_ms, text }
            }
            "ended" => Self::Ended(rest.to_owned()),
            _ => return None,
        })
    }
}

/// Says it. A daemon that is gone hears nothing.
pub fn say(said: &Said) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all((said.line() + "\n").as_bytes()).and_then(|()| out.flush());
}

/// A path without newlines.
pub fn escape(path: &Path) -> String {
    let mut text = String::new();
    for byte in path.as_os_str().as_bytes() {
        match byte {
            b' '..=b'~' if *byte != b'\\' => text.push(char::from(*byte)),
            _ => text.push_str(&format!("\\{byte:02x}")),
        }
    }
    text
}

/// The path again.
pub fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let hex = after.get(..2).filter(|_| byte == b'\\').and_then(|two| std::str::from_utf8(two).ok());
        let value = hex.and_then(|two| u8::from_str_radix(two, 16).ok());
        bytes.push(value.unwrap_or(byte));
        rest = if value.is_some() { &after[2..] } else { after };
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn said() -> impl Strategy<Value = Said> {
        let text = || "[a-z:, ]{0,40}";
        prop_oneof![
            proptest::collection::vec(1u8.., 1..40).prop_map(|bytes| Said::Freezing(OsString::from_vec(bytes).into())),
            (any::<u16>(), any::<u16>(), any::<u32>(), text()).prop_map(|(file_systems, skipped, hold_ms, text)| {
                Said::Frozen { file_systems: file_systems.into(), skipped: skipped.into(), hold_ms, text }
            }),
            text().prop_map(Said::Failed),
            (any::<bool>(), any::<u32>(), text()).prop_map(|(held, frozen_ms, text)| Said::Thawed {
                held,
                frozen_ms,
                text
            }),
            text().prop_map(Said::Ended),
        ]
    }

    proptest! {
        #[test]
        fn lines_come_back(said in said()) {
            let line = said.line();
            prop_assert!(!line.contains('\n'));
            prop_assert_eq!(Said::parse(&line), Some(said));
        }

        #[test]
        fn any_line_is_borne(line in "[a-z0-9 \\\\]{0,80}") {
            let _ = Said::parse(&line);
        }
    }
}
