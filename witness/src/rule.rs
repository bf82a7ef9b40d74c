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
    /// What it goes by.
    pub over: Over,
}

/// What the witness must have of a domain for a claim to be granted, unless it has the claimant itself in this generation.
/// Where the keys were deleted, or are of another history, nothing is known of who runs the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Over {
    /// Nothing else.
    Own,
    /// This owner.
    Owner(Owner),
    /// No owner, or any of an older generation: the claimant knows that nobody else runs the guest, or will.
    Anything,
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
    /// There is not what the claim goes by: the keys were deleted, or are of another history.
    Missing,
}

/// Whether a claim may be granted. The witness's transaction grants it only while the view is still this one.
pub fn allows(view: &View, claim: &Claim) -> Allowed {
    match (&view.owner, &claim.over) {
        (Some(owner), _) if owner.generation == claim.generation && owner.holder == claim.holder => {}
        (Some(owner), _) if owner.generation >= claim.generation => return Allowed::Outdated(owner.generation),
        (Some(owner), Over::Owner(expected)) if owner == expected => {}
        (_, Over::Anything) => {}
        (_, Over::Own | Over::Owner(_)) => return Allowed::Missing,
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
        let claim = |holder: &str, generation, over| Claim { holder: holder.to_owned(), generation, over };
        let of_a = |generation| Over::Owner(Owner { generation, holder: "a".to_owned() });
        let held = || Allowed::Held("a".to_owned());
        for (view, claim, expected) in [
            (view(None, None), claim("a", 1, Over::Anything), Allowed::Yes),
            (view(None, None), claim("a", 1, Over::Own), Allowed::Missing),
            (view(None, None), claim("b", 2, of_a(1)), Allowed::Missing),
            (view(Some((1, "a")), Some("a")), claim("a", 1, Over::Own), Allowed::Yes),
            (view(Some((1, "a")), None), claim("a", 1, Over::Own), Allowed::Yes),
            (view(Some((1, "a")), Some("a")), claim("b", 2, of_a(1)), held()),
            (view(Some((1, "a")), None), claim("b", 2, of_a(1)), Allowed::Yes),
            (view(Some((1, "a")), None), claim("b", 3, of_a(2)), Allowed::Missing),
            (view(Some((1, "c")), None), claim("b", 2, of_a(1)), Allowed::Missing),
            (view(Some((1, "a")), None), claim("b", 1, of_a(0)), Allowed::Outdated(1)),
            (view(Some((2, "b")), Some("b")), claim("b", 2, of_a(1)), Allowed::Yes),
            (view(Some((2, "b")), None), claim("a", 1, Over::Own), Allowed::Outdated(2)),
            (view(Some((2, "b")), None), claim("a", 2, Over::Anything), Allowed::Outdated(2)),
            (view(Some((2, "b")), Some("b")), claim("a", 1, Over::Own), Allowed::Outdated(2)),
            (view(Some((2, "b")), None), claim("a", 3, Over::Anything), Allowed::Yes),
            (view(Some((2, "b")), None), claim("a", 3, Over::Own), Allowed::Missing),
            (view(None, Some("a")), claim("b", 1, Over::Anything), held()),
        ] {
            assert_eq!(allows(&view, &claim), expected, "{view:?} {claim:?}");
        }
    }
}
