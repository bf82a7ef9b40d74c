//! Asks for the domain's name before something that cannot be taken back.

use std::io::{BufRead, IsTerminal, Write};

use crate::failure::Failure;
use crate::text;

/// The longest line read as an answer: libvirt's names are far shorter.
const ANSWER_BYTES_MAX: u64 = 4096;

/// Fails where nobody could be asked; to be called before anything is shown.
pub fn possible(command: &str, yes: bool) -> Result<(), Failure> {
    possible_of(command, "domain", yes)
}

/// The same, where the name of something else is asked for: `what`.
pub fn possible_of(command: &str, what: &str, yes: bool) -> Result<(), Failure> {
    if yes || std::io::stdin().is_terminal() {
        return Ok(());
    }
    Err(Failure::Usage(format!(
        "`{command}` asks for the {what}'s name, and stdin is not a terminal: nothing was done; \
         give --yes to go on without being asked"
    )))
}

/// Ends well only when exactly `name` was typed. `about` is the question's first half.
pub async fn typed(about: &str, name: &str) -> Result<(), Failure> {
    typed_of(about, "domain", name).await
}

/// The same for the name of something else: `what`.
pub async fn typed_of(about: &str, what: &str, name: &str) -> Result<(), Failure> {
    let question = format!("{about} To go on, type the {what}'s name ({}): ", text::one_line(name));
    // On another thread, so that the connection to the daemon stays alive meanwhile.
    let answer = tokio::task::spawn_blocking(move || -> std::io::Result<Vec<u8>> {
        let mut stderr = std::io::stderr();
        stderr.write_all(question.as_bytes())?;
        stderr.flush()?;
        let mut answer = Vec::new();
        std::io::Read::take(std::io::stdin().lock(), ANSWER_BYTES_MAX).read_until(b'\n', &mut answer)?;
        Ok(answer)
    })
    .await
    .map_err(|e| Failure::Failed(format!("cannot ask: {e}")))?
    .map_err(|e| Failure::Failed(format!("cannot ask: {e}; nothing was done")))?;
    if answer.trim_ascii() == name.trim().as_bytes() {
        return Ok(());
    }
    Err(Failure::Failed(format!("that is not {}: nothing was done", text::one_line(name))))
}
