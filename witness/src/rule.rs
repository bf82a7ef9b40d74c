//! What the witness has of a domain, and who may have its lease.

use serde::{Deserialize, Serialize};

/// Who owns a domain as far as the witness knows. It outlives the lease, and only ever goes up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    /// The generation in which it does.
    pub generation: u64,
    /// The site: the id of its host.
    pub holder: String,
}

/// What the witness has of a domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    /// Who owned it last.
    pub owner: Option<Owner>,
    /// Who holds its lease now; nothing: it has ended, or was never taken.
    pub lease: Option<String>,
}

/// A wish to have the lease of a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Claim {
    /// The site that wishes it.
    pub holder: String,
    /// The generation in which it owns the guest, or will.
    pub generation: u64,
}

/// What becomes of a claim.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Allowed {
    /// The claimant may have the lease.
    Yes,
    /// Another site has the lease.
    Held(String),
    /// Another site owns the domain, in this generation.
    Outdated(u64),
}

/// Whether a claim may be granted. The witness's transaction grants it only while the view is still this one.
pub fn allows(view: &View, claim: &Claim) -> Allowed {
    if let Some(owner) = &view.owner {
        let same = owner.generation == claim.generation && owner.holder == claim.holder;
        if owner.generation >= claim.generation && !same {
            return Allowed::Outdated(owner.generation);
        }
    }
    match &view.lease {
        Some(holder) if *holder != claim.holder => Allowed::Held(holder.clone()),
        _ => Allowed::Yes,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_goes_to_the_newest_owner_once_the_other_has_ended() {
        let view = |owner: Option<(u64, &str)>, lease: Option<&str>| View {
            owner: owner.map(|(generation, holder)| Owner { generation, holder: holder.to_owned() }),
            lease: lease.map(str::to_owned),
        };
        let claim = |holder: &str, generation| Claim { holder: holder.to_owned(), generation };
        let held = || Allowed::Held("a".to_owned());
        for (view, claim, expected) in [
            (view(None, None), claim("a", 1), Allowed::Yes),
            (view(Some((1, "a")), Some("a")), claim("a", 1), Allowed::Yes),
            (view(Some((1, "a")), None), claim("a", 1), Allowed::Yes),
            (view(Some((1, "a")), Some("a")), claim("b", 2), held()),
            (view(Some((1, "a")), None), claim("b", 2), Allowed::Yes),
            (view(Some((1, "a")), None), claim("b", 1), Allowed::Outdated(1)),
            (view(Some((2, "b")), None), claim("a", 1), Allowed::Outdated(2)),
            (view(Some((2, "b")), None), claim("a", 2), Allowed::Outdated(2)),
            (view(Some((2, "b")), Some("b")), claim("a", 1), Allowed::Outdated(2)),
            (view(Some((2, "b")), None), claim("a", 3), Allowed::Yes),
            (view(None, Some("a")), claim("b", 1), held()),
        ] {
            assert_eq!(allows(&view, &claim), expected, "{view:?} {claim:?}");
        }
    }
}
