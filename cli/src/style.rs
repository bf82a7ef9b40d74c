//! Colour, where it helps and is wanted: on a terminal, without `NO_COLOR` (any value but the empty one) and unless
//! `TERM` is `dumb`. JSON never has any.

use std::ffi::OsStr;

/// What a word means to the reader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tone {
    /// Nothing special.
    Plain,
    /// As it should be.
    Good,
    /// On its way, or worth a look.
    Care,
    /// Protection is not there.
    Bad,
    /// A heading.
    Bold,
}

impl Tone {
    /// The tone of a domain's state.
    pub fn of_state(state: &str) -> Tone {
        match state {
            "protected" | "ready" | "active" => Tone::Good,
            "starting" | "seeding" | "resync" | "behind" | "stalled" | "held" | "paused" | "suspended" | "shut off" => {
                Tone::Care
            }
            "disconnected" | "stopped" | "failed" | "fenced" | "crashed" => Tone::Bad,
            _ => Tone::Plain,
        }
    }
}

/// Paints, or does not.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    colour: bool,
}

impl Style {
    /// For a stream that is a terminal or not, under this process's environment.
    pub fn of(stream: &impl std::io::IsTerminal) -> Style {
        let set = |name| std::env::var_os(name).is_some_and(|value: std::ffi::OsString| !value.is_empty());
        let dumb = std::env::var_os("TERM").as_deref() == Some(OsStr::new("dumb"));
        Style { colour: stream.is_terminal() && !set("NO_COLOR") && !dumb }
    }

    /// Never any colour.
    #[cfg(test)]
    pub fn plain() -> Style {
        Style { colour: false }
    }

    /// The text in its tone.
    pub fn paint(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            _ if !self.colour => return text.to_owned(),
            Tone::Plain => return text.to_owned(),
            Tone::Good => "32",
            Tone::Care => "33",
            Tone::Bad => "31",
            Tone::Bold => "1",
        };
        format!("\x1b[{code}m{text}\x1b[0m")
    }
}
