//! Who is at the other end of a control socket, and what that allows.
//!
//! The kernel says who it is (SO_PEERCRED, SO_PEERGROUPS): user and groups of the process as it connected. Root is an operator,
//! and so is a member of the operators' group; a member of the readers' group may look; anybody else may nothing.

use std::fmt;
use std::io;
use std::os::fd::AsFd;

use tokio::net::UnixStream;

use crate::credentials;

/// What a caller may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Nothing.
    Nobody,
    /// Look.
    Reader,
    /// Everything.
    Operator,
}

/// The groups that have a role, by their numbers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Groups {
    /// May do everything.
    pub operators: Option<u32>,
    /// May look.
    pub readers: Option<u32>,
}

impl Groups {
    /// By their names. One that does not exist is an error: a mistyped name must not mean "nobody" silently.
    pub fn named(operators: Option<&str>, readers: Option<&str>) -> io::Result<Self> {
        let number = |name: Option<&str>| match name {
            None => Ok(None),
            Some(name) => match credentials::group_by_name(name)? {
                None => {
                    Err(io::Error::new(io::ErrorKind::NotFound, format!("there is no group {name:?} on this host")))
                }
                found => Ok(found),
            },
        };
        Ok(Self { operators: number(operators)?, readers: number(readers)? })
    }

    fn role(self, uid: u32, gids: &[u32]) -> Role {
        let in_group = |group: Option<u32>| group.is_some_and(|group| gids.contains(&group));
        if uid == 0 || in_group(self.operators) {
            Role::Operator
        } else if in_group(self.readers) {
            Role::Reader
        } else {
            Role::Nobody
        }
    }
}

/// A process that has connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// Its user.
    pub uid: u32,
    /// Its process id, if the kernel tells.
    pub pid: Option<i32>,
    /// What it may do.
    pub role: Role,
}

impl Caller {
    /// Who is at the other end.
    pub fn of(stream: &UnixStream, groups: Groups) -> io::Result<Self> {
        let credentials = stream.peer_cred()?;
        let mut gids = credentials::peer_groups(stream.as_fd())?;
        gids.push(credentials.gid());
        let uid = credentials.uid();
        Ok(Self { uid, pid: credentials.pid(), role: groups.role(uid, &gids) })
    }

    /// For the audit log, the same for all processes of a user.
    pub fn user(&self) -> String {
        format!("uid {}", self.uid)
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "uid {}", self.uid)?;
        self.pid.map_or(Ok(()), |pid| write!(f, " (pid {pid})"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles() {
        let groups = Groups { operators: Some(10), readers: Some(20) };
        for (uid, gids, role) in [
            (0, &[][..], Role::Operator),
            (5, &[10], Role::Operator),
            (5, &[20, 10], Role::Operator),
            (5, &[20], Role::Reader),
            (5, &[0], Role::Nobody),
            (5, &[], Role::Nobody),
        ] {
            assert_eq!(groups.role(uid, gids), role, "{uid} {gids:?}");
        }
        assert_eq!(Groups::default().role(5, &[0, 10]), Role::Nobody);
        let error = Groups::named(Some("no-such-group-anywhere"), None).unwrap_err().to_string();
        assert!(error.contains("no-such-group-anywhere"), "{error}");
    }
}
