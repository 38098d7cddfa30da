//! Who is asking, as the gateway verified it.

use http::HeaderMap;
use http::header::HeaderName;
use http::{HeaderValue, StatusCode};

use crate::problem::Problem;
use crate::wire::Name;

pub(crate) static SUBJECT: HeaderName = HeaderName::from_static("x-sealgate-subject");
pub(crate) static SESSION: HeaderName = HeaderName::from_static("x-sealgate-session");
pub(crate) static ROLES: HeaderName = HeaderName::from_static("x-sealgate-roles");

/// Who sends and receives messages.
const MESSAGING: [&str; 2] = ["user", "department-admin"];

/// The identity of a request. Believed because only the gateway reaches our listeners.
#[derive(Debug)]
pub(crate) struct Caller {
    pub(crate) user: Name,
    pub(crate) session: String,
    pub(crate) roles: Vec<String>,
}

impl Caller {
    /// # Errors
    /// 401 if the gateway put no identity on the request; 400 if there are two of one header, which
    /// the gateway never sends.
    pub(crate) fn of(headers: &HeaderMap) -> Result<Self, Problem> {
        let user = only(headers, &SUBJECT)?.ok_or_else(unidentified)?;
        let user = user
            .parse()
            .map_err(|_| Problem::forbidden("unknown-user", "this subject is no user of ours"))?;
        let session = only(headers, &SESSION)?.ok_or_else(unidentified)?.to_owned();
        let roles = only(headers, &ROLES)?.unwrap_or_default();
        let roles = roles.split([',', ' ']).filter(|role| !role.is_empty()).map(str::to_owned).collect();
        Ok(Self { user, session, roles })
    }

    /// Least privilege behind the gateway, too: administrators and auditors have no business in messages (P-1).
    pub(crate) fn may_message(&self) -> Result<(), Problem> {
        if self.roles.iter().any(|role| MESSAGING.contains(&role.as_str())) {
            return Ok(());
        }
        Err(Problem::forbidden("role-missing", "messages are for the roles user and department-admin"))
    }
}

fn only<'h>(headers: &'h HeaderMap, name: &HeaderName) -> Result<Option<&'h str>, Problem> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(Problem::malformed(format!("the header {name} came twice")));
    }
    value.to_str().map(Some).map_err(|_| Problem::malformed(format!("the header {name} is not plain text")))
}

fn unidentified() -> Problem {
    Problem::new(StatusCode::UNAUTHORIZED, "token-missing", "the gateway named no user for this request")
        .header(http::header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&HeaderName, &'static str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in pairs {
            map.append(*name, HeaderValue::from_static(value));
        }
        map
    }

    #[test]
    fn an_identity_is_read() {
        let caller =
            Caller::of(&headers(&[(&SUBJECT, "alice"), (&SESSION, "s1"), (&ROLES, "auditor, user")]));
        let caller = caller.unwrap();
        assert_eq!((caller.user.as_str(), caller.session.as_str()), ("alice", "s1"));
        assert_eq!(caller.roles, ["auditor", "user"]);
    }

    #[test]
    fn p1_messages_are_for_employees_only() {
        let with = |roles| {
            let caller = Caller::of(&headers(&[(&SUBJECT, "alice"), (&SESSION, "s1"), (&ROLES, roles)]));
            caller.unwrap().may_message().map_err(|problem| problem.slug)
        };
        assert_eq!(with("user"), Ok(()));
        assert_eq!(with("auditor,department-admin"), Ok(()));
        for roles in ["auditor", "system-admin", "users", ""] {
            assert_eq!(with(roles), Err("role-missing"), "{roles}");
        }
    }

    #[test]
    fn no_identity_or_two_are_refused() {
        assert_eq!(Caller::of(&headers(&[])).unwrap_err().status, StatusCode::UNAUTHORIZED);
        assert_eq!(
            Caller::of(&headers(&[(&SUBJECT, "alice")])).unwrap_err().status,
            StatusCode::UNAUTHORIZED
        );
        let two = headers(&[(&SUBJECT, "alice"), (&SUBJECT, "bob"), (&SESSION, "s1")]);
        assert_eq!(Caller::of(&two).unwrap_err().status, StatusCode::BAD_REQUEST);
        let strange = headers(&[(&SUBJECT, "Robert'); DROP TABLE"), (&SESSION, "s1")]);
        assert_eq!(Caller::of(&strange).unwrap_err().status, StatusCode::FORBIDDEN);
    }
}
