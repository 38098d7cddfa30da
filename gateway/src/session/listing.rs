//! The open sockets as an operator sees them: by session, page by page.

use std::collections::BTreeMap;

use sealgate_policy::Identity;
use serde::{Deserialize, Serialize};

/// Sessions of one page, at most.
pub const MAX_PAGE: usize = 1000;

/// Names of rules that one line shows.
const MAX_ROUTES: usize = 16;

/// Whose sockets stand in one line. Sockets that are nobody's have none of it, and come first.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SessionKey {
    /// `iss`.
    pub issuer: Option<String>,
    /// `sub`.
    pub subject: Option<String>,
    /// `sid`, where the token has one.
    pub session: Option<String>,
}

/// One line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionRow {
    /// Whose.
    pub of: SessionKey,
    /// How many sockets are open.
    pub sockets: usize,
    /// When the oldest of them was opened, unix seconds.
    pub opened_at: u64,
    /// Names of their rules, sorted; at most 16.
    pub routes: Vec<String>,
}

/// What is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SessionQuery {
    /// This issuer's only (`iss`).
    pub issuer: Option<String>,
    /// This subject's only.
    pub subject: Option<String>,
    /// Behind this line.
    pub after: Option<SessionKey>,
    /// Lines, 1 to [`MAX_PAGE`].
    pub limit: usize,
}

/// The answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionPage {
    /// In the order of their keys.
    pub sessions: Vec<SessionRow>,
    /// Where to go on, if there are more.
    pub next: Option<SessionKey>,
    /// Whether all cores have answered in time.
    pub complete: bool,
}

/// A page in the making, of one core or of several: never more than a page and one line.
pub struct Listing<'q> {
    query: &'q SessionQuery,
    rows: BTreeMap<SessionKey, Row>,
}

/// What a core found: a line and a half dozen words for each key.
pub type Rows = BTreeMap<SessionKey, Row>;

/// One line without its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    sockets: usize,
    opened_at: u64,
    routes: Vec<String>,
}

impl<'q> Listing<'q> {
    /// Nothing yet.
    #[must_use]
    pub fn new(query: &'q SessionQuery) -> Self {
        Self { query, rows: BTreeMap::new() }
    }

    /// Adds one open socket, if it is asked for.
    pub fn add(&mut self, identity: Option<&Identity>, opened_at: u64, route: &str) {
        let (issuer, subject) =
            (identity.map(|it| &*it.issuer), identity.map(|identity| identity.subject.as_str()));
        let wanted = |wanted: &Option<String>, have| wanted.is_none() || wanted.as_deref() == have;
        if !wanted(&self.query.issuer, issuer) || !wanted(&self.query.subject, subject) {
            return;
        }
        let key = SessionKey {
            issuer: issuer.map(str::to_owned),
            subject: subject.map(str::to_owned),
            session: identity.and_then(|identity| identity.session.clone()),
        };
        self.merge_one(key, Row { sockets: 1, opened_at, routes: vec![route.to_owned()] });
    }

    /// Adds what another core found.
    pub fn merge(&mut self, rows: Rows) {
        for (key, row) in rows {
            self.merge_one(key, row);
        }
    }

    fn merge_one(&mut self, key: SessionKey, row: Row) {
        if self.query.after.as_ref().is_some_and(|after| key <= *after) {
            return;
        }
        let mine =
            self.rows.entry(key).or_insert(Row { sockets: 0, opened_at: u64::MAX, routes: Vec::new() });
        mine.sockets += row.sockets;
        mine.opened_at = mine.opened_at.min(row.opened_at);
        for route in row.routes {
            if let Err(place) = mine.routes.binary_search(&route) {
                mine.routes.insert(place, route);
                mine.routes.truncate(MAX_ROUTES);
            }
        }
        // What falls off lies behind the page, whatever else comes: keys in front of it only grow in number.
        if self.rows.len() > self.query.limit.min(MAX_PAGE) + 1 {
            self.rows.pop_last();
        }
    }

    /// What was found, for [`Listing::merge`].
    #[must_use]
    pub fn into_rows(self) -> Rows {
        self.rows
    }

    /// The page.
    #[must_use]
    pub fn into_page(self, complete: bool) -> SessionPage {
        let limit = self.query.limit.min(MAX_PAGE);
        let more = self.rows.len() > limit;
        let row = |(of, Row { sockets, opened_at, routes })| SessionRow { of, sockets, opened_at, routes };
        let sessions: Vec<_> = self.rows.into_iter().take(limit).map(row).collect();
        let next = sessions.last().filter(|_| more).map(|row| row.of.clone());
        SessionPage { sessions, next, complete }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use sealgate_policy::IdentityParts;

    fn identity(subject: &str, session: Option<&str>) -> Identity {
        Identity::new(IdentityParts {
            issuer: "i".into(),
            subject: subject.to_owned(),
            session: session.map(str::to_owned),
            ..IdentityParts::default()
        })
    }

    #[test]
    fn a_line_holds_a_session_with_all_its_sockets() {
        let query = SessionQuery { limit: 10, ..SessionQuery::default() };
        let mut core = Listing::new(&query);
        core.add(Some(&identity("bob", None)), 7, "chat");
        core.add(Some(&identity("alice", Some("s1"))), 5, "files");
        core.add(None, 9, "open");
        let mut all = Listing::new(&query);
        all.add(Some(&identity("alice", Some("s1"))), 3, "chat");
        all.merge(core.into_rows());
        let page = all.into_page(true);
        let rows: Vec<_> = page
            .sessions
            .iter()
            .map(|row| (row.of.subject.as_deref(), row.of.session.as_deref(), row.sockets, row.opened_at))
            .collect();
        assert_eq!(rows, [(None, None, 1, 9), (Some("alice"), Some("s1"), 2, 3), (Some("bob"), None, 1, 7)]);
        assert_eq!(page.sessions[1].routes, ["chat", "files"]);
        assert!(page.next.is_none() && page.complete);

        let query = SessionQuery { subject: Some("alice".into()), limit: 10, ..SessionQuery::default() };
        let mut some = Listing::new(&query);
        some.add(Some(&identity("bob", None)), 7, "chat");
        some.add(Some(&identity("alice", None)), 7, "chat");
        some.add(None, 7, "chat");
        assert_eq!(some.into_page(true).sessions.len(), 1);
    }

    proptest! {
        #[test]
        fn pages_hold_every_session_once(
            sockets in prop::collection::vec((0u8..9, 0u8..4, 0usize..3), 0..80),
            limit in 1usize..6,
        ) {
            let mut expected = BTreeMap::new();
            for (subject, session, _) in &sockets {
                *expected.entry((subject.to_string(), session.to_string())).or_insert(0) += 1;
            }
            let mut found = BTreeMap::new();
            let mut query = SessionQuery { limit, ..SessionQuery::default() };
            loop {
                let mut all = Listing::new(&query);
                for core in 0..3 {
                    let mut listing = Listing::new(&query);
                    for (subject, session, _) in sockets.iter().filter(|socket| socket.2 == core) {
                        let who = identity(&subject.to_string(), Some(&session.to_string()));
                        listing.add(Some(&who), 1, "chat");
                        prop_assert!(listing.rows.len() <= limit + 1);
                    }
                    all.merge(listing.into_rows());
                }
                let page = all.into_page(true);
                prop_assert!(page.sessions.len() <= limit);
                for row in page.sessions {
                    let key = (row.of.subject.unwrap(), row.of.session.unwrap());
                    prop_assert!(found.insert(key, row.sockets).is_none());
                }
                match page.next {
                    Some(next) => query.after = Some(next),
                    None => break,
                }
            }
            prop_assert_eq!(found, expected);
        }
    }
}
